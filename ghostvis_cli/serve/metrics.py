"""Prometheus metrics, under SGLang's names where they mean the same, so that its dashboards work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ghostvis_cli.engines.base import Chunk, Usage

# SGLang's bucket bounds, in seconds.
FIRST_TOKEN_S = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
REQUEST_S = (*FIRST_TOKEN_S, 600, 1200, 1800, 2400)
TOKEN_GAP_S = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1,
               0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8)  # fmt: skip


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.model = ""  # the label model_name; known once the model has been loaded

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sglang:{name}", text, ["model_name", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"sglang:{name}", text, ["model_name"], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(
                f"sglang:{name}", text, ["model_name", *labels], registry=registry, buckets=buckets
            )

        self.running = gauge("num_running_reqs", "Requests whose answer has begun.")
        self.queued = gauge("num_queue_reqs", "Requests taken in whose first token has not come.")
        self.requests = counter("num_requests_total", "Requests answered to the end.", "is_streaming")
        self.aborted = counter(
            "num_aborted_requests_total", "Requests given up: client gone, or server stopping."
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens.", "is_streaming")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated.", "is_streaming")
        self.cached_tokens = counter(
            "cached_tokens_total", "Prompt tokens found in the cache.", "cache_source"
        )
        self.first_token_s = histogram(
            "time_to_first_token_seconds",
            "From the request to its first token.",
            FIRST_TOKEN_S,
            "is_streaming",
        )
        self.token_gap_s = histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", TOKEN_GAP_S
        )
        self.request_s = histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", REQUEST_S, "is_streaming"
        )
        self.responses = Counter(
            "ghostvis:http_responses_total", "Responses by status.", ["status"], registry=registry
        )

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    @contextmanager
    def request(self, *, streaming: bool) -> Iterator["RequestMetrics"]:
        watched = RequestMetrics(self, streaming)
        try:
            yield watched
        finally:
            watched.leave()


class RequestMetrics:
    """The metrics of one request: queued, running, finished."""

    def __init__(self, metrics: Metrics, streaming: bool) -> None:
        self.metrics, self.model = metrics, metrics.model
        self.streaming = "true" if streaming else "false"
        self.started_s = time.perf_counter()
        self.last_token_s: dict[int, float] = {}
        self.token_gap_s = metrics.token_gap_s.labels(self.model)  # looked up once, not for each token
        self.place = metrics.queued.labels(self.model)
        self.place.inc()

    def saw(self, index: int, chunk: Chunk) -> None:
        """Note a chunk of choice `index`. Several tokens that come together share the gap before them."""
        if not chunk.token_ids:
            return
        now_s = time.perf_counter()
        if not self.last_token_s:
            self._move_to_running()
            self.metrics.first_token_s.labels(self.model, self.streaming).observe(now_s - self.started_s)
        if index in self.last_token_s:
            gap_s = (now_s - self.last_token_s[index]) / len(chunk.token_ids)
            for _ in chunk.token_ids:
                self.token_gap_s.observe(gap_s)
        self.last_token_s[index] = now_s

    def finished(self, total: Usage) -> None:
        metrics, labels = self.metrics, (self.model, self.streaming)
        metrics.requests.labels(*labels).inc()
        metrics.prompt_tokens.labels(*labels).inc(total.prompt_tokens)
        metrics.generation_tokens.labels(*labels).inc(total.completion_tokens)
        metrics.cached_tokens.labels(self.model, "total").inc(total.cached_tokens or 0)
        metrics.request_s.labels(*labels).observe(time.perf_counter() - self.started_s)

    def aborted(self) -> None:
        self.metrics.aborted.labels(self.model).inc()

    def leave(self) -> None:
        self.place.dec()

    def _move_to_running(self) -> None:
        self.place.dec()
        self.place = self.metrics.running.labels(self.model)
        self.place.inc()
