"""The C++ noise function against its specification in torch."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.ops.noise.op import fill_normal_, normal
from ddpm_fast.runtime import extension

# Random123's published vectors for philox4x32_10: counter, key, words (Salmon et al. 2011; kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SHAPES = [
    (1,),
    (5,),
    (1, 1),
    (3, 2),
    (2, 3),
    (5, 1, 7, 9),
    (2, 3, 8, 8),
    (1, 3, 33, 31),
    (2, 2049),
    (3, 4097),
    (2, 3, 64, 64),
]
SEEDS = [0, 1, 2**32 + 5, 2**63 - 1, 2**64 - 1, -1, -(2**63)]


@pytest.fixture(autouse=True)
def native():
    module = extension.load()
    assert module is not None, extension.reason()
    with use_backend("native"):
        yield module


def assert_same_noise(actual: torch.Tensor, **arguments) -> None:
    """float32 within 4 units in the last place (at 1 below it); narrow types within the rounding of that."""
    truth = noise.normal(actual.shape, dtype=torch.float64, **arguments)
    error = (actual.double() - truth).abs() / truth.abs().clamp(min=1)
    tolerance = 4 * 2**-24 + (0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2)
    assert error.numel() == 0 or error.max() <= tolerance


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(native, counter, key, words):
    assert native.philox4x32(*counter, *key) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_specification(shape, dtype):
    arguments = {"seed": 1234567890123, "stream": 3, "step": 17, "start_index": 5}
    actual = normal(shape, dtype=dtype, **arguments)
    assert actual.shape == shape and actual.dtype == dtype
    assert_same_noise(actual, **arguments)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_bits_of_the_seed_count(seed):
    actual = normal((2, 50), seed=seed)
    assert_same_noise(actual, seed=seed)
    assert not torch.equal(actual, normal((2, 50), seed=seed ^ (1 << 40)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": 2**32 - 1},
        {"step": -1},
        {"step": 2**40 + 3},
        {"stream": 2**32 - 1},
        {"start_index": 2**32 - 3},
    ],
)
def test_ends_of_the_counter_words(arguments):
    assert_same_noise(normal((3, 9), seed=8, **arguments), seed=8, **arguments)


def test_narrow_types_are_the_rounded_float32():
    exact = normal((3, 5001), seed=2)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(normal((3, 5001), seed=2, dtype=dtype), exact.to(dtype))


def test_a_sample_depends_on_its_index_alone():
    whole = normal((5, 3, 7, 5), seed=9, step=4)
    parts = [normal((1, 3, 7, 5), seed=9, step=4, start_index=i) for i in range(5)]
    assert torch.equal(whole, torch.cat(parts))


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(normal((3, 100_003), seed=4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_only_the_given_memory_is_written():
    memory = torch.full((3 * 2051 + 64,), float("nan"))
    fill_normal_(memory[32:-32].view(3, 2051), 7, stream=1)
    assert memory[:32].isnan().all() and memory[-32:].isnan().all() and not memory[32:-32].isnan().any()


def test_empty():
    assert normal((0, 3, 4, 4), seed=0).shape == (0, 3, 4, 4)
    assert normal((2, 0), seed=0).shape == (2, 0)


def test_moments():
    z = normal((4, 1_000_000), seed=11).double().flatten()
    n = z.numel()
    # Each bound is five standard deviations of the estimate.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((z[:-1] * z[1:]).mean()) < 5 / n**0.5


def test_ten_million_draws_within_four_units():
    for start in range(0, 10, 2):
        assert_same_noise(normal((2, 1_000_003), seed=77, start_index=start), seed=77, start_index=start)


def test_seed_and_step_as_tensors():
    assert torch.equal(normal((2, 9), seed=torch.tensor([-3]), step=torch.tensor(6)), normal((2, 9), seed=-3, step=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    arguments = (torch.empty(2, 3, 5, dtype=dtype), torch.tensor([3]), torch.tensor([1]), 2, 0)
    torch.library.opcheck(torch.ops.ddpm_fast.fill_normal_.default, arguments)


def test_what_native_refuses_runs_in_the_reference():
    with pytest.raises(RuntimeError, match="float64"):
        normal((2, 3), seed=0, dtype=torch.float64)
    strided = torch.empty(3, 8).t()
    with pytest.raises(RuntimeError, match="out is not contiguous"):
        fill_normal_(strided, 0, stream=0)
    with use_backend(None):
        fill_normal_(strided, 0, stream=0)
        assert normal((2, 3), seed=0, dtype=torch.float64).dtype == torch.float64
    assert_same_noise(strided.contiguous(), seed=0)


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda: fill_normal_(torch.empty(3).int(), 0, stream=0), TypeError, "out must be a floating point tensor"),
        (lambda: fill_normal_(torch.empty(()), 0, stream=0), ValueError, "at least one dimension"),
        (lambda: fill_normal_(torch.empty(3), 2**64, stream=0), ValueError, "seed must fit in 64 bits"),
        (lambda: fill_normal_(torch.empty(3), 0.5, stream=0), TypeError, "seed must be an int"),
        (lambda: fill_normal_(torch.empty(3), 0, stream=-1), ValueError, "stream must be in"),
        (lambda: fill_normal_(torch.empty(3), 0, stream=0, start_index=-1), ValueError, "start_index must be in"),
        (lambda: fill_normal_(torch.empty(3), 0, stream=0, step=0.5), TypeError, "step must be an int"),
        (lambda: fill_normal_(torch.empty(3), 0, stream=0, step=torch.zeros(2)), TypeError, "step must be an int"),
        (lambda: normal((3, 2**34 + 1), seed=0), ValueError, "at most 2\\^34 elements per sample"),
        (lambda: normal((3,), seed=0, dtype=torch.int64), TypeError, "dtype must be a floating point"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_the_operator_itself_guards_memory():
    fill = torch.ops.ddpm_fast.fill_normal_
    one = torch.tensor([1])
    for out, seed, step, stream, start, sentence in [
        (torch.empty(2, 3), torch.empty(0, dtype=torch.int64), one, 0, 0, "seed must be one int64"),
        (torch.empty(2, 3), one, torch.tensor([1.0]), 0, 0, "step must be one int64"),
        (torch.empty(3, 2).t(), one, one, 0, 0, "out must be contiguous"),
        (torch.empty(2, 3), one, one, 0, 2**32 - 1, "start_index must be in"),
        (torch.empty(2, 3), one, one, 2**32, 0, "stream must be in"),
    ]:
        with pytest.raises((TypeError, ValueError), match=sentence):
            fill(out, seed, step, stream, start)
