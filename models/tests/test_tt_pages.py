"""Pages of a cache that several texts share: who has which, without a board."""

import random
import re

import pytest

from models.boards import BOARDS
from models.errors import UserError
from models.llama.config import named_config
from models.speculative.model import Workload
from models.ttnn_llama.pages import Pages
from models.ttnn_llama.programs.needed import Program, programs
from models.ttnn_llama.programs.options import BoardOptions
from models.ttnn_llama.shapes import KV_BLOCK, cache_length
from models.ttnn_llama.weights.memory import check_fit, plan
from models.ttnn_llama.weights.precision import precision_named


def owners(pages, slots):
    return [page for slot in range(slots) for page in pages.of(slot)]


def test_a_page_has_one_owner_whoever_comes_and_goes():
    """1000 texts grow and end in any order: pages are enough for each, none has two owners, none is lost."""
    draw, slots = random.Random(0), 5
    pages = Pages(slots, 600, count=12)
    longest = [0] * slots
    refused = 0
    for _ in range(3000):
        slot = draw.randrange(slots)
        if draw.random() < 0.4:
            pages.release(slot)
            longest[slot] = 0
        else:
            asked, before = draw.randint(1, 600), pages.of(slot)
            try:
                pages.reserve(slot, asked)
                longest[slot] = max(longest[slot], asked)
            except UserError:
                refused += 1
                assert pages.of(slot) == before
        owned = owners(pages, slots)
        assert len(set(owned)) == len(owned) and set(owned) <= set(range(12))
        assert len(owned) + pages.free_count == 12
        assert all(len(pages.of(slot)) == -(-longest[slot] // KV_BLOCK) for slot in range(slots))
    assert refused > 100


def test_a_text_keeps_its_pages_as_it_grows():
    pages = Pages(2, 512)
    pages.reserve(0, 1)
    pages.reserve(1, 300)
    pages.reserve(0, 129)
    assert pages.of(0) == (0, 4) and pages.of(1) == (1, 2, 3)
    pages.reserve(0, 5)
    assert pages.of(0) == (0, 4)


def test_by_default_every_slot_can_be_full():
    pages = Pages(3, 640)
    for slot in range(3):
        pages.reserve(slot, 640)
    assert pages.free_count == 0 and len(owners(pages, 3)) == pages.count == 15


def test_too_few_pages_are_refused_in_one_line_with_what_would_fit():
    pages = Pages(2, 640, count=6)
    pages.reserve(0, 300)
    pages.reserve(1, 100)
    with pytest.raises(UserError, match=r"640 positions of slot 1 need 4 more .* 2 of 6 are free: 384 .* would fit"):
        pages.reserve(1, 640)


# --------------------------------------------------------------------------------------------------- shared beginnings
def test_texts_that_begin_alike_share_whole_pages_also_after_their_end():
    pages = Pages(3, 512)
    beginning = list(range(300))
    assert pages.promise(0, beginning, 400) == 0
    pages.write(0, 0, 300)
    pages.note(0, 0, beginning)
    assert pages.promise(1, [*beginning[:260], 7, 8], 300) == 256
    assert pages.of(1)[:2] == pages.of(0)[:2] and not set(pages.of(1)[2:]) & set(pages.of(0))
    assert pages.promise(2, beginning[:256], 300) == 128, "the last token has to be read"
    pages.release(0)
    pages.release(1)
    pages.release(2)
    assert pages.free_count == pages.count
    assert pages.promise(1, [*beginning[:200], 5], 201) == 128
    assert pages.promise(2, [1, *beginning], 400) == 0


def test_nobody_writes_into_a_page_that_others_have():
    pages = Pages(2, 512)
    prompt = list(range(256))
    pages.promise(0, prompt, 300)
    pages.write(0, 0, 256)
    pages.note(0, 0, prompt)
    assert pages.promise(1, [*prompt, 1], 300) == 256
    theirs = pages.of(0)
    with pytest.raises(ValueError, match="position 130 of slot 1 lies in page 1, which another text has too: go on"):
        pages.write(1, 130, 131)
    pages.write(1, 0, 200)  # read anew from its begin: pages of its own
    assert pages.of(0) == theirs and not set(pages.of(1)) & set(theirs)
    pages.write(0, 130, 131)  # its only owner: nobody finds the page any more
    pages.release(1)
    assert pages.promise(1, [*prompt, 1], 300) == 128


def test_a_promise_is_kept_and_what_can_never_be_is_refused():
    pages = Pages(3, 640, count=6)
    assert pages.promise(0, (), 500) == 0 and pages.promise(1, (), 200) == 0
    assert pages.promise(2, (), 1) is None and pages.of(2) == ()
    pages.release(1)
    assert pages.promise(2, (), 256) == 0
    with pytest.raises(UserError, match=r"769 positions need 7 pages of 128, there are 6: .* fit 768 positions"):
        pages.promise(1, (), 769)


def test_shared_pages_are_counted_whoever_comes_and_goes():
    """Random texts of few beginnings: what a page is found by is what its owner's text has there, a page that is being
    written has one owner, pages left first are taken first, and none is lost."""
    draw, slots = random.Random(3), 4
    pages = Pages(slots, 600, count=11)
    content: dict[int, list[int]] = {}
    prompts = [[draw.randrange(9) for _ in range(500)] for _ in range(3)]
    running: dict[int, tuple[list[int], int]] = {}  # by slot: text, positions promised
    shared = 0
    for _ in range(3000):
        slot = draw.randrange(slots)
        if slot in running and draw.random() < 0.4:
            pages.release(slot)
            del running[slot]
        elif slot in running:
            text, end = running[slot]
            if len(text) < end:
                position = len(text)
                pages.write(slot, position, position + 1)
                page = pages.of(slot)[position // KV_BLOCK]
                assert sum(page in pages.of(other) for other in range(slots)) == 1
                text.append(draw.randrange(9))
                content.setdefault(page, [0] * KV_BLOCK)[position % KV_BLOCK] = text[-1]
        else:
            prompt = draw.choice(prompts)[: draw.randrange(1, 450)] + [draw.randrange(9)]
            positions = len(prompt) + draw.randrange(100)
            held = pages.promise(slot, prompt, positions)
            if held is None:
                continue
            assert held % KV_BLOCK == 0 and held < len(prompt)
            shared += held > 0
            pages.write(slot, held, len(prompt))
            for position in range(held, len(prompt)):
                page = content.setdefault(pages.of(slot)[position // KV_BLOCK], [0] * KV_BLOCK)
                page[position % KV_BLOCK] = prompt[position]
            pages.note(slot, held, prompt[held:])
            running[slot] = (list(prompt), positions)
        for each, (text, _) in running.items():
            own = [content[page] for page in pages.of(each)[: -(-len(text) // KV_BLOCK)]]
            assert [token for page in own for token in page][: len(text)] == text
        assert len(set(owners(pages, slots))) + pages.free_count == 11
    assert shared > 100


# ------------------------------------------------------------------------------------------- programs, memory, refusals
def test_several_texts_have_programs_for_all_of_their_rows():
    options = BoardOptions(workload=Workload("draft"), draft_lengths=(4,), slots=4)
    needed = programs(options, [4], shared=True)
    assert needed[0] == Program("target", "ids", users=4)
    assert not any(program.what == "round" for program in needed)
    for kind in ("ids", "logits"):
        assert {Program("target", kind, 1, users=4), Program("target", kind, 5, users=4)} <= set(needed)
    assert {Program("draft", "logits", n, users=4) for n in (1, 2)} <= set(needed)
    many = programs(BoardOptions(workload=Workload("draft"), draft_lengths=(7,), slots=64), [7], shared=True)
    assert Program("target", "ids", 8, users=4) in many and Program("target", "ids", users=32) in many


@pytest.mark.parametrize("workload", [Workload("head"), Workload("first-layers"), Workload("draft", tree=True)])
def test_what_drafts_for_one_text_only_is_refused(workload):
    with pytest.raises(UserError, match="2 texts at once on a board cannot be drafted by"):
        BoardOptions(workload=workload, draft_lengths=(4,), exit_layer=1, tree_nodes=8, slots=2)


def test_memory_counts_pages():
    config, precision, board = named_config("8B"), precision_named("performance"), BOARDS["N150"]
    one, four = (plan(config, precision, 1, 8192, 0, slots=slots) for slots in (1, 4))
    assert abs(four.kv_cache - 4 * one.kv_cache) < 4 * 2 * 32 * 12 * 1088 and four.weights == one.weights
    page = 2 * 32 * 8 * KV_BLOCK * 128 // 1024 * 1088  # keys and values of all layers, bfp8
    assert abs(four.kv_cache - Pages(4, cache_length(8192)).count * page) < 2 * 32 * 12 * 1088
    with pytest.raises(UserError, match=r"or \d+ slots") as caught:
        check_fit(board, {"target": plan(config, precision, 1, 8192, 0, slots=32)})
    most = int(re.search(r"(\d+) slots", str(caught.value))[1])
    check_fit(board, {"target": plan(config, precision, 1, 8192, 0, slots=most)})
    with pytest.raises(UserError):
        check_fit(board, {"target": plan(config, precision, 1, 8192, 0, slots=most + 1)})


def test_memory_counts_the_pages_of_a_pool_and_a_refusal_names_the_largest_that_fits():
    config, precision, board = named_config("8B"), precision_named("performance"), BOARDS["N150"]
    whole, pool = (plan(config, precision, 1, 8192, 0, slots=32, pool=size) for size in (None, 20_000))
    page = 2 * 32 * 8 * KV_BLOCK * 128 // 1024 * 1088
    assert abs(pool.kv_cache - 157 * page) < 2 * 32 * 12 * 1088 and pool.weights == whole.weights
    assert plan(config, precision, 1, 8192, 0, slots=32, pool=10**7) == whole.changed(pool=10**7)
    assert whole.changed(pool=10**7).kv_cache == whole.kv_cache
    with pytest.raises(UserError, match=r"--pool-size \d+") as caught:
        check_fit(board, {"target": whole})
    most = int(re.search(r"--pool-size (\d+)", str(caught.value))[1])
    assert most > 8192
    check_fit(board, {"target": whole.changed(pool=most)})
    with pytest.raises(UserError):
        check_fit(board, {"target": whole.changed(pool=most + 1)})
