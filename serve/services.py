"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.registry import Registry
from serve.adapter_cache import AdapterCache
from serve.catalog import Catalog
from serve.engine import Engine
from serve.feedback import FeedbackStore
from serve.metrics import Metrics
from serve.prompt import PromptRenderer
from serve.training_runs import TrainingRuns


@dataclass(frozen=True)
class Services:
    """What answering needs; built once, in server.py."""

    engine: Engine
    catalog: Catalog
    cache: AdapterCache
    prompts: PromptRenderer
    metrics: Metrics
    training: TrainingRuns | None = None
    """None: this server starts no training runs"""
    feedback: FeedbackStore | None = None
    """None: this server keeps no feedback"""
    registry: Registry | None = None
    """None: this server does not show what is on its machine"""
