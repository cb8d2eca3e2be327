"""Prometheus metrics, with the names that vLLM's routers and Tenstorrent's benchmark read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from models.speculative.engine import Engine
    from models.speculative.stats import Round

disable_created_metrics()  # a series beside every counter, which nobody reads
CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """What a server counts; every series has the label model_name.

    Args:
        model: the served model's name.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        labels = ("model_name",)

        def counter(name: str, about: str) -> Counter:
            return Counter(name, about, labels, registry=self.registry).labels(model)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, labels, registry=self.registry).labels(model)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, labels, buckets=buckets, registry=self.registry).labels(model)

        self.running = gauge("vllm:num_requests_running", "Texts that have a slot")
        self.waiting = gauge("vllm:num_requests_waiting", "Texts that wait for a slot")
        self.cache = gauge("vllm:gpu_cache_usage_perc", "Used share of the KV cache's positions, 0 to 1")
        self.cache_new_name = gauge("vllm:kv_cache_usage_perc", "Used share of the KV cache's positions, 0 to 1")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts that were read")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens that were written")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Rounds that drafted")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens")
        self.accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        self.degraded = counter("speculative_drafter_failures", "Texts that lost their drafter to an error")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to first token", FIRST_TOKEN_S)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "A step's seconds per token", TOKEN_S)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to last token", REQUEST_S)
        per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose token at this position was accepted, from 0",
            ("model_name", "position"),
            registry=self.registry,
        )
        ended = Counter(
            "vllm:request_success",
            "Texts that have ended, by reason",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._model, self._per_position, self._ended = model, per_position, ended

    def round(self, round: Round) -> None:
        """A round has been decided."""
        if not round.drafted:
            return
        self.drafts.inc()
        self.draft_tokens.inc(round.drafted)
        self.accepted_tokens.inc(round.accepted)
        for position in range(round.accepted):
            self._per_position.labels(self._model, str(position)).inc()

    def ended(self, reason: str) -> None:
        """A text has ended; reason as OpenAI names it, or "abort"."""
        self._ended.labels(self._model, reason).inc()

    def observe(self, engine: Engine) -> None:
        """What is under way now."""
        limits, running = engine.target.limits, engine.running
        held = sum(len(sequence.tokens) for sequence in running)
        share = held / (limits.pool or limits.slots * limits.positions)
        self.running.set(len(running))
        self.waiting.set(len(engine.waiting))
        self.cache.set(share)
        self.cache_new_name.set(share)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self.registry)
