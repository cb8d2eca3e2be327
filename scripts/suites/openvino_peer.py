"""OpenVINO through the wheel openvino-genai, on the CPU, ids in and ids out."""

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.errors import UserError
from scripts.suites.openvino_network import write_network, write_tokenizer
from scripts.suites.peer import (
    LONGEST_COPIED,
    OPENVINO_LOOKUP,
    OPENVINO_MODEL,
    OPENVINO_PLAIN,
    REMEDY,
    Generate,
    Peer,
    Written,
    check_cpu,
    check_memory,
    configs_of,
    longest_text,
)

if TYPE_CHECKING:
    from scripts.suites.bench import Bench

HINTS = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}  # a dtype, as OpenVINO calls it


def openvino_peer(bench: "Bench", k: int) -> Peer:
    """Plain decoding, prompt lookup and the draft model, both with k tokens. UserError where it is not installed, or
    this processor does not compute in the dtype with it."""
    try:
        import numpy
        import openvino
        import openvino_genai
        import openvino_tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(f"OpenVINO is left out ({error}): {REMEDY}") from error
    check_cpu("OpenVINO", bench)
    settings, stops = bench.settings, set(bench.stop_ids)
    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if settings.dtype.upper() not in capable:
        raise UserError(
            f"OpenVINO is left out: it does not compute in {settings.dtype} on this processor: try --dtype fp32"
        )
    properties = {
        "INFERENCE_PRECISION_HINT": HINTS[settings.dtype],
        "KV_CACHE_PRECISION": HINTS[settings.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # or it would find the prompt in its cache
    scheduler.max_num_batched_tokens = max(longest_text(bench, k), 256)
    scheduler.max_num_seqs = 1

    def loaded(target: Path, drafting: dict[str, Any], **chosen: Any) -> Generate:
        try:
            pipeline = openvino_genai.LLMPipeline(
                str(target), "CPU", scheduler_config=scheduler, **drafting, **properties
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"OpenVINO is left out: it cannot load the weights ({reason})") from error
        config = openvino_genai.GenerationConfig()
        config.do_sample, config.apply_chat_template = False, False
        config.max_new_tokens, config.ignore_eos = settings.max_new_tokens, not stops
        config.set_eos_token_id(min(stops, default=0))
        config.stop_token_ids = stops or {0}
        for name, value in chosen.items():
            setattr(config, name, value)

        def run(ids: list[int]) -> Written:
            row = numpy.array([ids], numpy.int64)
            inputs = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(numpy.ones_like(row)))
            answer = pipeline.generate(inputs, config)
            return Written(list(answer.tokens[0]), answer.perf_metrics.get_ttft().mean / 1000)

        return run

    ways: dict[str, Generate] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as name:  # what is loaded stays mapped into memory
        folder = Path(name)
        write_network(folder / "target", bench.target.opened.checkpoint, settings.dtype)
        check_memory(OPENVINO_PLAIN, configs_of(bench, False), settings.dtype)
        ways[OPENVINO_PLAIN] = loaded(folder / "target", {})
        try:
            check_memory(OPENVINO_LOOKUP, configs_of(bench, False), settings.dtype)
            ways[OPENVINO_LOOKUP] = loaded(
                folder / "target", {"prompt_lookup": True}, num_assistant_tokens=k, max_ngram_size=LONGEST_COPIED
            )
            if bench.draft_model:
                check_memory(OPENVINO_MODEL, configs_of(bench, True), settings.dtype)
                write_network(folder / "draft", bench.draft_model.opened.checkpoint, settings.dtype)
                for part, opened in (("target", bench.target.opened), ("draft", bench.draft_model.opened)):
                    write_tokenizer(folder / part, opened.checkpoint.config.vocab_size)
                draft = openvino_genai.draft_model(str(folder / "draft"), "CPU", **properties)
                ways[OPENVINO_MODEL] = loaded(folder / "target", {"draft_model": draft}, num_assistant_tokens=k)
        except UserError as error:
            notes.append(str(error))
    version = f"OpenVINO in openvino-genai {metadata.version('openvino-genai')}"
    return Peer(version, settings.dtype, settings.dtype, ways, notes)
