"""What every language model promises, as tests for any of them.

A test module has a class that inherits `Conformance`, or one of the others for a capability, and a fixture `subject`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.forced import ForcedDrafter
from models.speculative.engine import Engine
from models.speculative.model import IDS, LOGITS, LanguageModel, Rows, Tapped, Trees, Want
from models.speculative.sequence import Request
from models.speculative.sequence import Sequence as TextSequence

POSITIONS = (1, 6, 118, 125)  # the last ones just before a block of the cache ends


@dataclass(frozen=True)
class Subject:
    """A model and what it promises.

    Args:
        model: of random weights, so that two logits hardly ever tie.
        reference: logits [n, V] that follow n ids, by another implementation in fp32.
        error: of logits to the reference's, at most, relative to their size.
        tolerance: the same between two forwards of the model that need not agree to the last bit.
        exact: whether the bits of a row depend on its own history alone, not on the rows computed with it.
        read: makes a slot hold a prompt.
        prompts: lengths, up to one of several chunks.
        owned: what sequences under way own of a pool of pages; 0: nothing, or there is no pool.
    """

    model: LanguageModel
    reference: Callable[[list[int]], Tensor]
    error: float
    tolerance: float
    exact: bool
    read: Callable[[int, list[int]], object]
    prompts: tuple[int, ...]
    owned: Callable[[], int] = int

    def ids(self, count: int, seed: int = 0) -> list[int]:
        """Random token ids."""
        draw = random.Random(seed)
        return [draw.randrange(self.model.limits.vocabulary) for _ in range(count)]

    def logits(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None, slot: int = 0):
        """[n, V] of a forward of n rows."""
        return self.model.extend([Rows(slot, tokens, position, parents)], LOGITS).logits(0)

    def steps(self, tokens: Sequence[int], position: int, slot: int = 0) -> Tensor:
        """[n, V] of n forwards of one row."""
        return torch.cat([self.logits([token], position + i, slot=slot) for i, token in enumerate(tokens)])

    def same(self, made: Tensor, expected: Tensor) -> None:
        """Equal, to the last bit where that is promised."""
        if self.exact:
            assert torch.equal(made, expected)
        else:
            self.near(made, expected)

    def near(self, made: Tensor, expected: Tensor, error: float | None = None) -> None:
        """Equal row by row but for an error, by default the tolerance."""
        assert made.shape == expected.shape
        made, expected = made.float(), expected.float()
        errors = (made - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.max() < (self.tolerance if error is None else error), errors


def random_tree(rows: int, seed: int) -> list[int]:
    """Parents of a tree's rows."""
    draw = random.Random(seed)
    return [-1, *(draw.randrange(row) for row in range(1, rows))]


def path_to(parents: Sequence[int], row: int) -> list[int]:
    """The rows from a tree's first one down to one of them."""
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


class Conformance:
    """What is promised by every model."""

    # -------------------------------------------------------------------------------------------------------- rows
    @pytest.mark.parametrize("position", POSITIONS)
    def test_rows_of_one_forward_are_those_of_steps(self, subject: Subject, position):
        most = subject.model.limits.rows
        ids = subject.ids(position + most)
        subject.read(0, ids[:position])
        alone = subject.steps(ids[position:], position)
        for n in sorted({2, 5, most}):
            subject.same(subject.logits(ids[position : position + n], position), alone[:n])

    def test_logits_are_those_of_the_reference(self, subject: Subject):
        n = subject.model.limits.rows
        for position in POSITIONS:
            ids = subject.ids(position + n, seed=position)
            subject.read(0, ids[:position])
            expected = subject.reference(ids)[position:]
            subject.near(subject.logits(ids[position:], position), expected, subject.error)

    def test_ids_are_those_of_the_greatest_logits(self, subject: Subject):
        ids = subject.ids(30 + subject.model.limits.rows, seed=1)
        subject.read(0, ids[:30])
        rows = [Rows(0, ids[30:], 30)]
        with_logits = subject.model.extend(rows, LOGITS)
        chosen = with_logits.logits(0).argmax(-1).tolist()
        assert with_logits.ids() == [chosen]
        assert subject.model.extend(rows, IDS).ids() == [chosen]
        assert subject.model.extend([rows[0]._replace(last=True)], IDS).ids() == [chosen[-1:]]
        assert len(set(chosen)) > 1

    def test_rows_that_were_computed_for_ids_have_no_logits(self, subject: Subject):
        subject.read(0, subject.ids(3))
        for last in (False, True):
            with pytest.raises(ValueError, match="ask for logits"):
                subject.model.extend([Rows(0, [1, 2], 3, last=last)], IDS).logits(0)

    # ----------------------------------------------------------------------------------------------------- prompts
    def test_a_prompt_is_prefill(self, subject: Subject):
        for length in subject.prompts:
            prompt = subject.ids(length, seed=length)
            subject.read(0, prompt)
            step = subject.model.extend([Rows(0, prompt, 0, last=True)], LOGITS)
            assert torch.equal(step.logits(0), subject.model.slot(0).prefill(prompt)[None])
            assert step.ids() == [[int(step.logits(0).argmax())]]
            assert subject.model.extend([Rows(0, prompt, 0, last=True)], IDS).ids() == step.ids()
            subject.near(step.logits(0), subject.reference(prompt)[-1:], subject.error)

    def test_a_prompt_may_come_in_pieces(self, subject: Subject):
        """Of any length, also of more rows than a forward has."""
        ids = subject.ids(2 * subject.model.limits.rows + 24, seed=2)
        expected = subject.reference(ids)
        for first, last in ((10, 13), (10, len(ids) - 1)):
            subject.read(0, ids[:first])
            step = subject.model.extend([Rows(0, ids[first:last], first, last=True)], LOGITS)
            subject.near(step.logits(0), expected[last - 1 : last], subject.error)
            subject.near(subject.logits(ids[last : last + 1], last), expected[last : last + 1], subject.error)

    # ---------------------------------------------------------------------------------------------------- rollback
    def test_going_back_is_passing_an_earlier_position(self, subject: Subject):
        """Whatever was written beyond: other rows, and rows behind those."""
        n, position = min(4, subject.model.limits.rows), 126
        ids, other = subject.ids(position + n, seed=3), subject.ids(40, seed=4)
        subject.read(0, ids[:position])
        before = subject.logits(ids[position:], position)
        for start in range(position, position + 12, n):
            subject.logits(other[start - position : start - position + n], start)
        assert torch.equal(subject.logits(ids[position:], position), before)
        subject.near(
            subject.logits(ids[position - 2 : position], position - 2),
            subject.reference(ids)[position - 2 : position],
            subject.error,
        )

    def test_a_text_after_another_is_as_if_it_were_the_first(self, subject: Subject):
        """Also a shorter one, after its slot was given back."""
        for length in (90, 140, 20):
            ids = subject.ids(length + 1, seed=length)
            subject.read(0, ids[:-1])
            subject.near(subject.logits(ids[-1:], length), subject.reference(ids)[-1:], subject.error)
            subject.model.free(0)

    # ------------------------------------------------------------------------------------------------------ limits
    def test_limits_are_what_it_can_compute(self, subject: Subject):
        rows, slots, positions, vocabulary, *_ = subject.model.limits
        ids = subject.ids(positions, seed=5)
        for slot in range(slots):
            subject.read(slot, ids[: positions - rows])
            assert subject.logits(ids[-rows:], positions - rows, slot=slot).shape == (rows, vocabulary)

    def test_what_exceeds_the_limits_is_refused_in_one_line(self, subject: Subject):
        rows, slots, positions, *_ = subject.model.limits
        subject.read(0, subject.ids(positions - 1))
        for tokens, position in (
            ([1] * (rows + 1), 0),
            ([1], positions),
            ([1, 2], positions - 1),
            ([1], -1),
            ([], 3),
        ):
            for want in (IDS, LOGITS):
                with pytest.raises(UserError) as caught:
                    subject.model.extend([Rows(0, tokens, position)], want)
                assert "\n" not in str(caught.value) and ":" in str(caught.value), (tokens, position)
        with pytest.raises(IndexError):
            subject.model.slot(slots)
        with pytest.raises(ValueError, match="several Rows of one slot"):
            subject.model.extend([Rows(0, [1], 3), Rows(0, [2], 4)])

    def test_it_says_what_it_cannot_do(self, subject: Subject):
        model = subject.model.slot(0)
        subject.read(0, [1, 2, 3])
        if not isinstance(model, Trees):
            with pytest.raises(ValueError, match="computes no trees"):
                subject.model.extend([Rows(0, [1, 2], 3, [-1, 0])])
        if not isinstance(model, Tapped):
            with pytest.raises(ValueError, match="keeps no hidden states"):
                subject.model.extend([Rows(0, [1, 2], 3)], Want(taps=(0,)))
        with pytest.raises(ValueError, match="without their hidden states"):
            subject.model.extend([Rows(0, [1, 2], 3)]).features(0)


class TreeConformance:
    """What is promised by models that have `Trees`."""

    def test_each_row_of_a_tree_is_the_last_of_its_own_path(self, subject: Subject):
        for seed, position in enumerate(POSITIONS):
            n = min(8, subject.model.limits.rows)
            parents, tokens = random_tree(n, seed), subject.ids(n, seed=20 + seed)
            prompt = subject.ids(position, seed=seed)
            subject.read(0, prompt)
            tree = subject.logits(tokens, position, parents)
            for row in range(n):
                path = [tokens[i] for i in path_to(parents, row)]
                subject.near(tree[row : row + 1], subject.logits(path, position)[-1:])

    def test_a_tree_grows_by_further_rows(self, subject: Subject):
        n, position = min(8, subject.model.limits.rows), 40
        parents, tokens = random_tree(n, 7), subject.ids(n, seed=8)
        subject.read(0, subject.ids(position, seed=7))
        whole = subject.logits(tokens, position, parents)
        levels = [subject.logits(tokens[a:b], position, parents[:b]) for a, b in pairwise((0, 1, 4, n))]
        subject.near(torch.cat(levels), whole)

    def test_a_kept_path_is_the_text_that_goes_on(self, subject: Subject):
        """Rows that could not be kept are fed again, with what follows."""
        n, position = min(8, subject.model.limits.rows), 124
        for seed in range(4):
            parents, tokens = random_tree(n, seed), subject.ids(n, seed=30 + seed)
            text = subject.ids(position, seed=seed)
            subject.read(0, text)
            subject.logits(tokens, position, parents)
            path = path_to(parents, n - 1)
            held = subject.model.slot(0).keep(position, path)
            assert 1 <= held <= len(path)
            text += [tokens[row] for row in path] + [5]
            made = subject.logits(text[position + held :], position + held)
            subject.near(made[-1:], subject.reference(text)[-1:], subject.error)

    def test_a_tree_needs_room_for_its_levels_not_for_its_rows(self, subject: Subject):
        rows, _, positions, *_ = subject.model.limits
        position = positions - 2
        ids = subject.ids(positions, seed=9)
        subject.read(0, ids[:position])
        tokens, parents = [ids[position], *subject.ids(rows - 1, seed=10)], [-1, *[0] * (rows - 1)]
        tree = subject.logits(tokens, position, parents)
        subject.near(tree[rows - 1 :], subject.logits([tokens[0], tokens[-1]], position)[1:])
        with pytest.raises(UserError, match="do not fit the context"):
            subject.logits([1, 2, 3], position, [-1, 0, 1])
        with pytest.raises(UserError):
            subject.logits([1], 3, [-1, *[0] * rows])


class SlotConformance:
    """What is promised by models that have several slots: none sees another."""

    def test_texts_in_turn_are_what_each_is_alone(self, subject: Subject):
        slots = range(subject.model.limits.slots)
        assert len(slots) > 1
        texts = [subject.ids(60 + 70 * slot, seed=slot) for slot in slots]
        starts = [len(text) - 20 for text in texts]
        alone = []
        for slot in slots:
            subject.read(slot, texts[slot][: starts[slot]])
            alone.append(subject.steps(texts[slot][starts[slot] :], starts[slot], slot))
            subject.model.free(slot)
        step = subject.model.extend(
            [Rows(slot, texts[slot][: starts[slot]], 0, last=True) for slot in reversed(slots)], LOGITS
        )
        assert len(step.ids()) == len(slots)
        for i in range(20):
            rows = [Rows(slot, [texts[slot][starts[slot] + i]], starts[slot] + i) for slot in slots]
            step = subject.model.extend(rows, LOGITS)
            for slot in slots:
                subject.same(step.logits(slot), alone[slot][i : i + 1])

    def test_going_back_and_ending_in_one_slot_changes_no_other(self, subject: Subject):
        ids, other = subject.ids(60, seed=1), subject.ids(60, seed=2)
        n = min(5, subject.model.limits.rows)
        subject.read(0, ids[:40])
        before = subject.steps(ids[40:], 40)
        subject.read(0, ids[:40])
        for i in range(20):
            subject.read(1, other[: 10 + i])
            subject.logits(other[:n], 5, slot=1)
            subject.model.free(1)
            assert torch.equal(subject.logits([ids[40 + i]], 40 + i), before[i : i + 1])

    def test_a_slot_that_was_given_back_is_as_new(self, subject: Subject):
        ids = subject.ids(50, seed=3)
        subject.read(1, ids[:-1])
        fresh = subject.logits(ids[-1:], 49, slot=1)
        subject.model.free(1)
        subject.read(1, subject.ids(150, seed=4))
        subject.model.free(1)
        subject.read(1, ids[:-1])
        assert torch.equal(subject.logits(ids[-1:], 49, slot=1), fresh)

    # ------------------------------------------------------------------------------------------ several in one engine
    def test_the_last_positions_of_a_context_in_all_slots_at_once(self, subject: Subject):
        """Ragged: of each slot another number of rows, all of which end with the context."""
        rows, slots, positions, *_, most = subject.model.limits
        counts = [max(1, min(rows, (most or slots * rows) // slots) - slot) for slot in range(slots)]
        ends = [positions - count for count in counts]
        texts = [subject.ids(positions, seed=40 + slot) for slot in range(slots)]
        alone = []
        for slot, end in enumerate(ends):
            subject.read(slot, texts[slot][:end])
            alone.append(subject.logits(texts[slot][end:], end, slot=slot))
            subject.logits(subject.ids(counts[slot], seed=50 + slot), end, slot=slot)
        step = subject.model.extend([Rows(slot, texts[slot][end:], end) for slot, end in enumerate(ends)], LOGITS)
        for slot in range(slots):
            subject.same(step.logits(slot), alone[slot])
        with pytest.raises(UserError):
            subject.model.extend([Rows(0, [1], positions - 1), Rows(1, [1, 2], positions - 1)], LOGITS)
        subject.same(subject.logits(texts[0][ends[0] :], ends[0]), alone[0])

    def test_texts_end_with_the_context_side_by_side(self, subject: Subject):
        left = 4
        prompts = [
            subject.ids(subject.model.limits.positions - left + slot % 2, seed=60 + slot)
            for slot in range(subject.model.limits.slots)
        ]
        texts = [_written(subject, [prompt])[0] for prompt in prompts]
        assert [len(text) for text in texts] == [left - slot % 2 for slot in range(len(prompts))]
        assert _written(subject, prompts, texts) == texts

    def test_an_abort_at_any_step_gives_all_pages_back_and_changes_no_other_text(self, subject: Subject):
        """Of a text that waits, is read, or is written; another one that waited takes its slot."""
        slots = subject.model.limits.slots
        prompts = [subject.ids(length, seed=70 + length) for length in (20, 45, 11, 33)[: slots + 1]]
        texts = [_written(subject, [prompt])[0] for prompt in prompts]
        ended = []
        while ended[-1:] != ["length"]:
            found, reason = _aborted(subject, prompts, texts, victim=1, step=len(ended))
            assert found[1] == texts[1][: len(found[1])]
            assert found[:1] + found[2:] == texts[:1] + texts[2:], len(ended)
            ended.append(reason)
        assert len(ended) > 5 and ended[-1] == "length"


NEW_TOKENS = 6


def _request(subject: Subject, prompt: list[int], text: list[int] | None) -> Request:
    """With its own next tokens as drafts, most of them right, where these are known."""
    new = min(NEW_TOKENS, subject.model.limits.positions - len(prompt))
    if text is None:
        return Request(prompt, max_new_tokens=new + 1)
    vocabulary = subject.model.limits.vocabulary
    drafter = PerSequence(lambda sequence: ForcedDrafter(text, len(prompt), 0.7, vocabulary, seed=len(prompt)))
    return Request(prompt, max_new_tokens=new + 1, drafter=drafter, controller=FixedDraftLength(2))


def _new(sequence: TextSequence) -> list[int]:
    assert sequence.error is None, sequence.error
    return sequence.tokens[len(sequence.request.prompt) :]


def _written(subject: Subject, prompts: list[list[int]], texts: Sequence[list[int]] = ()) -> list[list[int]]:
    """Texts written side by side, with drafts where what follows is known."""
    engine = Engine(subject.model)
    sequences = [engine.add(_request(subject, prompt, texts[i] if texts else None)) for i, prompt in enumerate(prompts)]
    while not engine.idle:
        engine.step()
    assert subject.owned() == 0
    return [_new(each) for each in sequences]


def _aborted(
    subject: Subject, prompts: list[list[int]], texts: list[list[int]], victim: int, step: int
) -> tuple[list[list[int]], str]:
    """What was written of all, and how one of them ended, which was aborted before a step if it had not ended."""
    engine = Engine(subject.model, prompt_rows=16)
    sequences = [engine.add(_request(subject, *each)) for each in zip(prompts, texts, strict=True)]
    steps = 0
    while not engine.idle:
        if steps == step:
            engine.abort(sequences[victim])
        engine.step()
        steps += 1
    assert subject.owned() == 0
    return [_new(each) for each in sequences], sequences[victim].stats.finish_reason
