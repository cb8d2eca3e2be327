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
