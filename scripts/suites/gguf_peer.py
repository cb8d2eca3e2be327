"""llama.cpp through llama-cpp-python, on this project's weights written as a GGUF file without a vocabulary.

Both packages are optional: `pip install llama-cpp-python gguf` (the first is compiled, which takes minutes).
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.errors import UserError
from models.llama.checkpoint import Checkpoint
from models.llama.config import LlamaConfig
from models.llama.rope import inverse_frequencies

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
Generate = Callable[[list[int]], list[int]]


def llama_cpp_runners(bench: "Bench", k: int) -> tuple[Generate, Generate, Generate]:
    """llama.cpp's plain decoding, its decoding with the draft model and with prompt lookup of k tokens, as functions
    from prompt ids to new ids. UserError where it is not installed, or cannot run these weights."""
    try:
        import gguf  # noqa: F401
        import numpy
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
    except ImportError as error:
        raise UserError(
            f"llama.cpp is left out ({error}): `pip install llama-cpp-python gguf` to have it take part"
        ) from error
    settings = bench.settings
    if settings.device != "cpu":
        raise UserError(f"llama.cpp is left out: it is compared on the CPU only, not on {settings.device}")
    longest = max(len(prompt.ids) for prompt in bench.prompts) + settings.max_new_tokens + k + 1
    threads = torch.get_num_threads()

    def load(path: Path, draft_model=None) -> Llama:
        cache = 0 if settings.dtype == "fp32" else 1  # GGML's F32 and F16, the latter being llama.cpp's own choice
        options = {"n_ctx": longest, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        try:
            return Llama(str(path), draft_model=draft_model, type_k=cache, type_v=cache, **options)
        except ValueError as error:
            raise UserError(f"llama.cpp is left out: it cannot load the weights ({error})") from error

    def written(llama: Llama, ids: list[int]) -> list[int]:
        llama.reset()  # or it would find the prompt in its cache
        tokens: list[int] = []
        for token in llama.generate(ids, temp=0.0):
            tokens.append(int(token))
            if len(tokens) == settings.max_new_tokens or token in bench.stop_ids:
                break
        return tokens

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
        write_gguf(draft, bench.draft.opened.checkpoint, settings.dtype)
        plain = load(target)
        lookup = load(target, LlamaPromptLookupDecoding(num_pred_tokens=k))
        assisted = load(target, ModelDraft(load(draft)))
    return tuple(lambda ids, llama=llama: written(llama, ids) for llama in (plain, assisted, lookup))


def write_gguf(path: Path, checkpoint: Checkpoint, dtype: str) -> None:
    """Write a checkpoint as GGUF; matrices in the dtype ("bf16", "fp16" or "fp32"), norms in fp32."""
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
    writer.add_tokenizer_model("no_vocab")
    if config.rope_scaling is not None:
        factors = inverse_frequencies(dataclasses.replace(config, rope_scaling=None)) / inverse_frequencies(config)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name in config.tensor_shapes():
        tensor = _interleaved(config, name, checkpoint[name].float())
        matrix = tensor.ndim == 2
        data = gguf.quantize(tensor.numpy(), kind if matrix else kinds.F32)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind if matrix else kinds.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
