"""The services that the API's routes use."""

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
    """The services of a server, created once, in server.py."""

    engine: Engine
    catalog: Catalog
    cache: AdapterCache
    prompts: PromptRenderer
    metrics: Metrics
    training: TrainingRuns | None = None
    """Training runs; None where the server starts none."""
    feedback: FeedbackStore | None = None
    """Feedback; None where the server stores none."""
    registry: Registry | None = None
    """Adapters of this machine; None where the server has no routes for them."""
