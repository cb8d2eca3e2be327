"""The tokenizer of a checkpoint: text to ids and back, chat prompts, streaming, and whether a pair shares one."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from models.errors import UserError, is_text
from models.llama.config import LlamaConfig, as_token_ids, read_json

# The date a chat template prints into its system block: fixed, so that a prompt has the same ids on every day.
CHAT_DATE = "26 Jul 2024"
# In front of a template, this hides the clock from it, for templates that read that whatever date they are given.
_FIXED_CLOCK = "{%- macro strftime_now(format) -%}{{ date_string }}{%- endmacro -%}"


# Files beside tokenizer.json that transformers reads.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class LlamaTokenizer:
    """Reads tokenizer.json and the files beside it; ids are those of the model in the same directory.

    ``bos_id`` is None where the model has none, ``begins_with_bos`` whether texts begin with it; ``eos_ids`` are all
    ids that end a text; ``vocab_size`` counts the tokenizer's entries, which may be fewer than the rows of a model
    whose vocabulary is padded.
    """

    def __init__(
        self, tokenizer: Tokenizer, bos_id: int | None, begins_with_bos: bool, eos_ids: Sequence[int], path: Path
    ) -> None:
        """Use `LlamaTokenizer.load`."""
        self.bos_id = bos_id
        self.begins_with_bos = begins_with_bos
        self.eos_ids = tuple(eos_ids)
        self.path = path
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._chat_renderer: Any = None

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> "LlamaTokenizer":
        """Load from a checkpoint (or bare tokenizer) directory.

        Stop ids come from generation_config.json, else config.json, else tokenizer_config.json. Raises UserError if
        tokenizer.json is missing or damaged, or has more entries than the model beside it.
        """
        path = Path(checkpoint_dir).expanduser()
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{path} has no tokenizer.json: copy it and tokenizer_config.json there from the original checkpoint"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is no readable tokenizer ({' '.join(str(error).split())})") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()

        generation, model, settings = (
            read_json(path / name) if (path / name).is_file() else {}
            for name in ("generation_config.json", "config.json", "tokenizer_config.json")
        )
        size, rows = tokenizer.get_vocab_size(with_added_tokens=True), model.get("vocab_size")
        if isinstance(rows, int) and size > rows:
            raise UserError(
                f"{file} has {size} tokens, but the model's vocab_size is {rows}: they do not belong together"
            )
        bos = _id_of(tokenizer, settings.get("bos_token"))
        stops = (
            generation.get("eos_token_id"),
            model.get("eos_token_id"),
            _id_of(tokenizer, settings.get("eos_token")),
        )
        bos = model.get("bos_token_id") if bos is None else bos
        begins = settings.get("add_bos_token")
        if not isinstance(begins, bool):
            begins = bos is not None and tokenizer.encode("a").ids[:1] == [bos]
        return cls(
            tokenizer,
            bos_id=bos,
            begins_with_bos=begins and bos is not None,
            eos_ids=as_token_ids(next((stop for stop in stops if stop is not None), None)),
            path=path,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, behind exactly one BOS where the model's own tokenizer puts one, also if the text spells it.

        Special tokens that the text spells out ("<|eot_id|>") become those tokens. Raises UserError for half a
        surrogate pair, and for a character that the tokenizer has no token for.
        """
        if not is_text(text):
            raise UserError("the text holds half of a surrogate pair, which no tokenizer knows: decode it as UTF-8")
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{self.path / 'tokenizer.json'} cannot encode the text ({' '.join(str(error).split())}): use another "
                "text, or the tokenizer of the original checkpoint"
            ) from None
        if not self.begins_with_bos or self.bos_id is None:
            return ids
        start = next((i for i, id in enumerate(ids) if id != self.bos_id), len(ids))
        return [self.bos_id, *ids[start:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Bytes that are no UTF-8 become U+FFFD; unknown ids nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_text(self, id: int) -> str | None:
        """The vocabulary's entry for ``id`` as tokenizer.json spells it; None if there is none."""
        return self._tokenizer.id_to_token(id)

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to a text, in UTF-8, perhaps a part of a character; nothing for a special one."""
        text = None if id in self._special else self.token_text(id)
        if text is None:
            return b""
        if not self._byte_level:
            byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
            return bytes.fromhex(byte[1]) if byte else self.decode([id]).encode()
        try:
            return bytes([_BYTE_OF[character] for character in text])
        except KeyError:  # an added token, spelled in plain text
            return text.encode()

    def chat(self, messages: str | Sequence[Mapping[str, str]], date: str = CHAT_DATE) -> list[int]:
        """Ids of a conversation in the checkpoint's chat template, up to where the assistant's answer begins.

        ``messages``: one user message, or dictionaries with "role" and "content". ``date`` is what the template's
        system block calls today. Raises UserError if there is no template, or it refuses the messages.
        """
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        for message in conversation:
            parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(part, str) for part in parts):
                raise UserError(f'the message {message!r} lacks a text under "role" or "content"')
        renderer = self._load_chat_renderer()
        try:
            text = renderer.apply_chat_template(
                conversation,
                chat_template=_FIXED_CLOCK + renderer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=True,
                date_string=date,
            )
        except Exception as error:  # jinja's errors, or the template's own
            raise UserError(
                f"the chat template of {self.path} refuses the messages: {' '.join(str(error).split())}"
            ) from None
        return self.encode(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template beside the tokenizer."""
        settings = self.path / "tokenizer_config.json"
        in_settings = settings.is_file() and read_json(settings).get("chat_template")
        return bool(in_settings) or (self.path / "chat_template.jinja").is_file()

    def detokenizer(self) -> "StreamingDetokenizer":
        """A new detokenizer for one stream of ids."""
        if self._byte_level:
            return StreamingDetokenizer(self)
        return _WindowDetokenizer(self)

    def _load_chat_renderer(self) -> Any:
        if self._chat_renderer is None:
            # Imported here: a second that only chat prompts need.
            from transformers import PreTrainedTokenizerFast

            for file in self.path.glob("*.json"):  # the library would not say which file it cannot read
                if file.name in _SETTINGS:
                    read_json(file)
            for file in [*self.path.glob("*.jinja"), *self.path.glob("additional_chat_templates/*.jinja")]:
                _check_utf8(file)
            try:
                loaded = PreTrainedTokenizerFast.from_pretrained(str(self.path))
            except Exception as error:  # whatever a setting of a wrong type leads the library to
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(
                    f"{self.path / 'tokenizer_config.json'}, or a file beside it, has a setting that cannot be used "
                    f"({reason}): copy the tokenizer's files from the original checkpoint"
                ) from None
            if not loaded.chat_template:
                raise UserError(
                    f"{self.path} has no chat template: use an Instruct checkpoint or leave --instruct away"
                )
            self._chat_renderer = loaded
        return self._chat_renderer


class StreamingDetokenizer:
    """Turns a stream of ids into text piece by piece: all pieces and the flush together are ``decode`` of all ids.

    A piece never ends inside a character: bytes of an unfinished one wait for the ids that complete it. Works on the
    bytes of each token (byte-level BPE, as Llama 3 has it), so the cost of a push does not depend on the past.

    `tokenizers.decoders.DecodeStream` (0.23) is no substitute. It holds whole characters back where a token ends one
    and begins the next, and decodes all it holds again at each id, without end where bytes are no UTF-8; it has no
    flush; with byte fallback it raises "Invalid prefix" at bytes that are no UTF-8, which models do write.
    """

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        """Use `LlamaTokenizer.detokenizer`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Take the next id; returns the text that is now certain, often empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """The text still held back, with U+FFFD for an unfinished character; the next push starts a new stream."""
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer(StreamingDetokenizer):
    """The same for any other decoder (SentencePiece with byte fallback): decodes a window of a few tokens again.

    The window starts with the tokens of the previous piece, because a decoder may treat the start of a text apart.
    Runs of byte tokens wait for their end: one invalid byte changes how all of the run is decoded.
    """

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        """Use `LlamaTokenizer.detokenizer`."""
        super().__init__(tokenizer)
        self._previous: list[int] = []
        self._waiting: list[int] = []

    def push(self, id: int) -> str:
        """As in the base class."""
        token = None if id in self._tokenizer._special else self._tokenizer.token_text(id)
        if token is None:
            return ""
        self._waiting.append(id)
        text = "" if token.startswith("<0x") else self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._previous, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """As in the base class."""
        text = self._text()
        self._previous, self._waiting = [], []
        return text

    def _text(self) -> str:
        """What the waiting ids add to the text of those before them."""
        before = self._tokenizer.decode(self._previous)
        return self._tokenizer.decode(self._previous + self._waiting)[len(before) :]


def check_pair(
    target: LlamaTokenizer, draft: LlamaTokenizer, target_config: LlamaConfig, draft_config: LlamaConfig
) -> None:
    """Raise UserError unless an id means the same to both models, naming the first difference.

    Compared are the models' vocabulary sizes (padding included: their logits must have equal length), every entry
    of the tokenizers, and the stop ids.
    """
    if target_config.vocab_size != draft_config.vocab_size:
        raise UserError(
            f"target vocab {target_config.vocab_size} != draft vocab {draft_config.vocab_size}: "
            "the pair must share one tokenizer"
        )
    if (target.path / "tokenizer.json").read_bytes() != (draft.path / "tokenizer.json").read_bytes():
        for id in range(target_config.vocab_size):
            ours, theirs = target.token_text(id), draft.token_text(id)
            if ours != theirs:
                raise UserError(
                    f"token {id} is {_quoted(ours)} in the target's tokenizer but {_quoted(theirs)} in the draft's: "
                    "the pair must share one tokenizer"
                )
    if set(target_config.eos_token_ids) != set(draft_config.eos_token_ids):
        stops = [sorted(config.eos_token_ids) for config in (target_config, draft_config)]
        raise UserError(
            f"target stops at ids {stops[0]}, draft at {stops[1]}: use a pair that is Instruct on both sides, or base "
            "on both"
        )


def _quoted(text: str | None) -> str:
    return "absent" if text is None else json.dumps(text, ensure_ascii=False)


def _check_utf8(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read {file} ({reason}): copy it from the original checkpoint") from None


def _id_of(tokenizer: Tokenizer, token: Any) -> int | None:
    """Id of a special token as tokenizer_config.json has it: a string, or an object with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table) -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_alphabet()
