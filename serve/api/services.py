"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.feedback.store import FeedbackStore
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.engine import Engine
from serve.training.runs import TrainingRuns


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
