"""TtnnLlama, its first layers and BatchLlama keep what every language model promises."""

import dataclasses

import pytest

from models.speculative.model import Rows, Tapped, Want
from models.tests.conformance import Conformance, SlotConformance, Subject, TreeConformance
from models.tests.ttnn.model_fixtures import Weights, hf_logits, reduced
from models.tests.ttnn.test_batch import batch_of
from models.ttnn_llama.shapes import PREFILL_CHUNK

# Their programs have tests of their own on every board; what is promised above them is the same on all.
pytestmark = pytest.mark.key_boards

LAYERS, EXIT = 2, 1
CONTEXT = PREFILL_CHUNK + 96
PROMPTS = (1, 130, PREFILL_CHUNK + 6)


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), LAYERS), sharp=False)


@pytest.fixture(scope="module")
def model(mesh, weights):
    return weights.on(mesh, max_seq_len=CONTEXT)


@pytest.fixture
def whole(model, weights):
    """All layers."""
    return subject_of(model, weights, model)


@pytest.fixture
def first(model, weights):
    """The first layers, in the whole model's cache."""
    config = dataclasses.replace(weights.config, num_hidden_layers=EXIT)
    kept = Weights(config, {name: weights[name] for name in config.tensor_shapes()})
    return subject_of(model.first_layers(EXIT), kept, model)


def subject_of(model, weights, reader):
    return Subject(
        model,
        lambda ids: hf_logits(weights, ids),
        error=0.05,
        tolerance=0.03,
        exact=True,
        read=lambda slot, ids: reader.prefill(ids),
        prompts=PROMPTS,
    )


class TestWholeModel(Conformance, TreeConformance):
    @pytest.fixture
    def subject(self, whole):
        return whole

    def test_hidden_states_are_kept_where_a_head_asked_for_them(self, subject):
        assert isinstance(subject.model.slot(0), Tapped)
        with pytest.raises(ValueError, match=r"no states are kept after layers \(1,\): call keep_states"):
            subject.model.extend([Rows(0, [1], 0)], Want(taps=(1,)))


class TestFirstLayers(Conformance):
    @pytest.fixture
    def subject(self, first):
        return first


class TestSeveralSlots(Conformance, SlotConformance):
    @pytest.fixture(scope="class")
    def several(self, mesh, weights):
        return batch_of(weights, mesh, 2, max_seq_len=CONTEXT)

    @pytest.fixture
    def subject(self, several, weights):
        subject = subject_of(several, weights, several)
        return dataclasses.replace(
            subject,
            read=lambda slot, ids: several.slot(slot).prefill(ids),
            owned=lambda: several.pages.count - several.pages.free_count,
        )

    @pytest.fixture(autouse=True)
    def empty(self, several):
        """No text is under way when a test begins."""
        for slot in range(several.slots):
            several.free(slot)
