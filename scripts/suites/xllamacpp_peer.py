"""llama.cpp through the wheel xllamacpp: its server inside this process, ids in and ids out."""

import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.errors import UserError
from scripts.suites.gguf_peer import write_gguf
from scripts.suites.peer import (
    LLAMA_LOOKUP,
    LLAMA_LOOKUP_DEFAULTS,
    LLAMA_MODEL,
    LLAMA_PLAIN,
    LONGEST_COPIED,
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


def xllamacpp_peer(bench: "Bench", k: int) -> Peer:
    """Plain decoding, the draft model with k tokens, prompt lookup with k tokens and with llama.cpp's own sizes.
    UserError where it is not installed, or cannot run these weights."""
    try:
        import gguf  # noqa: F401
        import xllamacpp
    except ImportError as error:
        raise UserError(f"llama.cpp is left out ({error}): {REMEDY}") from error
    check_cpu("llama.cpp", bench)
    settings, threads = bench.settings, torch.get_num_threads()
    check_memory("llama.cpp", configs_of(bench, True), settings.dtype)
    kinds = xllamacpp.common_speculative_type
    cache = "fp32" if settings.dtype == "fp32" else "fp16"  # the latter is llama.cpp's own choice
    cache_kind = xllamacpp.ggml_type.GGML_TYPE_F32 if cache == "fp32" else xllamacpp.ggml_type.GGML_TYPE_F16

    def parameters(target: Path) -> Any:
        chosen = xllamacpp.CommonParams()
        chosen.model.path = str(target)
        chosen.n_ctx, chosen.n_parallel, chosen.n_gpu_layers = longest_text(bench, k), 1, 0
        for cpu in (chosen.cpuparams, chosen.cpuparams_batch):
            cpu.n_threads = threads
        chosen.cache_type_k = chosen.cache_type_v = cache_kind
        chosen.cache_prompt, chosen.cache_ram_mib, chosen.n_ctx_checkpoints = False, 0, 0
        chosen.fit_params = chosen.ui = False
        chosen.verbosity = 0
        return chosen

    def started(chosen: Any) -> Generate:
        try:
            server = xllamacpp.Server(chosen)
        except Exception as error:  # the binding raises whatever the library did
            raise UserError(f"llama.cpp is left out: it cannot load the weights ({error})") from error

        def run(ids: list[int]) -> Written:
            answer = server.handle_completions(
                {"prompt": ids, "n_predict": settings.max_new_tokens, "temperature": 0.0, "cache_prompt": False}
            )
            if "error" in answer:
                raise UserError(f"llama.cpp refuses a prompt: {answer['error']}: leave it out with --peers")
            written = [int(token) for token in re.findall(r"\d+", answer["choices"][0]["text"])]
            return Written(written, answer["timings"]["prompt_ms"] / 1000)

        return run

    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays mapped into memory
        target, draft = Path(folder) / "target.gguf", Path(folder) / "draft.gguf"
        write_gguf(target, bench.target.opened.checkpoint, settings.dtype, bench.stop_ids)
        ways = {LLAMA_PLAIN: started(parameters(target))}
        if bench.draft_model:
            write_gguf(draft, bench.draft_model.opened.checkpoint, settings.dtype, bench.stop_ids)
            chosen = parameters(target)
            chosen.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            drafting = chosen.speculative.draft
            drafting.mparams.path = str(draft)
            drafting.n_max, drafting.n_min, drafting.p_min, drafting.n_gpu_layers = k, 0, 0.0, 0
            drafting.cache_type_k = drafting.cache_type_v = cache_kind
            for cpu in (drafting.cpuparams, drafting.cpuparams_batch):
                cpu.n_threads = threads
            ways[LLAMA_MODEL] = started(chosen)
        for name in (LLAMA_LOOKUP, LLAMA_LOOKUP_DEFAULTS):
            chosen = parameters(target)
            chosen.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            if name == LLAMA_LOOKUP:
                chosen.speculative.ngram_simple.size_n, chosen.speculative.ngram_simple.size_m = LONGEST_COPIED, k
            ways[name] = started(chosen)
    features = " ".join(re.findall(r"(AVX\w*|AMX\w*|NEON|SVE) = 1", xllamacpp.get_system_info()))
    build = f"llama.cpp in xllamacpp {metadata.version('xllamacpp')} (built for {features or 'any processor'})"
    return Peer(build, settings.dtype, cache, ways)
