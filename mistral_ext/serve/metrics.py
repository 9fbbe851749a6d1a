"""Counts metrics for Prometheus. Most of them have vLLM's names, with our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mistral_ext.engine.engine import Load
from mistral_ext.engine.request import Completion

_PREFIX = "mistral_ext_"

# The bounds of buckets of seconds. They range from a step of a small model to a long prompt on a
# CPU.
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)  # the bounds of buckets of tokens


class Metrics:
    """Counts events in the server. Any thread may call the methods.

    Args:
        load: a function that returns the current load of the engine.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(load))

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _LATENCY) -> Histogram:
            return Histogram(_PREFIX + name, text, registry=self._registry, buckets=buckets)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache")
        self._generated = counter("generation_tokens", "Tokens generated")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens guessed and checked")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Guesses that were right")
        self._success = counter("request_success", "Completions that ended", ("finished_reason",))
        self._answers = counter("http_requests", "Answers", ("path", "status"))
        self._moderations = counter(
            "moderations", "Contents that the model has judged", ("content", "category")
        )
        self._broken_off = counter("request_aborts", "Requests broken off", ("reason",))
        self._first = histogram("time_to_first_token_seconds", "From arrival to first token")
        self._next = histogram("inter_token_latency_seconds", "Between two tokens of a completion")
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to last token")
        self._queue = histogram("request_queue_time_seconds", "From arrival to first step")
        self._prompt_length = histogram("request_prompt_tokens", "Prompt's length", _TOKENS)
        self._length = histogram("request_generation_tokens", "Completion's length", _TOKENS)

    def first_token(self, seconds: float) -> None:
        """Counts the first token of a completion, `seconds` after its request arrived."""
        self._first.observe(seconds)
        self._generated.inc()

    def next_token(self, seconds: float) -> None:
        """Counts another token of a completion, `seconds` after the token before it."""
        self._next.observe(seconds)
        self._generated.inc()

    def ended(self, completion: Completion, prompt_tokens: int, seconds: float) -> None:
        """Counts a completion that has ended, `seconds` after its request arrived."""
        self._success.labels(completion.finish_reason).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(completion.timing.cached_tokens)
        self._drafted.inc(completion.timing.drafted_tokens)
        self._accepted.inc(completion.timing.accepted_tokens)
        self._prompt_length.observe(prompt_tokens)
        self._length.observe(len(completion.token_ids))
        self._queue.observe(completion.timing.queue_seconds)
        self._whole.observe(seconds)

    def answered(self, path: str, status: int) -> None:
        """Counts an answer with its status."""
        self._answers.labels(path, str(status)).inc()

    def moderated(self, content: str, category: str) -> None:
        """Counts a judgement of the model. `content` is "input" (a prompt), "output" (a completion)
        or "request" (a content of /v1/moderations)."""
        self._moderations.labels(content, category).inc()

    def broken_off(self, reason: str) -> None:
        """Counts a request that has ended without its answer."""
        self._broken_off.labels(reason).inc()

    def render(self) -> tuple[bytes, str]:
        """Returns all metrics as text, and the content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _LoadCollector:
    """Reads the load of the engine when Prometheus reads the metrics."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        load = self._load()
        for name, text, value in (
            ("num_requests_running", "Completions that are read or generate", load.running),
            ("num_requests_waiting", "Completions that wait for room", load.waiting),
            ("kv_cache_usage_perc", "Share of the cache in use, 0 to 1", load.cache_share),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        name, text = "num_preemptions", "Completions that lost their room and began again"
        yield CounterMetricFamily(_PREFIX + name, text, value=load.preemptions)
