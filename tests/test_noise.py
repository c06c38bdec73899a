"""The noise function in torch: known answers, distribution, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_fast import noise

# Known answers published with Random123 (Salmon et al. 2011): counter, key, output of Philox4x32-10.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = noise.philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(w) for w in words] == expected


def test_box_muller_at_its_ends():
    top, zero = torch.tensor([0xFFFFFFFF]), torch.tensor([0])
    z0, z1 = noise.box_muller(zero, zero)
    assert z0.item() == pytest.approx(math.sqrt(2 * 33 * math.log(2))) and z1.item() == 0
    assert noise.box_muller(top, zero)[0].item() == 0, "u = 1 has radius 0"


def test_element_order_and_counter():
    """Element e of sample i is output word e % 4 of counter (e // 4, i, step, stream)."""
    shape, seed, step, stream, start = (2, 3, 5, 7), 0x123456789ABCDEF0, 9, 4, 11
    z = noise.normal(shape, seed=seed, step=step, stream=stream, start_index=start, dtype=torch.float64).flatten(1)
    for sample, element in ((0, 0), (0, 5), (1, 103), (1, 104)):
        counter = [torch.tensor([c]) for c in (element // 4, start + sample, step, stream)]
        words = noise.philox4x32(counter, [torch.tensor([0x9ABCDEF0]), torch.tensor([0x12345678])])
        pair = noise.box_muller(*words[:2]) if element % 4 < 2 else noise.box_muller(*words[2:])
        assert z[sample, element].item() == pair[element % 2].item()


def test_is_standard_normal():
    z = noise.normal((64, 3, 64, 64), seed=5).double().flatten()
    n = z.numel()
    assert abs(z.mean().item()) < 4 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean().item()) < 4 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov distance to the normal distribution, at a level of about 1e-4.
    cdf = torch.special.ndtr(z.sort().values)
    rank = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (cdf - rank).abs().max().item() < 2.2 / math.sqrt(n)


@pytest.mark.parametrize("other", [dict(seed=6), dict(stream=1), dict(step=1), dict(start_index=1)])
def test_each_argument_gives_other_noise(other):
    base = dict(seed=5, stream=0, step=0, start_index=0)
    a = noise.normal((1, 3, 64, 64), **base).flatten()
    b = noise.normal((1, 3, 64, 64), **{**base, **other}).flatten()
    correlation = torch.dot(a, b).item() / a.numel()
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_does_not_depend_on_the_batch():
    whole = noise.normal((6, 3, 5, 5), seed=3)
    assert torch.equal(whole[2:5], noise.normal((3, 3, 5, 5), seed=3, start_index=2))


def test_seeds_are_64_bits():
    full = noise.normal((1, 8), seed=2**64 - 1)
    assert torch.equal(full, noise.normal((1, 8), seed=-1))
    assert torch.equal(full, noise.normal((1, 8), seed=torch.tensor([-1])))
    assert not torch.equal(full, noise.normal((1, 8), seed=2**32 - 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_float32(dtype):
    assert torch.equal(noise.normal((2, 9), seed=3, dtype=dtype), noise.normal((2, 9), seed=3).to(dtype))


def test_empty():
    assert noise.normal((0, 3, 4, 4), seed=1).shape == (0, 3, 4, 4)
    assert noise.normal((2, 0), seed=1).shape == (2, 0)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(shape=(), seed=1), ValueError, "shape must have at least one dimension"),
        (dict(shape=(2, -1), seed=1), ValueError, "shape must not have negative sizes"),
        (dict(shape=(1, 2**17, 2**18), seed=1), ValueError, "at most 2\\^34 elements per sample"),
        (dict(shape=(1, 4), seed=2**64), ValueError, "seed must fit in 64 bits"),
        (dict(shape=(1, 4), seed=1.5), TypeError, "seed must be an int or a one-element int64 tensor, got float"),
        (dict(shape=(1, 4), seed=True), TypeError, "seed must be an int"),
        (dict(shape=(1, 4), seed=torch.zeros(2, dtype=torch.int64)), TypeError, r"seed must be .* shape \(2,\)"),
        (dict(shape=(1, 4), seed=1, stream=-1), ValueError, "stream must be in"),
        (dict(shape=(2, 4), seed=1, start_index=2**32 - 1), ValueError, "start_index must be in"),
        (dict(shape=(1, 4), seed=1, dtype=torch.int32), TypeError, "dtype must be a floating point type"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        noise.normal(**kwargs)
