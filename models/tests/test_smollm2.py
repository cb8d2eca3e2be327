"""A real chat model: SmolLM2-135M-Instruct beside transformers' own reading of the same file.

It is fetched once, as `--target smollm2` does. Where it cannot be, these tests are skipped, unless REQUIRE_SMOLLM2 is
set.
"""

import os

import pytest
import torch

from models import LLM, SamplingParams, UserError
from models.fetch import fetched
from models.llama.tokenizer import LlamaTokenizer
from models.loading import open_model
from models.torch_llama.model import TorchLlama

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = ("What is the capital of France?", "Name three uses of a paperclip.", "Say hello in Chinese: 你好 🙂")
LONGER = (  # of which some were written otherwise where rows depended on their number
    "Explain in plain words why the sky looks red in the evening.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and three assertions.",
    "Give me a packing list for a weekend of hiking in cold weather, as bullet points.",
    "Tell me a story about a lighthouse keeper who finds a message in a bottle.",
)
TEXTS = (
    *QUESTIONS,
    "def f(x):\n    return x ** 2  # 1234567",
    "مرحبا بالعالم",
    "日本語のテキスト、改行\n\nと  空白",
    "it's 12,345.67 — naïve café 🦙🦙👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n",
)


@pytest.fixture(scope="module")
def file():
    try:
        return fetched("smollm2")
    except UserError as error:
        if os.environ.get("REQUIRE_SMOLLM2"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(file):
    """(model, tokenizer) of transformers, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        **where
    )


@pytest.fixture(scope="module")
def opened(file):
    return open_model("smollm2")


@pytest.fixture(scope="module")
def llm(file):
    with LLM.load("smollm2", max_seq_len=512, compiled=True) as llm:  # the same text on every machine
        yield llm


def test_its_tokenizer_writes_the_same_ids(opened, theirs):
    tokenizer = LlamaTokenizer.load(opened.checkpoint.path)
    assert not tokenizer.begins_with_bos
    for text in TEXTS:
        ids = theirs[1](text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == theirs[1].decode(ids, skip_special_tokens=True)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        rendered = theirs[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.chat(messages) == theirs[1](rendered, add_special_tokens=False).input_ids


def test_its_logits_and_its_greedy_text_are_the_same(opened, theirs):
    model = TorchLlama(opened.checkpoint.config, opened.checkpoint, dtype="fp32", max_seq_len=256)
    for question in QUESTIONS:
        ids = opened.tokenizer.chat(question)
        with torch.inference_mode():
            expected = theirs[0](torch.tensor([ids])).logits[0]
        assert (model.prefill(ids) - expected[-1]).abs().max() < 1e-4 * expected[-1].abs().max()
        best = model.prefill(ids)
        written = []
        for position in range(len(ids), len(ids) + 20):
            written.append(int(best.argmax()))
            best = model.forward(written[-1:], position)[-1]
        with torch.inference_mode():
            out = theirs[0].generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=2)
        answer = out[0, len(ids) :].tolist()
        assert written[: len(answer)] == answer


def test_answers_with_drafts_are_those_without(llm):
    assert llm.options.row_invariant
    for question in (*QUESTIONS, *LONGER):
        plain = llm.chat(question, max_new_tokens=40, speculate=False)
        assert llm.chat(question, max_new_tokens=40).text == plain.text
        assert plain.finish_reason in ("stop", "length") and "<|im_end|>" not in plain.text
    assert llm.chat(QUESTIONS[0], max_new_tokens=40).finish_reason == "stop"
    assert "Paris" in llm.chat(QUESTIONS[0], max_new_tokens=40).text


def test_characters_of_several_bytes_come_whole(llm):
    """What a piece holds stays in the text: half a character would be another one there. Bytes that no character has,
    which sampling may draw, are in both."""
    prompt = "你好，世界 🙂 مرحبا — 你好，世界 🙂 مرحبا — 你好，世界 🙂 "
    texts = []
    for seed in range(4):  # what is sampled depends on what is drafted
        pieces = list(llm.stream(prompt, SamplingParams(temperature=1.0, seed=seed), max_new_tokens=40))
        texts.append("".join(piece.text for piece in pieces))
        assert texts[-1] == llm.tokenizer.decode([piece.id for piece in pieces])
    assert any(ord(character) > 0x7FF for text in texts for character in text)  # three bytes or more
