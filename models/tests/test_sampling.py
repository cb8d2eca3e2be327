"""SamplingParams: what it refuses, and that its streams of random numbers are separate and repeatable."""

import pytest
import torch

from models.errors import UserError
from models.speculative.control.policy import MAX_DRAFT_LENGTH, FixedDraftLength
from models.speculative.sampling import SamplingParams
from models.speculative.stats import Round


@pytest.mark.parametrize("wrong, named", [
    ({"temperature": -0.1}, "temperature -0.1"), ({"temperature": float("nan")}, "temperature nan"),
    ({"temperature": float("inf")}, "temperature inf"), ({"temperature": 1e-40}, "temperature 1e-40"),
    ({"top_k": -1}, "top_k -1"), ({"top_p": 0.0}, "top_p 0.0"), ({"top_p": 1.5}, "top_p 1.5"),
    ({"top_p": float("nan")}, "top_p nan"),
])  # fmt: skip
def test_values_without_meaning_are_refused_in_one_line(wrong, named):
    with pytest.raises(UserError, match=named) as error:
        SamplingParams(**wrong)
    assert "\n" not in str(error.value)


def test_temperature_zero_is_greedy_and_the_default():
    assert SamplingParams().greedy
    assert SamplingParams(temperature=0, top_k=5, top_p=0.5).greedy
    assert not SamplingParams(temperature=0.5).greedy


def draws(seed: int, stream: str) -> list[float]:
    return torch.rand(8, generator=SamplingParams(seed=seed).generator(stream)).tolist()


def test_streams_repeat_and_differ_by_seed_and_name():
    assert draws(3, "target") == draws(3, "target")
    seeds = (0, 1, 2, -1, 2**32, 2**40)
    streams = [draws(seed, stream) for seed in seeds for stream in ("target", "draft")]
    assert len({tuple(stream) for stream in streams}) == 2 * len(seeds)


@pytest.mark.parametrize("k", [-1, 32, 1000])
def test_draft_lengths_outside_a_tile_are_refused(k):
    with pytest.raises(UserError, match=f"draft length {k}"):
        FixedDraftLength(k)


@pytest.mark.parametrize("k", [0, 1, MAX_DRAFT_LENGTH])
def test_fixed_draft_length_never_changes(k):
    controller = FixedDraftLength(k)
    controller.update(Round(drafted=k, accepted=0, emitted=1))
    assert controller.draft_length("model") == k
