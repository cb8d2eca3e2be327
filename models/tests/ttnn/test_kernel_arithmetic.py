"""What golden functions leave out: the order in which the kernels of decode attention and of the cache update compute.

The steps are those of docs/kernels.md, question 6, read from sdpa_flash_decode.cpp and the update kernels.
"""

import pytest
import torch
import ttnn

pytestmark = pytest.mark.once
CHUNK = 128


def bf16(x: torch.Tensor) -> torch.Tensor:
    """Rounded as every buffer of the kernel is."""
    return x.bfloat16().float()


def cut(x: torch.Tensor) -> torch.Tensor:
    """bf16 without its last bit of mantissa: what HiFi2 multiplies of the operand that is no weight."""
    bits = x.bfloat16().view(torch.int16)
    return (bits & ~1).view(torch.bfloat16).float()


def chunked(q, k, v, scale, chunk=CHUNK):
    """(maximum, sum, output) over all positions, chunk by chunk in bf16, as one core computes them for one head."""
    largest = total = output = None
    for keys, values in zip(k.split(chunk), v.split(chunk), strict=True):
        scores = bf16(cut(q) @ keys.T)
        before, largest = largest, scores.max() if largest is None else torch.maximum(largest, scores.max())
        weights = bf16(torch.exp(bf16(scores - largest) * scale))
        one, part = bf16(cut(weights).sum()), bf16(cut(weights) @ values)
        if before is None:
            total, output = one, part
        else:
            total, output = joined((before, total, output), (largest, one, part), scale)[1:]
    return largest, total, output


def joined(a, b, scale):
    """Two such results as one: what a chunk is added by, and a core's result to another's."""
    largest = torch.maximum(a[0], b[0])
    total, output = torch.zeros(()), torch.zeros(())
    for maximum, one, part in (a, b):
        factor = bf16(torch.exp(bf16(maximum - largest) * scale))
        total, output = bf16(total + bf16(one * factor)), bf16(output + bf16(part * cut(factor)))
    return largest, total, output


def attended(q, k, v, scale, cores=1, chunk=CHUNK):
    """A row and head, its chunks shared by so many cores."""
    chunks = -(-len(k) // chunk)
    share = -(-chunks // min(cores, chunks)) * chunk
    results = [
        chunked(q, keys, values, scale, chunk) for keys, values in zip(k.split(share), v.split(share), strict=True)
    ]
    result = results[0]
    for other in results[1:]:
        result = joined(result, other, scale)
    return bf16(result[2] * bf16(1 / result[1]))


def row(positions, seed=0, size=128):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: bf16(torch.randn(*shape, generator=generator))  # noqa: E731
    return draw(size), draw(positions, size), draw(positions, size)


@pytest.mark.parametrize("positions", [1, 5, 127, 128, 129, 300, 1000])
def test_the_kernels_order_of_decode_attention_gives_what_its_golden_gives(positions):
    q, k, v = row(positions)
    scale = 128**-0.5
    exact = torch.softmax(k @ q * scale, 0) @ v
    made = attended(q, k, v, scale)
    assert torch.nn.functional.cosine_similarity(made, exact, dim=0) > 0.9995
    assert (made - exact).abs().max() < 0.02 * exact.abs().max()


def test_another_number_of_cores_is_another_order_of_rounding():
    """So a row has one core, however many rows there are. Up to 128 positions it does not matter."""
    scale = 128**-0.5
    for seed in range(5):
        q, k, v = row(128, seed)
        assert torch.equal(attended(q, k, v, scale), attended(q, k, v, scale, cores=8))
    rows = [row(600, seed) for seed in range(5)]
    assert any(not torch.equal(attended(*each, scale), attended(*each, scale, cores=2)) for each in rows)


def test_even_attention_over_very_long_contexts_loses_what_comes_last():
    """The loss that docs/kernels.md names: a sum in bf16 takes no more chunks when it is 256 times as large as one."""
    positions = 65536
    q, k = torch.zeros(32), torch.zeros(positions, 32)
    v = torch.zeros(positions, 32)
    v[positions // 2 :] = 1.0  # exactly half of the weight
    one, many = (attended(q, k, v, 1.0, cores)[0].item() for cores in (1, 16))
    larger = attended(q, k, v, 1.0, chunk=512)[0].item()
    assert abs(one - 0.5) > 0.2
    assert abs(many - 0.5) < 0.05 and abs(larger - 0.5) < 0.05
    short = attended(q, k[-8192:], torch.cat([torch.zeros(4096, 32), torch.ones(4096, 32)]), 1.0)[0].item()
    assert abs(short - 0.5) < 0.02


def test_writing_a_row_into_a_bfp8_tile_changes_no_other_row():
    """The kernel unpacks the tile, replaces a row, and packs it again: an exponent belongs to 16 values of one row."""

    def through_a_tile(x: torch.Tensor) -> torch.Tensor:
        return ttnn.from_torch(x, dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT).to_torch().float()

    generator = torch.Generator().manual_seed(0)
    rows = bf16(torch.randn(32, 64, generator=generator) * 10 ** torch.arange(-3, 3, 6 / 32)[:32, None])
    cache = through_a_tile(rows)
    new = bf16(torch.randn(5, 64, generator=generator))
    written = cache.clone()
    for i, values in enumerate(new):  # in turn, as the cores do
        written[7 + i] = values
        written = through_a_tile(written)
    expected = cache.clone()
    expected[7:12] = through_a_tile(torch.cat([new, torch.zeros(27, 64)]))[:5]
    assert torch.equal(written, expected)
