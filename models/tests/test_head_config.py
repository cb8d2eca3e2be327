"""HeadConfig: the layers that a head reads, as the two layouts count them."""

import pytest

from models.errors import UserError
from models.llama.config import named_config
from models.llama.head_config import SPECFORGE, SPECULATORS, TAPS, HeadConfig, default_taps
from models.tests.head_fixtures import head_config
from models.tests.llama_fixtures import tiny_config

TARGET = tiny_config(num_hidden_layers=8)


def specforge(**changes):
    """A config.json as SpecForge writes it, without eagle_config."""
    values = head_config(TARGET, 60, taps=(1, 4, 5), layout=SPECFORGE).to_dict()
    del values["eagle_config"]
    return values | changes


def test_layers_inside_eagle_config_count_outputs():
    """SpecForge captures the output of a layer by its index; SGLang adds 1 for the layer whose input that is."""
    config = HeadConfig.from_dict(specforge(eagle_config={TAPS: [0, 3, 4]}), TARGET)
    assert config.taps == (1, 4, 5)
    assert config.to_dict()["eagle_config"][TAPS] == [0, 3, 4]
    assert HeadConfig.from_dict(specforge(eagle_config={TAPS: [-1, 2]})).taps == (0, 3)


def test_layers_at_the_top_count_inputs():
    """As speculators and vLLM read them."""
    values = head_config(TARGET, 60, taps=(1, 4, 5), layout=SPECULATORS).to_dict()
    assert values[TAPS] == [1, 4, 5] and HeadConfig.from_dict(values).taps == (1, 4, 5)
    assert HeadConfig.from_dict(specforge(**{TAPS: [1, 4, 5]})).taps == (1, 4, 5)


@pytest.mark.parametrize("size", ["1b", "3b", "8b"])
def test_the_default_is_the_same_whichever_layout_says_it(size):
    """SpecForge names the outputs of layers 1, n/2 - 1 and n - 4, speculators the inputs of 2, n/2 and n - 3."""
    target = named_config(size)
    n = target.num_hidden_layers
    values = specforge(eagle_config={TAPS: [1, n // 2 - 1, n - 4]})
    assert HeadConfig.from_dict(values).taps == default_taps(n) == HeadConfig.from_dict(specforge(), target).taps


@pytest.mark.parametrize("layout", [SPECFORGE, SPECULATORS])
@pytest.mark.parametrize("taps", [(0, 3), (1, 4, 5), (8,)])
def test_taps_are_read_as_they_were_written(layout, taps):
    config = head_config(TARGET, 60, taps=taps, layout=layout)
    assert HeadConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([3, 1], r"\[3, 1\]: give layers once"),
        ([1, 1], r"\[1, 1\]: give layers once"),
        ([-2, 1], r"has -2: it must hold indices"),
        ([True, 2], "has True"),
        (["1"], "has '1'"),
        ("12", "is '12': it must be a list"),
        ([], "must name layers of the target"),
    ],
)
def test_layers_that_cannot_be_are_refused(outputs, said):
    with pytest.raises(UserError, match=said) as caught:
        HeadConfig.from_dict(specforge(eagle_config={TAPS: outputs}))
    assert "\n" not in str(caught.value)


def test_the_last_layer_can_be_read_and_the_next_cannot():
    HeadConfig.from_dict(specforge(eagle_config={TAPS: [7]})).check_target(TARGET)
    with pytest.raises(UserError, match="reads the target after layer 9, this one has 8"):
        HeadConfig.from_dict(specforge(eagle_config={TAPS: [8]})).check_target(TARGET)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 130}, "vocabulary 128, this one has 130"),
        ({"hidden_size": 128}, "hidden size 64, this one has 128"),
        ({"num_hidden_layers": 4}, "after layer 5, this one has 4"),
    ],
)
def test_a_head_of_another_target_is_refused_with_both_values(change, said):
    with pytest.raises(UserError, match=said):
        head_config(TARGET, 60, taps=(1, 4, 5)).check_target(tiny_config(**{"num_hidden_layers": 8, **change}))


def test_what_real_files_leave_open():
    """head_dim null, no rope keys, tied embeddings said of the target, the whole vocabulary by null."""
    values = specforge(head_dim=None, tie_word_embeddings=True, draft_vocab_size=None, target_hidden_size=None)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        del values[name]
    config = HeadConfig.from_dict(values, TARGET)
    assert (config.layer.head_dim, config.layer.rope_theta, config.layer.rope_scaling) == (16, 10000.0, None)
    assert not config.layer.tie_word_embeddings and "lm_head.weight" in config.tensor_shapes()
    assert config.draft_vocab_size == 128 and not config.reduced and config.target_hidden_size == 64
