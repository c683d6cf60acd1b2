"""Figures for Prometheus; a registry of the server's own, so that two may live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Requests, their time, the queue and the batches."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["path", "status"]
        self._requests = Counter("blip2_requests", "Requests answered", labels, registry=self.registry)
        self._seconds = Histogram(
            "blip2_request_seconds",
            "Time from a request's head to its answer's end",
            ["path"],
            registry=self.registry,
            buckets=(0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120),
        )
        self._batches = Histogram(
            "blip2_batch_size",
            "Items that went through the model together",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self._waiting = Gauge("blip2_queue_waiting", "Requests that wait for the model", registry=self.registry)
        self._open = Gauge("blip2_requests_open", "Requests being answered", registry=self.registry)
        self.tokens = Counter("blip2_tokens", "Tokens read and written", ["kind"], registry=self.registry)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Where the length of the queue is read."""
        self._waiting.set_function(waiting)

    def watch_open(self, count: Callable[[], int]) -> None:
        """Where the number of requests being answered is read."""
        self._open.set_function(count)

    def batch(self, size: int) -> None:
        """A batch went to the model."""
        self._batches.observe(size)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self.registry)
