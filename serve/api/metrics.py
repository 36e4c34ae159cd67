"""Metrics for Prometheus, under vLLM's names where the meaning is the same, so that its dashboards work.

Label values are names that this server published, never text from a client.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.engine import Delta, Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The server's counters, histograms and gauges."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        label = ["model_name"]
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens", label, registry=self.registry)
        self._generated = Counter("vllm:generation_tokens", "Generated tokens", label, registry=self.registry)
        self._done = Counter(
            "vllm:request_success", "Completed requests", [*label, "finished_reason"], registry=self.registry
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Time between two tokens")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Time of whole requests")
        self.refused = Counter("adapterhub:requests_refused", "Error responses", ["code"], registry=self.registry)
        self.resident = Gauge("adapterhub:adapters_resident", "Resident adapters", registry=self.registry)
        self.published = Gauge("adapterhub:adapters_published", "Published adapters", registry=self.registry)
        self._gauge("vllm:num_requests_running", "Running requests", "num_running")
        self._gauge("vllm:num_requests_waiting", "Waiting requests", "num_waiting")
        self._gauge("vllm:kv_cache_usage_perc", "Fraction of KV cache blocks in use", "kv_usage")
        self._gauge("vllm:num_preemptions_total", "Preempted sequences", "num_preemptions")

    def request(self, model: str, prompt_tokens: int) -> RequestTimer:
        """Start measuring one choice of a request."""
        self._prompt.labels(model).inc(prompt_tokens)
        return RequestTimer(self, model)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, text: str, field: str) -> None:
        gauge = Gauge(name, text, registry=self.registry)
        gauge.set_function(lambda: float(getattr(self._engine.status(), field)))


class RequestTimer:
    """Times and tokens of one choice of a request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._start = self._last = time.perf_counter()

    def record(self, chunk: Delta) -> None:
        """Record a chunk that was generated now."""
        now = time.perf_counter()
        is_first = self._last == self._start
        histogram = self._metrics._first if is_first else self._metrics._between
        histogram.labels(self._model).observe(now - self._last)
        self._last = now
        self._metrics._generated.labels(self._model).inc(len(chunk.tokens))
        if chunk.finish_reason is not None:
            self._metrics._done.labels(self._model, chunk.finish_reason.value).inc()
            self._metrics._whole.labels(self._model).observe(now - self._start)
