"""LlamaTokenizer: one BOS, one template rendering, streaming that never breaks a character, pairs that fit."""

import dataclasses
import datetime
import json
import random
import shutil

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import models as tokenizer_models

from models.errors import UserError
from models.llama import tokenizer as module
from models.llama.tokenizer import LlamaTokenizer, check_pair
from models.tests.llama_fixtures import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_config, write_tiny_tokenizer

BOS, EOS, START, _, EOT = range(5)
TEXTS = [
    "",
    "hello, world",
    "  two spaces\n\n\tand a tab  ",
    "naïve café, Grüße",
    "你好，世界！こんにちは 안녕하세요",
    "🙂🙃 👩\u200d👩\u200d👧 🦙 flags 🇩🇪 and math 𝔘",
    "a\u0301 combining, \ufffd replacement, \ufeff bom, \x00 nul",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory) -> LlamaTokenizer:
    return LlamaTokenizer.load(directory)


@pytest.fixture(scope="module")
def huggingface(directory):
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))


def stream(tokenizer: LlamaTokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


# ------------------------------------------------------------------------------------------- ids and text
@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_hugging_face_and_decode_gives_the_text_back(tokenizer, huggingface, text):
    ids = tokenizer.encode(text)
    assert ids == huggingface(text)["input_ids"]
    assert ids[0] == BOS and BOS not in ids[1:]
    assert tokenizer.decode(ids) == text


def test_a_text_that_spells_bos_gets_no_second_one(tokenizer):
    bos = SPECIAL_TOKENS[BOS]
    plain = tokenizer.encode("hello")
    assert tokenizer.encode(bos + "hello") == tokenizer.encode(bos + bos + "hello") == plain
    assert tokenizer.encode(bos) == tokenizer.encode("") == [BOS]


def test_decode_skips_special_tokens_as_hugging_face_does(tokenizer, huggingface):
    ids = [BOS, *tokenizer.encode("hi there")[1:], EOT, *tokenizer.encode("you")[1:], EOS]
    assert tokenizer.decode(ids) == huggingface.decode(ids, skip_special_tokens=True) == "hi thereyou"


def test_ids_beyond_the_tokenizer_decode_to_nothing(tokenizer):
    ids = [*tokenizer.encode("hi"), tokenizer.vocab_size + 3]
    assert tokenizer.decode(ids) == "".join(stream(tokenizer, ids)) == "hi"


def test_special_ids_and_size(tokenizer, huggingface):
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (BOS, (EOS,), len(huggingface))


def test_stop_ids_come_from_the_generation_config_then_the_model_then_the_tokenizer(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    (path / "config.json").write_text(json.dumps({**tiny_config(vocab_size=400).to_dict(), "eos_token_id": 0}))
    assert LlamaTokenizer.load(path).eos_ids == (0,)
    (path / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    assert LlamaTokenizer.load(path).eos_ids == (4, 1)


def test_bos_may_be_an_object_or_come_from_the_model_or_be_absent(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": SPECIAL_TOKENS[START]}}))
    assert LlamaTokenizer.load(path).bos_id == START
    (path / "tokenizer_config.json").unlink()
    bare = LlamaTokenizer.load(path)
    assert (
        bare.bos_id is None
        and bare.eos_ids == ()
        and bare.encode("hi") == LlamaTokenizer.load(directory).encode("hi")[1:]
    )
    (path / "config.json").write_text(json.dumps(tiny_config(vocab_size=400).to_dict()))
    assert LlamaTokenizer.load(path).bos_id == BOS


def test_a_bos_that_the_models_tokenizer_does_not_add_is_not_added(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    settings = {"bos_token": SPECIAL_TOKENS[BOS], "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = LlamaTokenizer.load(path)
    assert tokenizer.bos_id == BOS
    assert tokenizer.encode("hello") == LlamaTokenizer.load(directory).encode("hello")[1:]


# ------------------------------------------------------------------------------------------- streaming
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_decode_and_no_piece_breaks_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    assert pieces[-1] == ""  # complete text needs no flush
    # Text comes out as soon as it is certain: what is held back is never a whole character.
    for count in range(len(ids)):
        certain = tokenizer.decode(ids[: count + 1]).rstrip("\ufffd")
        assert len("".join(pieces[: count + 1])) >= len(certain)


def test_characters_split_over_tokens_are_in_the_test_data(tokenizer):
    ids = tokenizer.encode(TEXTS[5])[1:]
    assert sum("\ufffd" in tokenizer.decode([id]) for id in ids) > 10


@pytest.mark.parametrize("seed", range(30))
def test_streamed_random_ids_equal_decode(tokenizer, seed):
    rng = random.Random(seed)
    if seed % 2:  # any tokens, special and unknown ones included
        ids = [rng.randrange(tokenizer.vocab_size + 4) for _ in range(400)]
    else:  # bytes that begin, continue and end UTF-8 characters, wrongly put together
        names = {byte: character for character, byte in module._BYTE_OF.items()}
        choice = [0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]
        to_id = tokenizer._tokenizer.token_to_id
        ids = [to_id(names[rng.choice(choice)]) if rng.random() < 0.95 else EOS for _ in range(400)]
        assert None not in ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_flush_ends_one_stream_and_begins_another(tokenizer):
    ids = tokenizer.encode("🙂")[1:]
    detokenizer = tokenizer.detokenizer()
    assert len(ids) > 1 and detokenizer.push(ids[0]) == ""
    assert detokenizer.flush() == "\ufffd" and detokenizer.flush() == ""
    assert "".join(detokenizer.push(id) for id in ids) == "🙂"


def test_a_push_costs_the_same_late_in_a_stream(tokenizer, monkeypatch):
    detokenizer = tokenizer.detokenizer()
    monkeypatch.setattr(LlamaTokenizer, "decode", lambda *_: pytest.fail("decoded again"))
    calls = []
    text_of = tokenizer.token_text
    monkeypatch.setattr(tokenizer, "token_text", lambda id: calls.append(id) or text_of(id))
    for _ in range(2000):
        detokenizer.push(300)
    assert len(calls) <= 2000


def test_added_tokens_in_plain_spelling_stream_as_they_decode(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    raw = Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_tokens([AddedToken("two words 🙂", special=False), AddedToken("Ġplain", special=False)])
    raw.save(str(path / "tokenizer.json"))
    tokenizer = LlamaTokenizer.load(path)
    ids = tokenizer.encode("a two words 🙂 b")
    ids += range(raw.get_vocab_size() - 2, raw.get_vocab_size())
    assert raw.get_vocab_size() - 2 in tokenizer.encode("a two words 🙂 b")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def sentencepiece_like(path, decoder) -> LlamaTokenizer:
    """Llama 2's kind: a space is U+2581, a byte is <0xNN>."""
    words = ["<s>", "▁", "▁▁", "▁a", "b", "▁hello", "é", "<0x", "▁</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    raw = Tokenizer(tokenizer_models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True))
    raw.add_special_tokens(["<s>"])
    raw.decoder = decoder
    path.mkdir()
    raw.save(str(path / "tokenizer.json"))
    return LlamaTokenizer.load(path)


DECODERS = {
    "llama-2": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
}


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("seed", range(10))
def test_other_decoders_stream_as_they_decode(tmp_path, kind, seed):
    tokenizer = sentencepiece_like(tmp_path / "x", DECODERS[kind]())
    rng = random.Random(seed)
    valid = [9 + byte for byte in "🙂é".encode()]
    ids: list[int] = []
    while len(ids) < 300:
        ids += rng.choice([[rng.randrange(9)], [rng.randrange(9)], valid, [9 + rng.randrange(128, 256)], [9 + 0x41]])
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(bool(piece) for piece in pieces) > 30  # it does stream


def test_a_byte_level_decoder_inside_a_sequence_streams_whole_characters(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    raw = Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.decoder = decoders.Sequence([decoders.ByteLevel()])
    raw.save(str(path / "tokenizer.json"))
    tokenizer = LlamaTokenizer.load(path)
    for text in TEXTS[:-1]:
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


# ------------------------------------------------------------------------------------------- chat
def test_a_chat_is_the_template_rendered_once(tokenizer, huggingface):
    ids = tokenizer.chat("Hi llama")
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi llama<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert huggingface.decode(ids) == expected
    assert ids.count(BOS) == 1 and ids[0] == BOS
    messages = [{"role": "user", "content": "Hi llama"}]
    by_hf = huggingface.apply_chat_template(
        messages, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False
    )
    assert ids == by_hf == tokenizer.chat(messages)


def test_a_conversation_with_a_system_message(tokenizer, huggingface):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = huggingface.decode(tokenizer.chat(messages, date="01 Feb 2025"))
    assert text.count("<|begin_of_text|>") == 1 and text.count("system<|end_header_id|>") == 1
    assert "Today Date: 01 Feb 2025\n\nBe brief.<|eot_id|>" in text
    assert text.index("Hi<|eot_id|>") < text.index("Hello<|eot_id|>") < text.index("Bye<|eot_id|>")
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("honours_date_string", [True, False])
def test_a_chat_has_the_same_ids_on_every_day(directory, tmp_path, monkeypatch, honours_date_string):
    path = shutil.copytree(directory, tmp_path / "x")
    if not honours_date_string:
        ignoring = CHAT_TEMPLATE.replace("{%- if not date_string is defined %}", "{%- if true %}")
        assert ignoring != CHAT_TEMPLATE
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": ignoring}))
    days, undated = set(), set()
    for day in (1, 2):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 1, day)

        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
        days.add(tuple(LlamaTokenizer.load(path).chat("Hi")))
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        undated.add(hf.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False))
    assert len(days) == 1
    assert len(undated) == 2  # the template does read the clock when it is let


def test_a_template_in_its_own_file_is_found(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]})
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert LlamaTokenizer.load(path).chat("Hi") == LlamaTokenizer.load(directory).chat("Hi")


def test_a_template_without_bos_still_gives_one(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    without = CHAT_TEMPLATE.replace("{{- bos_token }}", "")
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": without}))
    assert LlamaTokenizer.load(path).chat("Hi") == LlamaTokenizer.load(directory).chat("Hi")


def test_no_template_names_the_flag(tmp_path):
    path = write_tiny_tokenizer(tmp_path / "x", chat_template=None)
    with pytest.raises(UserError, match="has no chat template: use an Instruct checkpoint or leave --instruct away"):
        LlamaTokenizer.load(path).chat("Hi")


@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"role": "robot", "content": "Hi"}], "refuses the messages: unknown role robot"),
        ([], "refuses the messages"),
        ([{"role": "user"}], "{'role': 'user'} lacks a text"),
        ([{"role": "user", "content": None}], "lacks a text"),
        (["Hi"], "'Hi' lacks a text"),
    ],
)
def test_messages_that_are_refused(tokenizer, messages, message):
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- files
def test_a_missing_tokenizer_says_what_to_copy(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json: copy it"):
        LlamaTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is no readable tokenizer") as caught:
        LlamaTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_its_model_is_refused(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "x")
    size = LlamaTokenizer.load(path).vocab_size
    for rows in (size, size + 10):  # a padded vocabulary is no mistake
        (path / "config.json").write_text(json.dumps(tiny_config(vocab_size=rows).to_dict()))
        assert LlamaTokenizer.load(path).vocab_size == size
    (path / "config.json").write_text(json.dumps(tiny_config(vocab_size=size - 1).to_dict()))
    with pytest.raises(UserError, match=f"has {size} tokens, but the model's vocab_size is {size - 1}"):
        LlamaTokenizer.load(path)


# ------------------------------------------------------------------------------------------- pairs
CONFIG = tiny_config(vocab_size=512)  # padded: more rows than the tokenizer has entries


def rewritten(directory, path, change) -> LlamaTokenizer:
    """The tokenizer of ``directory`` with its JSON changed."""
    shutil.copytree(directory, path)
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return LlamaTokenizer.load(path)


def test_a_pair_with_equal_tokenizers_fits(directory, tokenizer, tmp_path):
    assert tokenizer.vocab_size < CONFIG.vocab_size
    check_pair(tokenizer, tokenizer, CONFIG, CONFIG)
    other_bytes = rewritten(directory, tmp_path / "x", lambda content: None)
    assert (other_bytes.path / "tokenizer.json").read_bytes() != (directory / "tokenizer.json").read_bytes()
    check_pair(tokenizer, other_bytes, CONFIG, dataclasses.replace(CONFIG, hidden_size=32))


def test_a_pair_of_different_vocabulary_sizes_names_both(tokenizer):
    with pytest.raises(UserError, match="target vocab 512 != draft vocab 32000: the pair must share one tokenizer"):
        check_pair(tokenizer, tokenizer, CONFIG, dataclasses.replace(CONFIG, vocab_size=32000))


def test_a_pair_that_differs_in_one_token_names_it(directory, tokenizer, tmp_path):
    a, b = tokenizer.token_text(77), tokenizer.token_text(90)

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    draft = rewritten(directory, tmp_path / "x", swap)
    with pytest.raises(UserError) as caught:
        check_pair(tokenizer, draft, CONFIG, CONFIG)
    assert f'token 77 is "{a}" in the target\'s tokenizer but "{b}" in the draft\'s' in str(caught.value)


def test_a_pair_of_which_one_has_more_tokens_names_the_first(tokenizer, tmp_path):
    longer = LlamaTokenizer.load(write_tiny_tokenizer(tmp_path / "x", vocab_size=tokenizer.vocab_size + 5))
    assert longer.vocab_size > tokenizer.vocab_size
    with pytest.raises(UserError, match=f"token {tokenizer.vocab_size} is absent in the target's tokenizer but \""):
        check_pair(tokenizer, longer, CONFIG, CONFIG)


def test_a_pair_with_different_stop_ids_names_both(tokenizer):
    draft_config = dataclasses.replace(CONFIG, eos_token_ids=(4, 1))
    with pytest.raises(UserError, match=r"target stops at ids \[1\], draft at \[1, 4\]"):
        check_pair(tokenizer, tokenizer, CONFIG, draft_config)
    check_pair(tokenizer, tokenizer, dataclasses.replace(CONFIG, eos_token_ids=(1, 4)), draft_config)
