"""Pages of a cache that several texts share: who has which, without a board."""

import random

import pytest

from models.errors import UserError
from models.ttnn_llama.pages import Pages
from models.ttnn_llama.shapes import KV_BLOCK


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
