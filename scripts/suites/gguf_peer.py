"""This project's weights as a GGUF file, and llama.cpp on it through llama-cpp-python.

That package is compiled where it is installed, which takes minutes; `xllamacpp_peer` needs no compiler.
"""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.gguf_checkpoint import AnyCheckpoint
from models.llama.rope import inverse_frequencies
from models.torch_llama.model import DTYPES
from scripts.suites.peer import (
    LLAMA_LOOKUP,
    LLAMA_MODEL,
    LLAMA_PLAIN,
    Peer,
    Written,
    check_cpu,
    check_memory,
    configs_of,
    longest_text,
)

if TYPE_CHECKING:
    from scripts.suites.bench import Bench

NAMES = {  # of a layer's tensors in GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TOKENIZER = "rwkv"  # of llama.cpp's kinds the one that needs no merges and has no end of text but a declared one


def llama_cpp_python_peer(bench: "Bench", k: int) -> Peer:
    """Plain decoding, the draft model, and prompt lookup of k tokens. UserError where it is not installed, or cannot
    run these weights."""
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
    except ImportError as error:
        raise UserError(
            f"llama.cpp is left out ({error}): `pip install llama-cpp-python gguf` to have it take part"
        ) from error
    check_cpu("llama.cpp", bench)
    settings, longest = bench.settings, longest_text(bench, k)
    check_memory("llama.cpp", configs_of(bench, True), settings.dtype)
    threads = torch.get_num_threads()

    def load(path: Path, draft_model=None) -> Llama:
        cache = 0 if settings.dtype == "fp32" else 1  # GGML's F32 and F16, the latter being llama.cpp's own choice
        options = {"n_ctx": longest, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        try:
            return Llama(str(path), draft_model=draft_model, type_k=cache, type_v=cache, **options)
        except ValueError as error:
            raise UserError(f"llama.cpp is left out: it cannot load the weights ({error})") from error

    def written(llama: Llama, ids: list[int]) -> Written:
        llama.reset()  # or it would find the prompt in its cache
        tokens: list[int] = []
        for token in llama.generate(ids, temp=0.0):
            tokens.append(int(token))
            if len(tokens) == settings.max_new_tokens or token in bench.stop_ids:
                break
        return Written(tokens)

    class ModelDraft(LlamaDraftModel):
        """k tokens of another model, which goes on from what its cache shares with the text."""

        def __init__(self, llama: Llama) -> None:
            self.llama = llama

        def __call__(self, input_ids, /, **_):
            drafted = itertools.islice(self.llama.generate(input_ids.tolist(), temp=0.0), k)
            return numpy.fromiter(drafted, input_ids.dtype)

    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays mapped into memory
        target, draft = Path(folder) / "target.gguf", Path(folder) / "draft.gguf"
        write_gguf(target, bench.target.opened.checkpoint, settings.dtype)
        llamas = {LLAMA_PLAIN: load(target), LLAMA_LOOKUP: load(target, LlamaPromptLookupDecoding(num_pred_tokens=k))}
        if bench.draft_model:
            write_gguf(draft, bench.draft_model.opened.checkpoint, settings.dtype)
            llamas[LLAMA_MODEL] = load(target, ModelDraft(load(draft)))
    ways = {name: lambda ids, llama=llama: written(llama, ids) for name, llama in llamas.items()}
    cache = "fp32" if settings.dtype == "fp32" else "fp16"
    return Peer(f"llama.cpp in llama-cpp-python {metadata.version('llama-cpp-python')}", settings.dtype, cache, ways)


def write_gguf(path: Path, checkpoint: AnyCheckpoint, dtype: str, stop_ids: Sequence[int] | None = None) -> None:
    """Write a checkpoint as GGUF; matrices in the dtype ("bf16", "fp16" or "fp32"), norms in fp32.

    With stop_ids (of which there may be none) the file has a vocabulary of made-up tokens, each once, that ends texts
    there and nowhere else: for programs that do not run without. Raises UserError for more than a file can declare.
    """
    import gguf

    config = checkpoint.config
    kinds = gguf.GGMLQuantizationType
    kind = {"bf16": kinds.BF16, "fp16": kinds.F16, "fp32": kinds.F32}[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if stop_ids is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, config.vocab_size, stop_ids)
    # Tensor by tensor: nothing else would fit beside the models that are loaded.
    names = {name: gguf_name(name) for name in config.tensor_shapes()}
    factors = None
    if config.rope_scaling is not None:
        plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
        factors = (plain / inverse_frequencies(config)).numpy()
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape in config.tensor_shapes().items():
        each = kind if len(shape) == 2 else kinds.F32
        size = math.prod(shape) * (4 if each == kinds.F32 else 2)
        writer.add_tensor_info(names[name], shape, numpy.dtype(numpy.float32), size, raw_dtype=each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name in names:
        tensor = _interleaved(config, name, checkpoint[name])
        tensor = tensor.to(DTYPES[dtype] if tensor.ndim == 2 else torch.float32).contiguous()
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()


def made_up_token(id: int) -> str:
    """The text of a token in a made-up vocabulary."""
    return f"t{id}"


def _add_vocabulary(writer: Any, size: int, stop_ids: Sequence[int]) -> None:
    declare = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(stop_ids) > len(declare):
        raise UserError(
            f"llama.cpp is left out: a GGUF file declares {len(declare)} ends of a text, this model has "
            f"{len(stop_ids)}: use --random-prompts 10x64"
        )
    writer.add_tokenizer_model(TOKENIZER)
    writer.add_token_list([made_up_token(id) for id in range(size)])
    writer.add_token_types([1] * size)
    writer.add_add_bos_token(False)
    for add, id in zip(declare, stop_ids, strict=False):
        add(id)


def gguf_name(name: str) -> str:
    """A Hugging Face tensor's name in GGUF."""
    stem = name.removesuffix(".weight")
    if stem in OTHER_NAMES:
        return OTHER_NAMES[stem] + ".weight"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.weight"


def _interleaved(config: LlamaConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of a query or key matrix in GGUF's order: it rotates neighbours, Hugging Face the halves of a head."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor.contiguous()
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.view(heads, 2, config.head_dim // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)
