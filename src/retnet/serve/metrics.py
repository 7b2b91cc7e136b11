"""Metrics for Prometheus: requests, tokens, time to first token, and what runs and waits now."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from retnet.serve.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """The numbers of one server.

    Args:
        gate: knows what runs and waits.
    """

    def __init__(self, gate: Gate) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "retnet_requests", "Answers by path and status of HTTP", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "retnet_prompt_tokens", "Tokens of prompts, cached ones included", registry=registry
        )
        self.cached_tokens = Counter(
            "retnet_cached_tokens", "Tokens of prompts that a kept state spared", registry=registry
        )
        self.generated_tokens = Counter("retnet_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter("retnet_cancelled", "Requests whose client left", registry=registry)
        self.first_token = Histogram(
            "retnet_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "retnet_request_seconds", "From a request to its last token", buckets=_SECONDS, registry=registry
        )
        running = Gauge("retnet_texts_running", "Texts that are generated now", registry=registry)
        running.set_function(lambda: gate.running)
        waiting = Gauge("retnet_texts_waiting", "Texts that wait for a slot", registry=registry)
        waiting.set_function(lambda: gate.waiting)
        self.sessions = Gauge("retnet_sessions", "Sessions that are kept", registry=registry)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
