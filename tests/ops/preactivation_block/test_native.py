"""A pre-activation block as one native op against its reference, forward and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.runtime import extension
from ddpm_fast.testing.native_cases import without_pairs
from ddpm_fast.testing.preactivation_block_cases import assert_as_accurate_as_the_reference, make, run

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

SHAPES = [
    # B, C, skip, K, H, W, groups1, groups2: groups across the two maps, one pixel, several chunks of a sample
    (2, 32, 0, 32, 8, 8, 4, 8),
    (3, 8, 0, 24, 7, 3, 4, 3),
    (2, 16, 8, 32, 4, 4, 3, 2),
    (1, 33, 17, 50, 5, 9, 5, 10),
    (2, 6, 4, 8, 1, 1, 1, 1),
    (1, 8, 0, 8, 49, 43, 1, 8),
    # norms that are made as the convolution reads them: of threads' own tiles, and of tiles that they share
    (8, 40, 24, 64, 16, 16, 4, 8),
    (2, 48, 40, 64, 8, 8, 4, 8),
    (4, 70, 0, 64, 10, 9, 7, 8),
    (6, 384, 0, 64, 32, 32, 8, 8),  # in several passes of whole samples
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape):
    assert_as_accurate_as_the_reference(*make(*shape), backend="native")


@pytest.mark.parametrize(
    "options",
    [
        {"embedding": False},
        {"biases": False},
        {"biases": False, "embedding": False},
        {"scaled": True, "embedding": False},
        {"scaled": True, "dropout_p": 0.25},
        {"output_scale": 0.5**0.5, "eps1": 1e-6, "eps2": 1e-3},
        {"dropout_p": 1.0},
    ],
    ids=str,
)
def test_options(options):
    assert_as_accurate_as_the_reference(*make(2, 16, 8, 32, 6, 5, **options), backend="native")


@pytest.mark.parametrize("options", [{"output_scale": 0.5**0.5}, {"window": 1}], ids=str)
def test_a_residual_of_as_many_channels(options):
    assert_as_accurate_as_the_reference(*make(2, 16, 0, 16, 6, 5, **options), backend="native")


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set(name):
    module = extension.load()
    try:
        before = module.use_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        assert_as_accurate_as_the_reference(*make(1, 33, 17, 50, 5, 9, 5, 10, scaled=True), backend="native")
        assert_as_accurate_as_the_reference(*make(2, 16, 0, 16, 8, 8, dropout_p=0.5), backend="native")
    finally:
        module.use_instruction_set(before)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    *(st.integers(low, high) for low, high in ((2, 20), (0, 15), (4, 20), (1, 9), (1, 9))),
    st.sampled_from((1, 2)),
    st.booleans(),
)
def test_random_shapes(B, C, skip, K, H, W, groups, scaled):
    assert_as_accurate_as_the_reference(
        *make(B, 2 * C, 2 * skip, 2 * K, H, W, groups, groups, scaled=scaled, window=1), backend="native"
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 0, 8, 49, 43),
        (3, 130, 24, 70, 8, 8),
        (8, 40, 24, 64, 16, 16),  # with one or two threads norms are made as the convolution reads them
        (4, 96, 32, 64, 8, 8),
        (4, 70, 0, 64, 10, 9),
        (6, 384, 0, 64, 32, 32),  # in several passes of whole samples
    ],
    ids=str,
)
def test_threads_do_not_matter(shape, dropout_p):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(preactivation_block, *make(*shape, dropout_p=dropout_p)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_without_gradients_it_is_the_same():
    tensors, others = make(2, 16, 8, 32, 6, 5)
    with_graph = preactivation_block(**{name: t.clone().requires_grad_() for name, t in tensors.items()}, **others)
    with torch.no_grad():
        assert torch.equal(preactivation_block(**tensors, **others), with_graph.detach())


def test_a_large_mean_costs_no_digits():
    """Statistics are sums of differences from a pixel: a mean of 1000 standard deviations is taken off exactly."""
    tensors, others = make(2, 16, 0, 16, 8, 8)
    tensors["x"] = tensors["x"] + 2000
    assert_as_accurate_as_the_reference(tensors, others, backend="native")


def test_half_types_round_once():
    tensors, others = make(2, 16, 8, 32, 6, 5, scaled=True)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    with without_pairs():
        actual = run(preactivation_block, half, others)
    exact = run(preactivation_block, {name: tensor.float() for name, tensor in half.items()}, others)
    assert torch.equal(actual["out"], exact["out"].bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in actual.values())


def test_gradients_that_are_not_wanted_are_left_out():
    """Parameters alone: no gradient of x or skip is made, and the others are the same."""
    tensors, others = make(2, 16, 8, 32, 6, 5)
    expected = run(preactivation_block, tensors, others)
    leaves = {n: t.detach().clone().requires_grad_(n not in ("x", "skip")) for n, t in tensors.items()}
    out = preactivation_block(**leaves, **others)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in ("x", "skip") else torch.equal(leaf.grad, expected[name]), name


def test_operator_keeps_torchs_rules():
    tensors, _ = make(2, 16, 8, 32, 4, 4, scaled=True)
    t = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    arguments = (
        t["x"], t["skip"], t["weight1"], t["bias1"], t["gain1"], t["offset1"], t["embedding"], t["scale"], t["shift"],
        t["weight2"], t["bias2"], t["gain2"], t["offset2"], t["res_weight"], t["res_bias"], None, 2, 2, 1e-5, 1e-5,
        0.5, 0.0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ddpm_fast.native_preactivation_block.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": "up"}, "does not resample"),
        ({"res_weight": torch.zeros(32, 24, 3, 3)}, "3×3 convolution"),
        ({"scale": torch.zeros(2, 32, dtype=torch.float64)}, "float64"),
    ],
)
def test_what_it_refuses(changes, message):
    tensors, others = make(2, 16, 8, 32, 6, 5)
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        preactivation_block(**tensors | others | changes)
