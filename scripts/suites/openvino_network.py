"""A Llama as an OpenVINO model: this project's weights in the dtype asked for, in the form that openvino-genai runs.

Its reader of GGUF files takes neither bf16 nor fp32 matrices and no scaled rotary frequencies, so that weights would
not be equal. The form is the one of models exported for it: ids, mask, positions and beam order in, logits out, keys
and values as states of the model.
"""

from pathlib import Path
from typing import Any

import numpy
import torch

from models.llama.gguf_checkpoint import AnyCheckpoint
from models.llama.rope import inverse_frequencies
from models.torch_llama.model import DTYPES
from scripts.suites.gguf_peer import made_up_token

# B sequences, n rows, Q query heads, G key and value heads, D numbers a head


def write_network(folder: Path, checkpoint: AnyCheckpoint, dtype: str) -> None:
    """Write openvino_model.xml and .bin to a new folder. Matrices in the dtype, all else in fp32."""
    import openvino

    folder.mkdir()
    openvino.save_model(_Builder(checkpoint, dtype).model(), folder / "openvino_model.xml", compress_to_fp16=False)


class _Builder:
    def __init__(self, checkpoint: AnyCheckpoint, dtype: str) -> None:
        import openvino
        from openvino import opset13

        self.openvino, self.op = openvino, opset13
        self.checkpoint, self.config, self.dtype = checkpoint, checkpoint.config, dtype
        self.states: list[Any] = []

    def model(self) -> Any:
        op, i64 = self.op, numpy.int64
        ids, mask, positions = (self._input([-1, -1], i64, n) for n in ("input_ids", "attention_mask", "position_ids"))
        beams = self._input([-1], numpy.int32, "beam_idx")
        table = self._matrix("model.embed_tokens.weight")
        hidden = op.gather(table, op.convert(ids, "i32"), self._ints(0))
        cos, sin = self._rotation(positions)
        batch = op.gather(op.shape_of(ids), self._ints([0]), self._ints(0))
        allowed = self._allowed(ids, mask)
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, name + "input_layernorm.weight")
            hidden = op.add(hidden, self._attention(layer, normed, cos, sin, allowed, batch, beams))
            normed = self._norm(hidden, name + "post_attention_layernorm.weight")
            gate = op.swish(self._linear(normed, name + "mlp.gate_proj.weight"))
            up = self._linear(normed, name + "mlp.up_proj.weight")
            hidden = op.add(hidden, self._linear(op.multiply(gate, up), name + "mlp.down_proj.weight"))
        normed = self._norm(hidden, "model.norm.weight")
        tied = self.config.tie_word_embeddings
        head = table if tied else self._matrix("lm_head.weight")
        logits = op.result(op.matmul(normed, head, transpose_a=False, transpose_b=True))
        logits.get_output_tensor(0).set_names({"logits"})
        return self.openvino.Model([logits], self.states, [ids, mask, positions, beams], "llama")

    # ---- parts ----
    def _attention(self, layer: int, x: Any, cos: Any, sin: Any, allowed: Any, batch: Any, beams: Any) -> Any:
        op, config, name = self.op, self.config, f"model.layers.{layer}.self_attn."
        dim, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads

        def split(part: str, count: int) -> Any:
            rows = op.reshape(self._linear(x, f"{name}{part}.weight"), self._ints([0, 0, count, dim]), True)
            return op.transpose(rows, self._ints([0, 2, 1, 3]))  # [B, count, n, D]

        q, k, v = split("q_proj", heads), split("k_proj", groups), split("v_proj", groups)
        q, k = self._rotated(q, cos, sin), self._rotated(k, cos, sin)
        k, v = (self._cached(f"{layer}.{part}", new, batch, beams) for part, new in (("key", k), ("value", v)))
        if heads != groups:
            k, v = self._repeated(k, heads // groups), self._repeated(v, heads // groups)
        mixed = op.scaled_dot_product_attention(q, k, v, allowed)
        rows = op.reshape(op.transpose(mixed, self._ints([0, 2, 1, 3])), self._ints([0, 0, heads * dim]), True)
        return self._linear(rows, name + "o_proj.weight")

    def _cached(self, name: str, new: Any, batch: Any, beams: Any) -> Any:
        """What was there before, in the order of the beams, and what is new."""
        from openvino.op.util import Variable, VariableInfo

        op, info = self.op, VariableInfo()
        info.data_shape = self.openvino.PartialShape([-1, self.config.num_key_value_heads, -1, self.config.head_dim])
        info.data_type = self.openvino.Type.f32
        info.variable_id = f"past_key_values.{name}present.{name}"
        variable = Variable(info)
        sizes = [self._ints([n]) for n in (self.config.num_key_value_heads, 0, self.config.head_dim)]
        empty = op.broadcast(op.constant(0.0, numpy.float32), op.concat([batch, *sizes], 0))
        past = op.gather(op.read_value(empty, variable), beams, self._ints(0))
        both = op.concat([past, new], 2)
        self.states.append(op.assign(both, variable))
        return both

    def _repeated(self, x: Any, times: int) -> Any:
        """Every key and value head for the query heads that share it: [B, G, S, D] to [B, Q, S, D]."""
        op, heads, dim = self.op, self.config.num_attention_heads, self.config.head_dim
        wide = op.broadcast(op.unsqueeze(x, self._ints(2)), self._ints([1, 1, times, 1, 1]), None, "BIDIRECTIONAL")
        return op.reshape(wide, self._ints([0, heads, -1, dim]), True)

    def _rotation(self, positions: Any) -> tuple[Any, Any]:
        """cos and sin of every position, [B, 1, n, D]."""
        op = self.op
        frequencies = op.constant(inverse_frequencies(self.config).numpy().reshape(1, -1, 1))
        place = op.convert(op.unsqueeze(positions, self._ints(1)), "f32")  # [B, 1, n]
        angles = op.transpose(op.matmul(frequencies, place, False, False), self._ints([0, 2, 1]))  # [B, n, D / 2]
        angles = op.concat([angles, angles], -1)
        return tuple(op.unsqueeze(function(angles), self._ints(1)) for function in (op.cos, op.sin))

    def _rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        op, half, end = self.op, self.config.head_dim // 2, numpy.iinfo(numpy.int64).max
        one, axis = self._ints([1]), self._ints([3])
        first = op.slice(x, self._ints([0]), self._ints([half]), one, axis)
        second = op.slice(x, self._ints([half]), self._ints([end]), one, axis)
        turned = op.concat([op.multiply(second, op.constant(-1.0, numpy.float32)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def _allowed(self, ids: Any, mask: Any) -> Any:
        """Which of S positions every row sees, [B, 1, n, S]: those up to its own that the mask has."""
        op = self.op
        rows = op.gather(op.shape_of(ids), self._ints(1), self._ints(0))
        positions = op.gather(op.shape_of(mask), self._ints(1), self._ints(0))
        columns = op.range(self._ints(0), positions, self._ints(1), "i64")
        own = op.range(op.subtract(positions, rows), positions, self._ints(1), "i64")
        causal = op.less_equal(op.unsqueeze(columns, self._ints(0)), op.unsqueeze(own, self._ints(1)))
        return op.logical_and(op.unsqueeze(causal, self._ints([0, 1])),
                              op.unsqueeze(op.convert(mask, "boolean"), self._ints([1, 2])))  # fmt: skip

    def _norm(self, x: Any, name: str) -> Any:
        op = self.op
        squares = op.power(x, op.constant(2.0, numpy.float32))
        mean = op.reduce_mean(squares, self._ints([-1]), True)
        root = op.sqrt(op.add(mean, op.constant(self.config.rms_norm_eps, numpy.float32)))
        scaled = op.multiply(x, op.divide(op.constant(1.0, numpy.float32), root))
        return op.multiply(scaled, op.constant(self.checkpoint[name].float().numpy()))

    def _linear(self, x: Any, name: str) -> Any:
        return self.op.matmul(x, self._matrix(name), transpose_a=False, transpose_b=True)

    def _matrix(self, name: str) -> Any:
        """A matrix as fp32 values that are stored in the dtype."""
        values = self.checkpoint[name].to(DTYPES[self.dtype]).contiguous()
        if self.dtype == "bf16":  # numpy has no such type
            tensor = self.openvino.Tensor(self.openvino.Type.bf16, self.openvino.Shape(list(values.shape)))
            tensor.data.view(numpy.int16)[:] = values.view(torch.int16).numpy()
            constant = self.openvino.op.Constant(tensor)
        else:
            constant = self.op.constant(values.numpy())
        return constant if self.dtype == "fp32" else self.op.convert(constant, "f32")

    # ---- nodes ----
    def _input(self, shape: list[int], kind: Any, name: str) -> Any:
        parameter = self.op.parameter(shape, kind)
        parameter.set_friendly_name(name)
        parameter.get_output_tensor(0).set_names({name})
        return parameter

    def _ints(self, values: int | list[int]) -> Any:
        return self.op.constant(values, numpy.int64)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of made-up tokens beside a network: a pair has to have one, texts are ids all the same."""
    import openvino
    import openvino_tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({made_up_token(id): id for id in range(vocab_size)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    first = made_up_token(0)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=first, pad_token=first)
    both = openvino_tokenizers.convert_tokenizer(fast, with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), both, strict=True):
        openvino.save_model(model, folder / name)
