"""A paged KV cache: keys and values of many sequences in blocks of one pool.

Every slot has a table of blocks, KV_BLOCK positions each. Where its blocks lie one behind the other, which is the rule,
attention reads them as a view; else it gathers them. A sequence's blocks are placed together when they are promised,
and a sequence that cannot grow where it is moves, once.

Blocks that are full of known tokens can be found by their content: the hash of these tokens, chained to the hash of
those before. A sequence that begins with the same tokens shares them (they count their owners), also after their
owners have ended: blocks without an owner stay until the space is needed, the least recently used go first. Nobody
writes into a block that others own, or that can be found: a writer takes it out of the index, or copies it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from models.errors import UserError
from models.memory import LazyZeros

KV_BLOCK = 128


def blocks_of(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // KV_BLOCK)


def block_end(positions: int) -> int:
    """Positions of the whole blocks that hold so many: what attention reads."""
    return blocks_of(positions) * KV_BLOCK


@dataclass(frozen=True)
class CacheUsage:
    """What a cache holds, in bytes.

    Args:
        held: memory that has been written, of sequences under way and of those that have ended.
        live: the part of it that belongs to sequences under way; what they share counts once.
        capacity: of the whole pool.
        wanted: what all slots would take with sequences of the longest context.
        position: of one position of one sequence.
    """

    held: int
    live: int
    capacity: int
    wanted: int
    position: int


@dataclass
class Table:
    """Where one slot's positions lie.

    Args:
        blocks: of the pool, in the order of positions.
        start: pool position of its position 0, if its blocks lie one behind the other; else None.
        tokens: known ones from position 0 on, whose keys and values have the bits of a prompt read anew.
        digests: of its leading blocks that are full of known tokens; these may be shared or found.
    """

    blocks: list[int] = field(default_factory=list)
    start: int | None = None
    tokens: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    _index: torch.Tensor | None = None

    def changed(self) -> None:
        """To be called when the blocks have changed."""
        first = self.blocks[0] if self.blocks else 0
        together = self.blocks == list(range(first, first + len(self.blocks)))
        self.start, self._index = (first * KV_BLOCK if together else None), None

    def index(self, device: torch.device) -> torch.Tensor:
        """The blocks as a tensor."""
        if self._index is None:
            self._index = torch.tensor(self.blocks, dtype=torch.long, device=device)
        return self._index

    def at(self, position: int) -> int:
        """Where a position lies in the pool."""
        block, offset = divmod(position, KV_BLOCK)
        return self.blocks[block] * KV_BLOCK + offset

    def spans(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Positions start..end-1 as runs in the pool: (how far from start, pool position, length)."""
        if self.start is not None:
            return [(0, self.start + start, end - start)]
        edges = [start, *range((start // KV_BLOCK + 1) * KV_BLOCK, end, KV_BLOCK), end]
        return [(a - start, self.at(a), b - a) for a, b in zip(edges, edges[1:], strict=False)]


class KVCache:
    """Keys and values of several sequences in one pool of blocks.

    Args:
        layers: of the model.
        width: KV heads, keys and values counted apart.
        dim: of a head.
        dtype, device: of the numbers.
        slots: sequences.
        positions: of each at most.
        spare: positions that a forward may write beyond them (a tree's rows).
        pool: positions of all sequences together (default: as many as they may have); at least one block.
        unit: positions in whole numbers of which a beginning may be shared: multiples of KV_BLOCK; 0: none.
        key_group: positions whose keys are stored together, as [D, key_group]: compiled layers read them so.

    Attributes:
        pool: [layers, 2 KV, P, D]: the keys of all heads, then the values. In memory the positions of a head lie side
            by side: attention reads them up to twice as fast so.
        tables: one for each slot.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
        positions: int,
        spare: int,
        pool: int | None = None,
        unit: int = 0,
        key_group: int = 1,
    ) -> None:
        self.key_group = key_group
        self.slots, self.positions, self.spare, self.unit = slots, positions, spare, unit
        self.device = device
        self.home = blocks_of(positions + spare)  # blocks of the longest sequence
        count = slots * self.home
        if pool is not None:
            count = min(count, blocks_of(pool + spare))
        self.limit = slots * positions if count == slots * self.home else min(pool or 0, count * KV_BLOCK - spare)
        self._storage = LazyZeros((layers, width, count * KV_BLOCK, dim), dtype, device)
        self.pool = self._storage.tensor
        self.position_bytes = layers * width * dim * dtype.itemsize
        self.tables = [Table() for _ in range(slots)]
        self._owners = [0] * count
        self._digest: list[bytes | None] = [None] * count  # of what can be found in a block
        self._left = [0] * count  # when its last owner left a block that can be found; 0: never
        self._written = bytearray(count)
        self._found: dict[bytes, int] = {}  # blocks by digest
        self._idle = count  # blocks without an owner
        self._clock = 0

    # ----------------------------------------------------------------------------------------------- accounting
    @property
    def usage(self) -> CacheUsage:
        """What it holds now."""
        block = self.position_bytes * KV_BLOCK
        written = [owners for owners, written in zip(self._owners, self._written, strict=True) if written]
        return CacheUsage(
            held=block * (len(written) if self._storage.lazy else len(self._owners)),
            live=block * sum(owners > 0 for owners in written),
            capacity=block * len(self._owners),
            wanted=block * self.slots * self.home,
            position=self.position_bytes,
        )

    @property
    def idle(self) -> int:
        """Positions in blocks that no sequence owns."""
        return self._idle * KV_BLOCK

    # ------------------------------------------------------------------------------------------------ sequences
    def reserve(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Promise a slot so many positions for a sequence that begins with these tokens.

        Returns:
            How many of the tokens it holds already, at most all but one; None where there is not room enough now.

        Raises:
            UserError: for more positions than there ever are.
        """
        needed = blocks_of(positions + self.spare)
        if positions > self.limit or needed > len(self._owners):
            raise UserError(
                f"a sequence of {positions} positions exceeds the pool of {self.limit}: shorten it or raise --pool-size"
            )
        self.free(slot)
        shared = self._match(tokens)
        rest = needed - len(shared)
        if rest > self._idle - sum(not self._owners[block] for block in shared):
            return None
        alone = not any(self._owners[block] for block in shared)
        place = self._place(slot, needed, shared) if alone else None
        self._own(shared)
        table = self.tables[slot]
        if place:
            self._take(set(place) - set(shared))
            if place[0] not in shared:  # the beginning moves to where the whole sequence has room
                self._copy(shared, place[: len(shared)])
                self._leave(shared, keep=False)
            table.blocks = place
        else:
            more = self._place(slot, rest, ()) or self._scattered(rest)
            self._take(set(more))
            table.blocks = [*shared, *more]
        table.changed()
        table.tokens = list(tokens[: len(shared) * KV_BLOCK])
        table.digests = _digests(table.tokens)
        for block, digest in zip(table.blocks, table.digests, strict=False):
            self._name(block, digest)
        return len(table.tokens)

    def free(self, slot: int) -> None:
        """Give a slot's blocks back: those that can be found stay until the space is needed."""
        table = self.tables[slot]
        if table.blocks:
            self._leave(table.blocks)
            self.tables[slot] = Table()

    def write(self, slot: int, start: int, end: int) -> Table:
        """Make a slot's positions start..end-1 its own to be written, and take blocks for them: its table.

        Raises UserError where the pool is full.
        """
        table = self.tables[slot]
        first, last = start // KV_BLOCK, (end - 1) // KV_BLOCK
        if last >= len(table.blocks):
            self._grow(slot, last + 1)
        if first < len(table.digests):
            self._own_again(table, start, end)
        for block in table.blocks[first : last + 1]:
            self._written[block] = 1
        if start < len(table.tokens):
            del table.tokens[start:]
        return table

    def fill(self, value: float) -> None:
        """Write all of the pool, for measurements: memory that was never written is read faster than any other."""
        self.pool.fill_(value)
        self._written = bytearray(b"\1") * len(self._written)

    def note(self, slot: int, position: int, tokens: Sequence[int]) -> None:
        """Tokens have been written at a position, with the bits of a prompt read anew."""
        table = self.tables[slot]
        if position != len(table.tokens) or not self.unit:
            return
        table.tokens.extend(tokens)
        while len(table.tokens) // KV_BLOCK > (full := len(table.digests)):
            block = table.tokens[full * KV_BLOCK : (full + 1) * KV_BLOCK]
            digest = _digest(table.digests[-1] if full else b"", block)
            table.digests.append(digest)
            self._name(table.blocks[full], digest)

    def keep(self, slot: int, position: int, rows: Sequence[int]) -> None:
        """Move the rows of a tree at a position to position, position+1, .. ."""
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))  # those before are in their places
        if moved < len(rows):
            table = self.tables[slot]
            to = [table.at(position + i) for i in range(moved, len(rows))]
            self._move([table.at(position + row) for row in rows[moved:]], to)

    def _move(self, places: Sequence[int], to: Sequence[int]) -> None:
        """Copy keys and values from some places of the pool to others."""
        if self.key_group == 1:
            self.pool[:, :, to] = self.pool[:, :, places]
            return
        kv_heads = self.pool.shape[1] // 2
        keys = self.pool[:, :kv_heads].view(len(self.pool), kv_heads, -1, self.pool.shape[-1], self.key_group)
        values = self.pool[:, kv_heads:]
        values[:, :, to] = values[:, :, places]
        old, new, group = torch.tensor(places), torch.tensor(to), self.key_group
        keys[:, :, new // group, :, new % group] = keys[:, :, old // group, :, old % group]

    def _grouped(self, keys: torch.Tensor) -> torch.Tensor:
        """[.., P / group, D, group] of keys [.., P, D] as they are stored: a view."""
        return keys.reshape(*keys.shape[:-2], -1, keys.shape[-1], self.key_group)

    def in_order(self, kv: torch.Tensor) -> torch.Tensor:
        """Keys and values [.., 2 KV, P, D] as they are stored, with each key by itself."""
        if self.key_group == 1:
            return kv
        keys, values = kv.chunk(2, dim=-3)
        return torch.cat((self._grouped(keys).transpose(-1, -2).reshape(keys.shape), values), dim=-3)

    # -------------------------------------------------------------------------------------------------- reading
    def gather(self, kv: torch.Tensor, table: Table, length: int) -> torch.Tensor:
        """[2 KV, length, D] of one layer's pool kv [2 KV, P, D]: a view, where a table's blocks lie together."""
        if table.start is not None:
            return kv[:, table.start : table.start + length]
        width, _, dim = kv.shape
        index = table.index(self.device)[: length // KV_BLOCK]
        return kv.view(width, -1, KV_BLOCK * dim).index_select(1, index).view(width, length, dim)

    # ------------------------------------------------------------------------------------------------ internals
    def _match(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of a text, all but its last token."""
        found: list[int] = []
        if self.unit and self._found:
            digest = b""
            for start in range(0, len(tokens) - KV_BLOCK, KV_BLOCK):
                digest = _digest(digest, tokens[start : start + KV_BLOCK])
                block = self._found.get(digest)
                if block is None:
                    break
                found.append(block)
            del found[len(found) - len(found) % (self.unit // KV_BLOCK) :]
        return found

    def _place(self, slot: int, count: int, shared: Sequence[int]) -> list[int] | None:
        """A run of blocks without owner for a sequence of which some hold the beginning.

        It is where the beginning is, if there is room behind it; else another run: the slot's own if that is free, else
        the one whose contents have been unused for longest. None: there is no run.
        """
        best: list[int] | None
        home = range(slot * self.home, slot * self.home + count)
        if home.stop <= len(self._owners) and not any(self._owners[b] or self._left[b] for b in home):
            best, age = list(home), 0
        else:
            best, age = self._oldest_run(count, set(shared))
        if shared:
            here = list(range(shared[0], shared[0] + count))
            behind = here[len(shared) :]
            together = here[: len(shared)] == list(shared) and here[-1] < len(self._owners)
            if together and not any(self._owners[b] for b in behind) and max(self._left[b] for b in behind) <= age:
                return here
        return best

    def _oldest_run(self, count: int, taken: set[int]) -> tuple[list[int] | None, int]:
        """(the run of so many blocks without owner whose most recent content is the oldest, when that was left)"""
        best, best_age = None, self._clock + 1
        recent: deque[int] = deque()  # blocks of the run, the most recently left first
        begin = 0
        for block, (owners, left) in enumerate(zip(self._owners, self._left, strict=True)):
            if owners or block in taken:
                recent.clear()
                begin = block + 1
                continue
            while recent and self._left[recent[-1]] <= left:
                recent.pop()
            recent.append(block)
            if recent[0] <= block - count:
                recent.popleft()
            if block - begin + 1 >= count and self._left[recent[0]] < best_age:
                best, best_age = list(range(block - count + 1, block + 1)), self._left[recent[0]]
        return best, best_age

    def _scattered(self, count: int) -> list[int]:
        """Blocks without owner wherever they are, free ones first, then the least recently used."""
        idle = [block for block, owners in enumerate(self._owners) if not owners]
        return sorted(sorted(idle, key=self._left.__getitem__)[:count])

    def _grow(self, slot: int, count: int) -> None:
        """More blocks for a slot, behind those it has if they are free; else the sequence moves to a run."""
        table = self.tables[slot]
        more = count - len(table.blocks)
        if more > self._idle:
            room = len(table.blocks) * KV_BLOCK + self.idle
            raise UserError(
                f"the pool of {self.limit} positions is full: {room} are left for this sequence, which needs "
                f"{count * KV_BLOCK}: wait until another has ended, or raise --pool-size"
            )
        if not table.blocks:
            place = self._place(slot, count, ()) or self._scattered(count)
        else:
            place = list(range(table.blocks[-1] + 1, table.blocks[-1] + 1 + more))
            if table.start is None or place[-1] >= len(self._owners) or any(self._owners[b] for b in place):
                own = [block for block in table.blocks if self._owners[block] == 1]
                run = self._oldest_run(count, set())[0] if len(own) == len(table.blocks) else None
                if run:
                    self._take(set(run))
                    self._copy(table.blocks, run[: len(own)])
                    self._leave(own, keep=False)
                    table.blocks, place = run, []
                    for block, digest in zip(run, table.digests, strict=False):
                        self._name(block, digest)
                else:
                    place = self._scattered(more)
        self._take(set(place))
        table.blocks = table.blocks + place
        table.changed()

    def _own_again(self, table: Table, start: int, end: int) -> None:
        """Of the blocks from a position on, make each one that nobody else owns and nobody finds."""
        first = start // KV_BLOCK
        for i in range(first, len(table.digests)):
            block = table.blocks[i]
            if self._owners[block] == 1:
                self._forget(block)
                continue
            if not self._idle:
                raise UserError(
                    f"the pool of {self.limit} positions is full: nothing is left for a copy of a block that others "
                    "share: wait until another sequence has ended, or raise --pool-size"
                )
            (mine,) = self._scattered(1)
            self._take({mine})
            if i == first and start % KV_BLOCK:  # what lies behind the writer is stale
                self._copy([block], [mine])
            self._leave([block])
            table.blocks[i] = mine
        table.changed()
        del table.digests[first:]

    def _own(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._idle -= not self._owners[block]
            self._owners[block] += 1
            self._left[block] = 0

    def _take(self, blocks: set[int]) -> None:
        """Own blocks without owner, as zeros: numbers that others left must not be read, even masked, if not finite."""
        self._forget(*blocks)
        self._clear(blocks)
        self._own(sorted(blocks))

    def _leave(self, blocks: Sequence[int], keep: bool = True) -> None:
        """Give up blocks; those that can be found are kept, the last of a text going before the first."""
        empty = set()
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            self._idle += 1
            if keep and self._digest[block] is not None:
                self._clock += 1
                self._left[block] = self._clock
            else:
                self._forget(block)
                empty.add(block)
        self._clear(empty)

    def _name(self, block: int, digest: bytes) -> None:
        """Let a block be found, unless another one with this content can be."""
        if self._found.setdefault(digest, block) == block:
            self._digest[block] = digest

    def _forget(self, *blocks: int) -> None:
        for block in blocks:
            digest = self._digest[block]
            if digest is not None:
                del self._found[digest]
                self._digest[block] = None
            self._left[block] = 0

    def _clear(self, blocks: set[int]) -> None:
        """Make written blocks zeros, and give their memory back."""
        dirty = sorted(block for block in blocks if self._written[block])
        while dirty:
            count = next((i for i, block in enumerate(dirty) if block != dirty[0] + i), len(dirty))
            self._storage.clear(2, dirty[0] * KV_BLOCK, (dirty[0] + count) * KV_BLOCK)
            for block in dirty[:count]:
                self._written[block] = 0
            del dirty[:count]

    def _copy(self, blocks: Sequence[int], to: Sequence[int]) -> None:
        """Copy the contents of blocks to others; a block may be among both."""
        pairs = [(block, other) for block, other in zip(blocks, to, strict=True) if block != other]
        if not pairs:
            return
        view = self.pool.view(*self.pool.shape[:2], -1, KV_BLOCK * self.pool.shape[-1])
        for block, other in pairs:  # none of the others holds one of the blocks: they were taken for this
            if self._written[block]:
                view[:, :, other] = view[:, :, block]
                self._written[other] = 1


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=before).digest()


def _digests(tokens: Sequence[int]) -> list[bytes]:
    """Of all whole blocks of a text."""
    digests: list[bytes] = []
    for start in range(0, len(tokens) // KV_BLOCK * KV_BLOCK, KV_BLOCK):
        digests.append(_digest(digests[-1] if digests else b"", tokens[start : start + KV_BLOCK]))
    return digests
