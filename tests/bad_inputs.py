"""What a user may get wrong on the demo's command line and in its files: each is refused in one line.

One list for `test_refusals.py`, which runs every case, and for `record_refusals.py`, which writes the messages down.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from demo.harness import main

INFORMATION = ("loading ", "timing row-invariant arithmetic")
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "checkpoints" / "tiny-target"


@dataclass(frozen=True)
class BadInput:
    """A command line that is refused.

    Args:
        what: for people; its name.
        argv: of the demo. Files have names without a directory.
        make: puts the files that it takes into an empty directory.
        mode: "baseline": of that demo.
    """

    what: str
    argv: tuple[str, ...]
    make: Callable[[Path], object] = lambda folder: None
    mode: str | None = None

    def run(self, folder: Path) -> tuple[int, list[str]]:
        """Make it in an empty directory and run the demo there: (exit code, its errors, files by their names)."""
        self.make(folder)
        told = StringIO()
        with chdir(folder), redirect_stderr(told), redirect_stdout(StringIO()):
            code = main(list(self.argv), self.mode)
        lines = told.getvalue().replace(f"{folder}/", "").replace(f"{ROOT}/", "").splitlines()
        return code, [line for line in lines if not line.startswith(INFORMATION)]


def _file(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _model(folder: Path) -> Path:
    """The embedded target, its weights as a link, so that its other files can be changed."""
    model = folder / "model"
    model.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (model / file.name).symlink_to(file)
        else:
            shutil.copy(file, model)
    return model


def _config(**changes: object) -> Callable[[Path], object]:
    """A model whose config.json says something else."""

    def make(folder: Path) -> None:
        path = _model(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def _with(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A model with another file of this name."""

    def make(folder: Path) -> None:
        path = _model(folder) / name
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (_model(folder) / name).unlink()


def _twice(folder: Path) -> None:
    path = _model(folder) / "config.json"
    path.write_text(path.read_text().replace("{", '{"num_hidden_layers": 2,', 1))


def _cut(folder: Path) -> None:
    path = _model(folder) / "model.safetensors"
    path.unlink()
    path.write_bytes((TINY / path.name).read_bytes()[:100_000])


def _loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def _sharded(folder: Path) -> None:
    model = _model(folder)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "other.safetensors"}}')
    (model / "model.safetensors").unlink()


_DEEP = "[" * 200_000
_ROPE = {"rope_type": "default"}
_MODEL = ("--target", "model")
_PROMPTS = ("--target", "tiny", "--prompts")
_ONE = ("--target", "tiny", "--prompt", "a")

BAD_INPUTS = (
    # ---- flags
    BadInput("a flag that is not there", ("--magic",)),
    BadInput("a draft length below 0", ("--num-draft-tokens", "-1")),
    BadInput("a draft length beyond a tile", ("--num-draft-tokens", "99")),
    BadInput("a draft length that is no number", ("--num-draft-tokens", "four")),
    BadInput("a temperature below 0", ("--temperature", "-1")),
    BadInput("a temperature that is no number", ("--temperature", "nan")),
    BadInput("a nucleus without mass", ("--temperature", "1", "--top-p", "0")),
    BadInput("no new tokens", ("--max-new-tokens", "0")),
    BadInput("an unknown data type", ("--dtype", "int4")),
    BadInput("an unknown drafter", ("--drafter", "magic")),
    BadInput("a thousand million threads", ("--threads", "1000000000")),
    BadInput("a context beyond the model's", (*_ONE, "--max-seq-len", "100000")),
    BadInput("random prompts beyond the machine", ("--target", "tiny", "--random-prompts", "999999999x9")),
    BadInput("tree nodes without a tree", (*_ONE, "--drafter", "model", "--tree-nodes", "4")),
    BadInput("a head that the target has not", (*_MODEL, "--prompt", "a", "--drafter", "head"), _model),
    BadInput("a layer to leave at that is not there", (*_ONE, "--drafter", "early-exit", "--exit-layer", "99")),
    BadInput("a drafter's flag for plain decoding", (*_ONE, "--exit-layer", "1"), mode="baseline"),
    # ---- prompts
    BadInput("an empty prompt", ("--target", "tiny", "--prompt", "")),
    BadInput("a prompt longer than the context", ("--target", "tiny", "--max-seq-len", "8", "--prompt", "word " * 99)),
    BadInput("a prompt file that is not there", (*_PROMPTS, "missing.txt")),
    BadInput("a prompt file without a prompt", (*_PROMPTS, "p.txt"), _file("p.txt", "\n \n")),
    BadInput("a prompt file that is no UTF-8", (*_PROMPTS, "p.txt"), _file("p.txt", b"\xff\xfe\x00")),
    BadInput("a prompt file of a wrong shape", (*_PROMPTS, "p.json"), _file("p.json", '{"a": 1}')),
    BadInput("a prompt file of 200,000 brackets", (*_PROMPTS, "p.json"), _file("p.json", _DEEP)),
    BadInput("half a surrogate pair in a prompt", (*_PROMPTS, "p.json"), _file("p.json", '["fine", "\\ud800"]')),
    # ---- outputs
    BadInput("an output over its prompts", (*_PROMPTS, "p.txt", "--json", "p.txt"), _file("p.txt", "def")),
    BadInput("an output over a model's file", (*_MODEL, "--json", "model/config.json"), _model),
    BadInput("two outputs in one file", (*_ONE, "--json", "x", "--html", "x")),
    BadInput("an output in no directory", (*_ONE, "--json", "missing/x.json")),
    BadInput("an output that is a directory", (*_ONE, "--json", "x"), lambda folder: (folder / "x").mkdir()),
    BadInput("an output that is a loop of links", (*_ONE, "--json", "loop"), _loop),
    BadInput("an output with a name too long", (*_ONE, "--json", "a" * 256)),
    BadInput("an output on a full disk", (*_ONE, "--max-new-tokens", "2", "--quiet", "--json", "/dev/full")),
    # ---- models
    BadInput("a model that is not there", ("--target", "missing/")),
    BadInput("a model that is a file", ("--target", "x"), _file("x", "")),
    BadInput("an empty directory", ("--target", "x"), lambda folder: (folder / "x").mkdir()),
    BadInput("a GGUF file of zeros", ("--target", "x.gguf"), _file("x.gguf", bytes(1000))),
    BadInput("a GGUF file that is not there", ("--target", "x.gguf")),
    BadInput("a config that is no JSON", _MODEL, _with("config.json", "{")),
    BadInput("a config of 200,000 brackets", _MODEL, _with("config.json", _DEEP)),
    BadInput("a key twice in a config", _MODEL, _twice),
    BadInput("another architecture", _MODEL, _config(architectures=["MistralForCausalLM"])),
    BadInput("a thousand million layers", _MODEL, _config(num_hidden_layers=10**9)),
    BadInput("more layers than the weights have", _MODEL, _config(num_hidden_layers=40)),
    BadInput("fewer layers than the weights have", _MODEL, _config(num_hidden_layers=1)),
    BadInput("another size than the weights have", _MODEL, _config(intermediate_size=64)),
    BadInput(
        "a rope base beyond all floats",
        _MODEL,
        _config(rope_parameters={"rope_type": "default", "rope_theta": 10**400}),
    ),
    BadInput("heads that do not divide", _MODEL, _config(num_attention_heads=5, num_key_value_heads=2)),
    BadInput("no weights", _MODEL, _without("model.safetensors")),
    BadInput("weights that are cut short", _MODEL, _cut),
    BadInput("weights that are text", _MODEL, _with("model.safetensors", "hello, world")),
    BadInput("a shard that is not there", _MODEL, _sharded),
    BadInput("a tokenizer that is no JSON", _MODEL, _with("tokenizer.json", "no")),
    BadInput("a tokenizer without a vocabulary", _MODEL, _with("tokenizer.json", '{"model": {"type": "BPE"}}')),
    BadInput("a template that is no UTF-8", (*_MODEL, "--instruct"), _with("chat_template.jinja", b"\xff")),
    BadInput("a template that is no template", (*_MODEL, "--instruct"), _with("chat_template.jinja", "{% for %}")),
    BadInput("a chat without a template", (*_ONE, "--instruct")),
)
