"""What `/metrics` tells: under vLLM's names where it is the same, and what only mlora has under its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Count
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..answers import Token
from ..engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_STEPS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_TOKENS = tuple(float(1 << power) for power in range(0, 18))


class Metrics:
    """Counts what is served. Its methods are called on the event loop."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._waiting: Counter[str] = Counter()  # adapters of requests without a token yet
        self._running: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)  # its `collect`

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        def count(name: str, text: str, *labels: str) -> Any:
            return Count(name, text, ["model_name", *labels], registry=self.registry)

        self._prompt = count("vllm:prompt_tokens", "Tokens of prompts.").labels(model)
        self._generated = count("vllm:generation_tokens", "Tokens of answers.").labels(model)
        self._queries = count("vllm:prefix_cache_queries", "Tokens of prompts, looked for in the cache.").labels(model)
        self._hits = count("vllm:prefix_cache_hits", "Of them, those that were there.").labels(model)
        self._success = count("vllm:request_success", "Answers that ended, by why.", "finished_reason")
        self._first = histogram("vllm:time_to_first_token_seconds", "From its coming to its first token.", _SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _STEPS)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of an answer, behind its first token.", _STEPS
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From its coming to its end.", _SECONDS)
        self._queued = histogram("vllm:request_queue_time_seconds", "From its coming until it ran.", _SECONDS)
        self._inference = histogram("vllm:request_inference_time_seconds", "From then to its end.", _SECONDS)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From then to its first token.", _SECONDS)
        self._decode = histogram("vllm:request_decode_time_seconds", "From its first token to its end.", _SECONDS)
        self._prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._adapters = count("mlora_adapter_requests", "Requests that used an adapter, by its name.", "adapter")
        self._refused = count("mlora_requests_refused", "Requests that were not served, by HTTP status.", "status")
        self._gone = count("mlora_requests_cancelled", "Requests whose client went away.").labels(model)
        self._loading = histogram("mlora_adapter_load_seconds", "Of loading at run time.", _SECONDS)

    def follow(self, names: Sequence[str]) -> Followed:
        """A request that is submitted, with its adapters."""
        for name in names:
            self._adapters.labels(self._model, name).inc()
        return Followed(self, names)

    def refused(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def cancelled(self) -> None:
        self._gone.inc()

    def loaded(self, seconds: float) -> None:
        self._loading.observe(seconds)

    def unloaded(self, name: str) -> None:
        """Its own series end."""
        self._adapters.remove(self._model, name)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """What the engine knows itself."""
        stats = self._engine.stats()

        def gauge(name: str, text: str, value: float) -> Any:
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], value)
            return family

        def counter(name: str, text: str, value: float) -> Any:
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], value)
            return family

        yield gauge("vllm:num_requests_running", "Answers that are being generated.", stats.running)
        yield gauge("vllm:num_requests_waiting", "Requests that wait.", stats.waiting)
        used = stats.reserved_tokens / max(1, stats.cache_tokens)
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache that is taken or promised; 1 is all.", used)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When this was so: adapters of requests that run, and of those that wait.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        most = str(self._engine.limits.adapters)
        lora.add_metric([most, ",".join(sorted(+self._waiting)), ",".join(sorted(+self._running))], time.time())
        yield lora
        yield gauge("mlora_adapters_in_use", "Adapters of requests that run or are about to.", stats.adapters)
        yield gauge("mlora_adapters_registered", "Adapters that are read when asked for.", stats.registered)
        yield gauge("mlora_adapter_host_bytes", "Of those of them that are loaded.", stats.host_bytes)
        yield counter("mlora_adapter_loads", "How often one of them was read.", stats.loads)
        yield counter("mlora_adapter_evictions", "How often one of them was dropped again.", stats.drops)
        yield counter("mlora_engine_steps", "Steps of the model.", stats.steps)
        yield counter("mlora_engine_restarts", "Workers that died and had others take over.", stats.restarts)
        yield gauge("mlora_engine_up", "Whether a worker is at work.", float(stats.alive))

    def users(self, name: str) -> tuple[int, int]:
        """How many requests that run use an adapter, and how many that wait."""
        return self._running[name], self._waiting[name]

    def waits(self, names: Sequence[str], step: int) -> None:
        for name in names:
            self._waiting[name] += step

    def runs(self, names: Sequence[str], step: int) -> None:
        for name in names:
            self._running[name] += step

    def observe_token(self, token: Token, since: float | None, now: float, came: float, first: float) -> None:
        """One of an answer. `since`: when the one before came. `first`: when the answer's first came."""
        if token.id is not None:
            self._generated.inc()
            if since is not None:
                self._between.observe(now - since)
        if token.finish_reason is None or token.usage is None:
            return
        self._success.labels(self._model, token.finish_reason).inc()
        self._whole.observe(now - came)
        self._decode.observe(now - first)
        self._inference.observe(now - came - token.usage.waited)
        if token.index == 0:
            self._queued.observe(token.usage.waited)
            self._prefill.observe(first - came - token.usage.waited)
        self._answers.observe(token.usage.completion)
        if token.usage.completion > 1:
            self._per_token.observe((now - first) / (token.usage.completion - 1))

    def observe_first(self, seconds: float) -> None:
        self._first.observe(seconds)

    def observe_prompt(self, tokens: int, cached: int) -> None:
        self._prompt.inc(tokens)
        self._prompts.observe(tokens)
        self._queries.inc(tokens)
        self._hits.inc(cached)


class Followed:
    """A request on its way, for `Metrics`."""

    def __init__(self, metrics: Metrics, names: Sequence[str]) -> None:
        self._metrics = metrics
        self._names = names
        self._came = time.monotonic()
        self._times: dict[int, tuple[float, float]] = {}  # answer -> when its first and its last token came
        self._over = False
        self.first: float | None = None  # when the first token came
        metrics.waits(names, 1)

    @property
    def came(self) -> float:
        return self._came

    def token(self, token: Token) -> None:
        now = time.monotonic()
        metrics = self._metrics
        if self.first is None:
            self.first = now
            metrics.observe_first(now - self._came)
            metrics.waits(self._names, -1)
            metrics.runs(self._names, 1)
        first, last = self._times.get(token.index, (now, None))
        metrics.observe_token(token, last, now, self._came, first)
        self._times[token.index] = first, now
        if token.usage is not None and token.index == 0:
            metrics.observe_prompt(token.usage.prompt, token.usage.cached)

    def end(self) -> None:
        """However it ended."""
        if self._over:
            return
        self._over = True
        if self.first is None:
            self._metrics.waits(self._names, -1)
        else:
            self._metrics.runs(self._names, -1)
