"""Prometheus metrics, with the names that vLLM's routers and Tenstorrent's benchmark read.

The engine's thread counts in plain numbers, which cost a step next to nothing; series are made of them when somebody
asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from models.speculative.engine import Engine
    from models.speculative.stats import Round

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
TRANSFORM = tuple(tenth / 10 for tenth in range(1, 10))
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Durations:
    """A histogram, of seconds if nothing else is said.

    Args:
        bounds: upper ends of its buckets, ascending; one without an end follows.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """(upper end and how many were not longer, of each bucket; the sum), as Prometheus has them."""
        counts, total, found = list(self._counts), 0, []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            total += count
            found.append((floatToGoString(bound), float(total)))
        return found, self._sum


class Metrics(Collector):
    """What a server counts; every series has the label model_name. One thread counts, any thread may read.

    Args:
        model: the served model's name.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.running = self.waiting = 0  # texts
        self.cache = 0.0  # used share
        self.prompt_tokens = self.generation_tokens = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = self.degraded = 0
        self.first_token, self.between_tokens = Durations(FIRST_TOKEN_S), Durations(TOKEN_S)
        self.whole = Durations(REQUEST_S)
        self.audits: Counter[str] | None = None  # verdicts; None where nothing is audited
        self.audited_tokens = 0
        self.transforms = Durations(TRANSFORM)
        self._per_position: Counter[int] = Counter()
        self._ended: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def round(self, round: Round) -> None:
        """A round has been decided."""
        if not round.drafted:
            return
        self.drafts += 1
        self.draft_tokens += round.drafted
        self.accepted_tokens += round.accepted
        for position in range(round.accepted):
            self._per_position[position] += 1

    def ended(self, reason: str) -> None:
        """A text has ended; reason as OpenAI names it, or "abort"."""
        self._ended[reason] += 1

    def observe(self, engine: Engine) -> None:
        """What is under way now."""
        limits, running = engine.target.limits, engine.running
        held = sum(len(sequence.tokens) for sequence in running)
        self.running, self.waiting = len(running), len(engine.waiting)
        self.cache = held / (limits.pool or limits.slots * limits.positions)

    def collect(self) -> Iterator[Metric]:
        """The series, as of `prometheus_client`."""
        cache = "Used share of the KV cache's positions, 0 to 1"
        yield self._gauge("vllm:num_requests_running", "Texts that have a slot", self.running)
        yield self._gauge("vllm:num_requests_waiting", "Texts that wait for a slot", self.waiting)
        yield self._gauge("vllm:gpu_cache_usage_perc", cache, self.cache)
        yield self._gauge("vllm:kv_cache_usage_perc", cache, self.cache)
        for name, about, value in (
            ("vllm:prompt_tokens", "Tokens of prompts that were read", self.prompt_tokens),
            ("vllm:generation_tokens", "Tokens that were written", self.generation_tokens),
            ("vllm:spec_decode_num_drafts", "Rounds that drafted", self.drafts),
            ("vllm:spec_decode_num_draft_tokens", "Drafted tokens", self.draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted", self.accepted_tokens),
            ("speculative_drafter_failures", "Texts that lost their drafter to an error", self.degraded),
        ):
            yield self._counter(name, about, {"": value})
        yield self._durations("vllm:time_to_first_token_seconds", "From arrival to first token", self.first_token)
        yield self._durations("vllm:inter_token_latency_seconds", "A step's seconds per token", self.between_tokens)
        yield self._durations("vllm:e2e_request_latency_seconds", "From arrival to last token", self.whole)
        about = "Drafts whose token at this position was accepted, from 0"
        per_position = {str(position): count for position, count in sorted(self._per_position.copy().items())}
        yield self._counter("vllm:spec_decode_num_accepted_tokens_per_pos", about, per_position, "position")
        about = "Texts that have ended, by reason"
        yield self._counter("vllm:request_success", about, self._ended.copy(), "finished_reason")
        if self.audits is not None:
            about = "Texts that were to be replayed against plain decoding, by what was found"
            yield self._counter("speculative_audited_texts", about, self.audits.copy(), "verdict")
            yield self._counter("speculative_audited_tokens", "Tokens that were replayed", {"": self.audited_tokens})
            about = "Sampled tokens by the target's distribution: uniform where they follow it"
            yield self._durations("speculative_audit_transform", about, self.transforms)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, about, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, about: str, values: dict[str, int], label: str = "") -> Metric:
        """values: by the label's value."""
        family = CounterMetricFamily(name, about, labels=("model_name", label) if label else ("model_name",))
        for key, value in values.items():
            family.add_metric((self._model, key) if label else (self._model,), value)
        return family

    def _durations(self, name: str, about: str, durations: Durations) -> Metric:
        family = HistogramMetricFamily(name, about, labels=("model_name",))
        family.add_metric((self._model,), *durations.buckets())
        return family
