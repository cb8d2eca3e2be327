"""Attention of the rows of a forward over a paged cache: what is written where, and which rows read what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.llama.config import LlamaConfig
from models.speculative.tree import tree_depths
from models.torch_llama.kv_cache import KV_BLOCK, KVCache, Table, block_end

# The kernel computes rows in groups of so many, and up to three that are left over in another way (seen in torch 2.x on
# CPUs: bf16 differs in one of a million numbers, fp32 in every row). Padding to whole groups gives each row the bits
# that it has among many.
GROUP = 4


def whole(rows: int) -> int:
    """So many rows, or a few more, that are whole groups."""
    return -(-rows // GROUP) * GROUP


class Part(NamedTuple):
    """Rows of one sequence in a forward.

    table: of its slot, whose blocks hold all that is used.
    position: of its first row in the cache.
    rows: that are computed.
    used: of them; the others are padding, whose results mean nothing and whose keys and values are not written.
    tree: where row 0 of a tree stands, and the parents of all its rows, of which these are the last.
    """

    table: Table
    position: int
    rows: int
    used: int
    tree: tuple[int, Sequence[int]] | None = None


class _Read(NamedTuple):
    """One call of the attention kernel: the same number of rows of each of some sequences.

    row: of the forward, its first. table: of the first sequence; the next one lies `gap` positions further in the pool.
    mask: [sequences or 1, 1, rows fold or more, length]. first: the first row that takes its result from this call.
    """

    row: int
    sequences: int
    rows: int
    table: Table
    gap: int
    length: int
    mask: torch.Tensor
    first: int = 0


class Plan(NamedTuple):
    """What the layers of a forward have in common.

    spans: (row, pool position, rows) to be written. places: the same as pool positions [n] of rows 0.., where there
    are several spans. stands: positions of all rows, as a slice or [n].
    """

    reads: list[_Read]
    spans: list[tuple[int, int, int]]
    places: torch.Tensor | None
    stands: slice | torch.Tensor


def fold_of(config: LlamaConfig) -> int:
    """Query heads of a group that a model's attention takes as rows of their KV head.

    This head is then read (on CPU also repacked) once for all of them: equal but for the last bit, 1.3x cheaper at 24
    heads on 8. Two heads a group are cheaper left apart.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    return group if group > 2 else 1


def mask_bytes(fold: int, positions: int, itemsize: int) -> int:
    """Memory of the masks when so many positions of a cache have been used."""
    return KV_BLOCK * fold * (block_end(positions) + 2 * KV_BLOCK) * itemsize


class Attention:
    """Plans and computes attention for one model.

    Args:
        cache: keys and values.
        streams: query heads, or where query heads are folded KV heads, that the kernel sees.
        fold: query heads of a group that are taken as rows of their KV head.
    """

    def __init__(self, cache: KVCache, streams: int, fold: int) -> None:
        self.cache, self.streams, self.fold = cache, streams, fold
        _, width, _, self.dim = cache.pool.shape
        self.kv_heads = width // 2
        self.dtype, self.device = cache.pool.dtype, cache.device
        self._widen(min(block_end(cache.positions + cache.spare), 2048))

    @property
    def mask_bytes(self) -> int:
        """Memory of the masks."""
        return self._band.nbytes

    # ------------------------------------------------------------------------------------------------ planning
    def alone(self, part: Part, fixed: bool) -> Plan:
        """Of one sequence's decoding or verification. fixed: each row reads no further than its own block."""
        table, position, rows, used, tree = part
        if tree is None:
            lengths = sorted({block_end(position + i) for i in ((1, used) if fixed else (used,))})
            reads = [
                _Read(
                    *(0, 1, rows, table, 0, length, self._causal(position, rows, length, fixed)),
                    max(0, length - KV_BLOCK - position) if i else 0,
                )
                for i, length in enumerate(lengths)
            ]
            stands: slice | torch.Tensor = slice(position, position + rows)
        else:
            length = block_end(position + used)
            mask, stands = self._tree(*tree, position, rows, length)
            reads = [_Read(0, 1, rows, table, 0, length, mask)]
        spans = table.spans(position, position + used)
        return Plan(reads, spans, self._places(spans), stands)

    def together(self, parts: Sequence[Part]) -> Plan:
        """Of several sequences, one after the other, none padded. Each row reads no further than its own block, and is
        computed with enough others that its bits do not depend on how many they are."""
        reads: list[_Read] = []
        positions: list[int] = []  # of the first row of each; -1: of a tree
        spans, stands, row = [], [], 0
        for table, position, rows, _, tree in parts:
            spans += [(row + offset, place, n) for offset, place, n in table.spans(position, position + rows)]
            if tree is not None:
                length = block_end(position + rows)
                mask, stood = self._tree(*tree, position, rows, length)
                reads.append(_Read(row, 1, rows, table, 0, length, mask))
                positions.append(-1)
                stands.append(stood)
            else:
                edges = range(position - position % KV_BLOCK + KV_BLOCK, position + rows, KV_BLOCK)
                for start, end in zip((position, *edges), (*edges, position + rows), strict=True):
                    length = block_end(end)
                    mask = self._causal(start, end - start, length)
                    reads.append(_Read(row + start - position, 1, end - start, table, 0, length, mask))
                    positions.append(start)
                stands.append(torch.arange(position, position + rows, device=self.device))
            row += rows
        return Plan(self._joined(reads, positions), spans, self._places(spans), torch.cat(stands))

    def _joined(self, calls: Sequence[_Read], positions: Sequence[int]) -> list[_Read]:
        """The same with one call for neighbours that have as many rows, read as much, and lie evenly in the pool."""
        reads: list[_Read] = []
        groups: list[list[int]] = []  # positions of the first rows of each
        for call, position in zip(calls, positions, strict=True):
            if reads and position >= 0 and groups[-1][0] >= 0 and (gap := self._gap(reads[-1], call)):
                reads[-1] = reads[-1]._replace(sequences=reads[-1].sequences + 1, gap=gap)
                groups[-1].append(position)
                continue
            reads.append(call)
            groups.append([position])
        for i, (read, group) in enumerate(zip(reads, groups, strict=True)):
            if len(set(group)) > 1:
                masks = [self._causal(position, read.rows, read.length) for position in group]
                reads[i] = read._replace(mask=torch.cat(masks))
        return reads

    @staticmethod
    def _gap(last: _Read, call: _Read) -> int | None:
        """Pool positions between sequences, if a call's sequence may join those of the last one."""
        if (last.rows, last.length) != (call.rows, call.length) or call.table is last.table:
            return None
        if last.table.start is None or call.table.start is None:
            return None
        gap = call.table.start - last.table.start - (last.sequences - 1) * last.gap
        return gap if gap == last.gap or (last.sequences == 1 and gap > 0) else None

    def _places(self, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor | None:
        if len(spans) == 1:
            return None
        return torch.cat([torch.arange(place, place + rows) for _, place, rows in spans]).to(self.device)

    def _causal(self, position: int, rows: int, length: int, padded: bool = True) -> torch.Tensor:
        """Additive mask [1, 1, rows fold or more, length] for rows that start at a position: a view.

        padded: for as many rows as a row's bits need.
        """
        if position > self._origin:
            self._widen(min(2 * position, block_end(self.cache.positions + self.cache.spare)))
        first = self._origin - position
        n = whole(rows * self.fold) if padded else rows * self.fold
        return self._band[None, None, :n, first : first + length]

    def _widen(self, origin: int) -> None:
        """The band that all causal masks of rows at positions up to the origin are cut from: row i sees columns
        0..origin + i."""
        self._origin = origin
        self._band = torch.empty(0)  # its memory is needed no more
        shape = (KV_BLOCK, self.fold, origin + 2 * KV_BLOCK)
        band = torch.zeros(shape, dtype=self.dtype, device=self.device)
        edge = torch.full((KV_BLOCK, 2 * KV_BLOCK), float("-inf"), dtype=self.dtype, device=self.device)
        band[:, :, origin:] = edge.triu(1)[:, None]
        self._band = band.view(-1, shape[-1])

    def _tree(self, root: int, parents: Sequence[int], start: int, n: int, length: int):
        """Mask [1, 1, n fold, length] and positions [n] of a tree's rows that are written at start.. .

        Rows beyond the tree are padding: they see what the root sees, and nobody sees them.
        """
        seen = torch.eye(len(parents) + n, dtype=torch.bool)
        for row, parent in enumerate(parents[1:], 1):
            seen[row] |= seen[parent]
        new = slice(start - root, start - root + n)
        seen = seen[new, : length - root]
        mask = torch.zeros(n, length, dtype=self.dtype)
        mask[:, root:] = float("-inf")
        mask[:, root : root + seen.shape[1]].masked_fill_(seen, 0.0)
        stands = torch.tensor([root + depth for depth in (tree_depths(parents) + [0] * n)[new]])
        mask = mask.repeat_interleave(self.fold, dim=0)
        mask = F.pad(mask, (0, 0, 0, whole(len(mask)) - len(mask)))
        return mask.to(self.device)[None, None], stands.to(self.device)

    # ------------------------------------------------------------------------------------------------ computing
    def write(self, kv: torch.Tensor, new: torch.Tensor, plan: Plan) -> None:
        """Put the rows' keys and values new [n, 2 KV, D] into one layer's pool kv [2 KV, P, D]."""
        if plan.places is None:
            ((row, place, rows),) = plan.spans
            kv[:, place : place + rows] = new[row : row + rows].transpose(0, 1)
        else:
            kv.index_copy_(1, plan.places, new[: len(plan.places)].transpose(0, 1))

    def attend(self, kv: torch.Tensor, queries: torch.Tensor, plan: Plan) -> torch.Tensor:
        """What rows with these queries [n, Q D] find in one layer's pool: [n, Q D]."""
        if len(plan.reads) == 1:
            return self._read(kv, queries, plan.reads[0])
        attended = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for read in plan.reads:
            row = read.row + read.first
            attended[row : read.row + read.sequences * read.rows] = self._read(kv, queries, read)[read.first :]
        return attended

    def _read(self, kv: torch.Tensor, queries: torch.Tensor, read: _Read) -> torch.Tensor:
        row, sequences, rows, table, gap, length, mask, _ = read
        streams, fold, dim, n = self.streams, self.fold, self.dim, rows * self.fold
        mine = queries[row : row + sequences * rows].view(sequences, rows, streams, fold, dim).transpose(1, 2)
        extra = mask.shape[2] - n
        if not extra:
            folded = mine.reshape(sequences, streams, n, dim)
        elif sequences * rows == 1 and extra * dim <= queries.stride(0) - queries.shape[1]:
            # What lies behind a head is other heads, behind the last one keys and values: any numbers do as padding.
            folded = mine.as_strided((1, streams, n + extra, dim), (queries.stride(0), n * dim, dim, 1))
        else:
            folded = F.pad(mine.reshape(sequences, streams, n, dim), (0, 0, 0, extra))
        if sequences == 1:
            cached = self.cache.gather(kv, table, length)[None]
        else:
            assert table.start is not None  # only such are read together
            strides = (gap * dim, kv.shape[1] * dim, dim, 1)
            offset = kv.storage_offset() + table.start * dim
            cached = kv.as_strided((sequences, 2 * self.kv_heads, length, dim), strides, offset)
        result = F.scaled_dot_product_attention(
            folded,
            cached[:, : self.kv_heads],
            cached[:, self.kv_heads :],
            attn_mask=mask,
            enable_gqa=streams != self.kv_heads,
        )
        if extra:
            result = result[:, :, :n]
        return result.reshape(mine.shape).transpose(1, 2).reshape(sequences * rows, -1)
