"""Weights that are NaN or infinite: a target is refused, its layer named; a draft only costs speed."""

import math

import pytest
import torch

from models import LLM, SamplingParams
from models.errors import NotFinite
from models.llama.checkpoint import save_checkpoint
from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.generate import generate
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import build, engine_config, perturbed, random_prompt
from models.tests.llama_fixtures import random_tensors
from models.torch_llama.checks import check_finite
from models.torch_llama.model import TorchLlama

LAYERS = 4
CONFIG = engine_config(layers=LAYERS)
PROMPT = random_prompt(40, seed=1)  # more than the rows of one forward
GREEDY, WARM = SamplingParams(), SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=2)
# Where a weight is damaged, and what the message then says.
PLACES = {
    "model.embed_tokens.weight": "after the embedding",
    "model.layers.0.input_layernorm.weight": "after layer 1 of 4",
    "model.layers.2.self_attn.k_proj.weight": "after layer 3 of 4",
    "model.layers.3.mlp.down_proj.weight": "after layer 4 of 4",
    "model.norm.weight": r"after the output matrix \(all 4 layers are finite\)",
    "lm_head.weight": r"after the output matrix \(all 4 layers are finite\)",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def damaged(name: str, value: float = math.nan, seed: int = 0, token: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with one of them replaced: for an embedding, in the row of a token."""
    tensors = random_tensors(CONFIG, seed)
    tensors[name].view(-1)[token * CONFIG.hidden_size if "embed" in name else 0] = value
    return tensors


# ---------------------------------------------------------------------------------------------------- the target
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fixed_rows", [None, 4])
def test_the_layer_of_a_damaged_weight_is_named(name, value, fixed_rows):
    # A token near the end of the prompt: the first pieces are finite.
    model = TorchLlama(
        CONFIG, damaged(name, value, token=PROMPT[-1]), dtype="fp32", max_seq_len=64, fixed_rows=fixed_rows
    )
    with pytest.raises(NotFinite, match=f"^logits are not finite {PLACES[name]}: the weights are damaged"):
        check_finite(model, PROMPT)


def test_a_sound_model_passes():
    check_finite(TorchLlama(CONFIG, random_tensors(CONFIG, 0), dtype="fp32", max_seq_len=64), PROMPT)


def test_an_overflow_of_fp16_has_another_remedy():
    tensors = random_tensors(CONFIG, 0)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 60000
    model = TorchLlama(CONFIG, tensors, dtype="fp16", max_seq_len=64)
    with pytest.raises(NotFinite, match="after layer 2 of 4: numbers too large for fp16.*use bf16 or fp32"):
        check_finite(model, PROMPT)
    check_finite(TorchLlama(CONFIG, tensors, dtype="fp32", max_seq_len=64), PROMPT)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_no_token_of_a_damaged_target_is_written(sampling):
    target = build(CONFIG, damaged("model.layers.1.self_attn.o_proj.weight"))
    written = generate(target, ModelDrafter(build(CONFIG, random_tensors(CONFIG, 0)), sampling), PROMPT)
    with pytest.raises(NotFinite, match="logits after the prompt are not finite"):
        next(written)


@pytest.mark.parametrize("drafter", ["combined", "tree", "early-exit", "none"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_an_llm_names_the_checkpoint_and_the_layer(tmp_path, drafter, sampling):
    paths = [str(tmp_path / name) for name in ("target", "draft")]
    save_checkpoint(paths[0], CONFIG, damaged("model.layers.2.mlp.up_proj.weight"))
    save_checkpoint(paths[1], CONFIG, random_tensors(CONFIG, 0))
    options = {"speculative": False} if drafter == "none" else {"drafter": drafter}
    needs_draft = drafter in ("combined", "tree")
    with LLM.load(paths[0], paths[1] if needs_draft else None, max_seq_len=128, dtype="fp32", **options) as llm:
        for _ in range(2):  # the slot is free again
            with pytest.raises(NotFinite) as caught:
                llm.generate(PROMPT, sampling, max_new_tokens=4)
            message = str(caught.value)
            assert message.startswith(f"{paths[0]}: logits are not finite after layer 3 of 4: ")
            assert "\n" not in message
        assert llm.engine.idle


# ----------------------------------------------------------------------------------------------------- the draft
def damaged_draft(place: str):
    """A draft that often agrees, with NaN everywhere, or only after a token that the text comes to."""
    sound = perturbed(random_tensors(CONFIG, 0), 0.05, seed=9)
    if place == "everywhere":
        sound["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    else:
        sound["model.embed_tokens.weight"][int(place)] = math.nan
    return build(CONFIG, sound)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("controller", [lambda: FixedDraftLength(4), lambda: AutoDraftLength(range(5))])
@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("prompt", [PROMPT, [5]], ids=["long", "one-token"])
def test_a_damaged_draft_writes_the_targets_text(sampling, controller, kind, prompt):
    target = build(CONFIG, random_tensors(CONFIG, 0))
    plain = [token.id for token in generate(target, None, prompt, sampling=sampling, max_new_tokens=60)]
    late = next(token for token in plain[2:] if token not in prompt and token not in plain[:2])
    for place in ("everywhere", str(late)):
        draft = damaged_draft(place)
        drafter = TreeDrafter(draft, sampling, 6) if kind == "tree" else ModelDrafter(draft, sampling)
        stats = GenerationStats()
        options = {"sampling": sampling, "max_new_tokens": 60, "controller": controller(), "stats": stats}
        ids = [token.id for token in generate(target, drafter, prompt, **options)]
        assert len(ids) == 60 and all(0 <= id < CONFIG.vocab_size for id in ids)
        accepted = sum(round.accepted for round in stats.rounds)
        assert accepted == 0 if place == "everywhere" else accepted > 0
        if sampling.greedy or place == "everywhere":
            assert ids == plain


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_a_damaged_draft_is_asked_once_a_text(kind):
    target, draft = build(CONFIG, random_tensors(CONFIG, 0)), damaged_draft("everywhere")
    drafter = TreeDrafter(draft, WARM, 6) if kind == "tree" else ModelDrafter(draft, WARM)
    list(generate(target, drafter, PROMPT, sampling=WARM, controller=FixedDraftLength(4), max_new_tokens=30))
    assert [method for method, _, _ in draft.calls if method != "prefill"] in ([], ["forward"])


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["plain", "chain", "tree"])
def test_a_target_that_is_damaged_for_a_later_token_writes_what_it_can_and_is_refused(kind, sampling):
    """Embeddings of tokens that the prompt lacks are NaN: what precedes them is the sound target's text."""
    tensors = random_tensors(CONFIG, 0)
    sound, draft = build(CONFIG, tensors), build(CONFIG, perturbed(tensors, 0.05, seed=9))
    whole = [token.id for token in generate(sound, None, PROMPT, sampling=sampling, max_new_tokens=30)]
    kept = {*PROMPT, *whole[:4]}
    place = next(i for i, id in enumerate(whole) if id not in kept)
    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[[id for id in range(CONFIG.vocab_size) if id not in kept]] = math.nan
    target = build(CONFIG, {**tensors, "model.embed_tokens.weight": embedding})
    drafter = {"plain": None, "chain": ModelDrafter(draft, sampling), "tree": TreeDrafter(draft, sampling, 6)}[kind]
    written = []
    with pytest.raises(NotFinite, match="logits after [4-7][0-9] tokens are not finite"):
        for token in generate(target, drafter, PROMPT, sampling=sampling, max_new_tokens=30):
            written.append(token.id)
    if kind == "plain" or sampling.greedy:
        assert written == whole[: len(written)] and len(written) <= place + 1
    assert all(0 <= id < CONFIG.vocab_size for id in written)
