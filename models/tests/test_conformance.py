"""TorchLlama, its first layers and its slots keep what every language model promises."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.errors import UserError
from models.speculative.model import LOGITS, OneSlot, Rows, Want
from models.tests.conformance import Conformance, SlotConformance, Subject, TreeConformance
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config
from models.torch_llama.model import PREFILL_CHUNK, TorchLlama

CONFIG = tiny_config(num_hidden_layers=3, max_position_embeddings=1024)
TENSORS = random_tensors(CONFIG, 0)
CONTEXT = 720
PROMPTS = (1, 5, 130, PREFILL_CHUNK + 90)
FP32 = {"dtype": "fp32"}
BF16 = {"dtype": "bf16", "fixed_rows": 7}
BF16_ALIKE = {"dtype": "bf16", "row_invariant": True}
FP32_FIXED = {"dtype": "fp32", "fixed_rows": 7}
COMPILED = {"dtype": "fp32", "compiled": True}
COMPILED_BF16 = {"dtype": "bf16", "compiled": True}
# Sharp attention makes much of bf16's rounding.
ACCURACY = {"fp32": {"error": 1e-5, "tolerance": 1e-5}, "bf16": {"error": 0.15, "tolerance": 0.1}}
EXIT = 2

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(layers=CONFIG.num_hidden_layers):
    """Hugging Face's model of these weights, or of the first layers of them."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
    tensors = {name: TENSORS[name] for name in config.tensor_shapes()}
    return hf_model(config, tensors)


def logits_of(hf):
    @torch.no_grad()
    def logits(ids):
        return hf(torch.tensor([ids])).logits[0]

    return logits


def build(**options):
    return TorchLlama(CONFIG, TENSORS, max_seq_len=CONTEXT, **options)


def subject_of(model, options, *, layers=CONFIG.num_hidden_layers, read=None):
    return Subject(
        model,
        logits_of(reference(layers)),
        read=read or (lambda slot, ids: model.slot(slot).prefill(ids)),
        prompts=PROMPTS,
        exact=model.row_invariant if isinstance(model, TorchLlama) else "fixed_rows" in options,
        owned=lambda: model.cache.usage.live if isinstance(model, TorchLlama) else 0,
        **ACCURACY[options["dtype"]],
    )


def one_slot(options):
    model = build(**options)
    return subject_of(OneSlot(model), options)


def first_layers(options):
    model = build(**options)
    return subject_of(model.first_layers(EXIT), options, layers=EXIT, read=lambda slot, ids: model.prefill(ids))


WHOLE = {
    "fp32": lambda: subject_of(build(**FP32), FP32),
    "bf16, fixed rows": lambda: subject_of(build(**BF16), BF16),
    "bf16, rows as they come": lambda: subject_of(build(**BF16_ALIKE), BF16_ALIKE),
    "fp32, fixed rows": lambda: subject_of(build(**FP32_FIXED), FP32_FIXED),
    "two slots": lambda: subject_of(build(**FP32, slots=2), FP32),
    "two slots, fixed rows": lambda: subject_of(build(**BF16, slots=2), BF16),
    "two slots, rows as they come": lambda: subject_of(build(**BF16_ALIKE, slots=2), BF16_ALIKE),
    "one slot": lambda: one_slot(FP32),
    "compiled": lambda: subject_of(build(**COMPILED), COMPILED),
    "two slots, compiled bf16": lambda: subject_of(build(**COMPILED_BF16, slots=2), COMPILED_BF16),
}
FIRST = {
    "first layers": lambda: first_layers(FP32),
    "first layers, fixed rows": lambda: first_layers(BF16),
    "first layers, rows as they come": lambda: first_layers(BF16_ALIKE),
    "first layers, compiled": lambda: first_layers(COMPILED_BF16),
}


@pytest.fixture(scope="module")
def built():
    """Subjects by name, each built once."""
    return {}


@pytest.fixture
def subject(request, built):
    if request.param not in built:
        built[request.param] = (WHOLE | FIRST)[request.param]()
    return built[request.param]


@pytest.mark.parametrize("subject", [*WHOLE, *FIRST], indirect=True)
class TestEveryModel(Conformance):
    pass


@pytest.mark.parametrize("subject", WHOLE, indirect=True)
class TestTrees(TreeConformance):
    pass


@pytest.mark.parametrize(
    "subject",
    ["two slots", "two slots, fixed rows", "two slots, rows as they come", "two slots, compiled bf16"],
    indirect=True,
)
class TestSlots(SlotConformance):
    @pytest.fixture(autouse=True)
    def empty(self, subject):
        """No text is under way when a test begins."""
        for slot in range(subject.model.limits.slots):
            subject.model.free(slot)


@pytest.mark.parametrize("subject", WHOLE, indirect=True)
class TestFeatures:
    """Hidden states on their way, for what drafts from them."""

    TAPS = (0, 1, CONFIG.num_hidden_layers)

    @pytest.fixture(scope="class")
    def states(self):
        """Ids -> what Hugging Face has before the first layer and after each, [n, taps x H]."""
        hf = reference()
        last = []
        hf.model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))

        @torch.no_grad()
        def of(ids, taps=self.TAPS):
            last.clear()
            found = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
            normed = hf.model.norm(last[0])
            assert torch.equal(found[-1], normed)  # they end with the norm, our taps before it
            return torch.cat([[*found[:-1], last[0]][tap][0] for tap in taps], -1)

        return of

    def test_they_are_those_of_the_reference(self, subject, states):
        """Of prompts of one chunk and of several, of one row and of all rows that a forward has."""
        model, want = subject.model, Want(logits=True, taps=self.TAPS)
        most = model.limits.rows
        for length in subject.prompts:
            ids = subject.ids(length + most, seed=length)
            expected = states(ids)
            step = model.extend([Rows(0, ids[:length], 0, last=True)], want)
            assert step.features(0).shape == (length, len(self.TAPS) * CONFIG.hidden_size)
            subject.near(step.features(0), expected[:length], subject.error)
            for n in (1, most):
                step = model.extend([Rows(0, ids[length : length + n], length)], want)
                subject.near(step.features(0), expected[length : length + n], subject.error)
                assert len(step.logits(0)) == n

    def test_the_first_one_is_the_embedding(self, subject):
        ids = subject.ids(40)
        step = subject.model.extend([Rows(0, ids, 0, last=True)], LOGITS._replace(taps=(0,)))
        table = TENSORS["model.embed_tokens.weight"]
        assert torch.equal(step.features(0), table[ids].to(step.features(0).dtype))

    def test_they_come_in_the_order_that_was_asked_for(self, subject, states):
        ids = subject.ids(40)
        step = subject.model.extend([Rows(0, ids, 0, last=True)], LOGITS._replace(taps=(2, 0)))
        subject.near(step.features(0), states(ids, (2, 0)), subject.error)

    def test_the_head_makes_the_logits_of_the_last_one(self, subject):
        subject.read(0, subject.ids(10))
        step = subject.model.extend([Rows(0, [1, 2, 3], 10)], LOGITS._replace(taps=(CONFIG.num_hidden_layers,)))
        hidden = F.rms_norm(
            step.features(0).float(), (CONFIG.hidden_size,), TENSORS["model.norm.weight"], CONFIG.rms_norm_eps
        )
        subject.near(step.logits(0), hidden @ TENSORS["lm_head.weight"].T, subject.tolerance)

    def test_rows_that_first_layers_have_drafted_have_them_too(self, subject, states):
        model, ids = subject.model.slot(0), subject.ids(44, seed=6)
        subject.read(0, ids[:40])
        model.first_layers(EXIT).forward(ids[40:44], 40)
        step = subject.model.extend([Rows(0, ids[40:44], 40)], LOGITS._replace(taps=self.TAPS))
        subject.near(step.features(0), states(ids)[40:], subject.error)
        subject.near(step.logits(0), subject.reference(ids)[40:], subject.error)

    def test_a_forward_with_them_has_the_logits_of_one_without(self, subject):
        ids = subject.ids(43, seed=7)
        subject.read(0, ids[:40])
        without = subject.logits(ids[40:], 40)
        step = subject.model.extend([Rows(0, ids[40:], 40)], LOGITS._replace(taps=self.TAPS))
        assert torch.equal(step.logits(0), without)
        with pytest.raises(ValueError, match="without their hidden states"):
            subject.model.extend([Rows(0, ids[40:], 40)]).features(0)

    def test_each_sequence_has_its_own(self, subject, states):
        slots = range(subject.model.limits.slots)
        texts = [subject.ids(20 + 30 * slot, seed=slot) for slot in slots]
        step = subject.model.extend(
            [Rows(slot, texts[slot], 0, last=True) for slot in slots], LOGITS._replace(taps=self.TAPS)
        )
        for slot in slots:
            subject.near(step.features(slot), states(texts[slot]), subject.error)

    @pytest.mark.parametrize("layer", [-1, CONFIG.num_hidden_layers + 1])
    def test_a_layer_that_is_not_there_is_refused_in_one_line(self, subject, layer):
        with pytest.raises(UserError, match=f"tap after layer {layer}: the model has layers 0 .*to 3"):
            subject.model.extend([Rows(0, [1, 2], 0, last=True)], LOGITS._replace(taps=(layer,)))
