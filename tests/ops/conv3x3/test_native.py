"""The CPU's 3×3 convolution against torch's, forward and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.conv3x3 import op, reference
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import BackendRefused
from ddpm_fast.testing.truth import assert_close_to_truth, errors

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")


def make(B, C, skip, K, H, W, upsampled=False, bias=True, residual=True, seed=0) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    factor = 2 if upsampled else 1
    tensors = {
        "x": normal(B, C, H, W).contiguous(memory_format=torch.channels_last),
        "weight": normal(K, C + skip, 3, 3) / (9 * (C + skip)) ** 0.5,
    }
    if bias:
        tensors["bias"] = normal(K)
    if skip:
        tensors["skip"] = normal(B, skip, H, W).contiguous(memory_format=torch.channels_last)
    if residual:
        tensors["residual"] = normal(B, K, factor * H, factor * W)
    return tensors, {"upsampled": upsampled}


def run(function, tensors, others, grad=None):
    """The output and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **others)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
    return {"out": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)), strict=True)
    )


def check(tensors, others):
    """Twice the reference's error against float64, and a floor of 16 units of the products' absolute sum.

    A transform's rounding error is relative to the absolute sum of its terms, even if they cancel (Higham 2002, section
    3.1). The largest error of 600 random shapes of these sizes was 9 units.
    """
    with use_backend("native"):
        actual = run(conv3x3, tensors, others)
    expected = run(reference.conv3x3, tensors, others)
    wide = {name: t.double() for name, t in tensors.items()}
    truth = run(reference.conv3x3, wide, others)
    grad = torch.randn(truth["out"].shape, generator=torch.Generator().manual_seed(1)).abs()
    magnitude = run(reference.conv3x3, {name: t.abs() for name, t in wide.items()}, others, grad)
    for name in truth:
        assert actual[name].shape == truth[name].shape and actual[name].dtype == torch.float32
        ours, theirs = errors(actual[name], truth[name]), errors(expected[name], truth[name])
        scales = errors(magnitude[name], torch.zeros_like(truth[name]))
        for kind, mine, its, scale in zip(("RMS", "largest"), ours, theirs, scales, strict=True):
            bound = 2 * its + 16 * EPS * scale
            assert mine <= bound, f"{name}: {kind} error {mine:.3e} > {bound:.3e} (reference {its:.3e})"


EPS = torch.finfo(torch.float32).eps

SHAPES = [
    # B, C, skip, K, H, W
    (1, 1, 0, 1, 1, 1),
    (3, 3, 0, 17, 7, 3),
    (1, 64, 0, 64, 8, 8),
    (2, 16, 0, 32, 4, 4),
    (1, 17, 3, 100, 5, 9),
    (2, 40, 24, 33, 6, 2),
    (1, 100, 0, 7, 1, 3),
    (1, 130, 0, 70, 4, 6),
    (1, 8, 0, 40, 49, 43),  # enough tiles to be taken in groups
    (3, 13, 6, 21, 45, 39),  # and in four chunks for the weight's gradient
    (2, 48, 0, 48, 40, 41),  # and in two, with a panel of which half is full
    (1, 513, 0, 16, 3, 3),
    (1, 64, 33, 50, 4, 4),  # pixels few enough for weights as they are, of two maps
    (2, 48, 0, 35, 4, 4),  # the same with AVX-512 only
    (4, 440, 0, 40, 44, 44),  # the weight's gradient in several passes, whatever the caches
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape):
    check(*make(*shape))


@pytest.mark.parametrize("shape", [(2, 64, 0, 64, 16, 16), (2, 128, 64, 96, 8, 8), (2, 256, 0, 64, 4, 4)], ids=str)
def test_as_accurate_as_twice_a_direct_convolution(shape):
    """At a network's shapes, relative to the result's scale; the floor is 16 units for sums over pixels, else 4."""
    tensors, others = make(*shape)
    with use_backend("native"):
        actual = run(conv3x3, tensors, others)
    expected = run(reference.conv3x3, tensors, others)
    truth = run(reference.conv3x3, {name: t.double() for name, t in tensors.items()}, others)
    for name in truth:
        floor = 16 if name == "weight" else 4
        assert_close_to_truth(actual[name], expected[name], truth[name], floor=floor, name=name)


UPSAMPLED = [
    SHAPES[1],
    SHAPES[4],
    SHAPES[7],
    (1, 33, 0, 20, 16, 16),  # enough tiles for phases of the weight's gradient
    (4, 20, 6, 40, 16, 17),  # and for phases of all
    (5, 65, 70, 33, 13, 16),  # in blocks of channels
    (3, 16, 0, 16, 53, 50),  # in four chunks for the weight's gradient
]


@pytest.mark.parametrize("shape", UPSAMPLED, ids=str)
def test_upsampled(shape):
    check(*make(*shape, upsampled=True))


@pytest.mark.parametrize("upsampled", [False, True])
def test_tiles_of_every_size(instruction_set, upsampled):
    """A map's last tiles have 1 to 4 outputs along an axis, and transforms of their own."""
    for height in range(1, 9):
        for width in range(1, 9):
            check(*make(3, 17, 0, 20, height, width, upsampled=upsampled))


def test_every_instruction_set(instruction_set):
    for shape in (SHAPES[4], SHAPES[5], SHAPES[8], SHAPES[9], (1, 64, 32, 48, 9, 8), (1, 64, 33, 50, 4, 4)):
        check(*make(*shape))
    check(*make(2, 32, 0, 16, 5, 4, upsampled=True))
    check(*make(*UPSAMPLED[4], upsampled=True))


@pytest.mark.parametrize("names", [(), ("bias",), ("residual",)], ids=str)
def test_without_bias_or_residual(names):
    check(*make(2, 20, 0, 24, 6, 5, bias="bias" in names, residual="residual" in names))


@settings(max_examples=200)
@given(
    st.integers(1, 3),
    *(st.integers(low, high) for low, high in ((1, 70), (0, 40), (1, 70), (1, 14), (1, 14))),
    *(st.booleans() for _ in range(3)),
)
def test_random_shapes(B, C, skip, K, H, W, upsampled, bias, residual):
    check(*make(B, C, skip, K, H, W, upsampled, bias, residual))


def test_threads_do_not_matter():
    """Fewer and more threads than a weight's gradient has chunks of tiles."""
    before = torch.get_num_threads()
    small = ((1, 32, 0, 32, 16, 16), (1, 64, 64, 64, 8, 8), (1, 128, 0, 128, 4, 4), (1, 16, 0, 3, 16, 16))
    plain = ((1, 8, 0, 40, 49, 43), (2, 130, 24, 70, 8, 8), SHAPES[9], SHAPES[10], *small)
    for shape, upsampled in (*((shape, False) for shape in plain), *((shape, True) for shape in UPSAMPLED[3:6])):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(conv3x3, *make(*shape, upsampled=upsampled)))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_passes_of_many_threads_change_nothing():
    """Each of eight has a pass of what its second-level cache holds, more than an eighth of what two have together."""
    before = torch.get_num_threads()
    tensors = {"x": torch.randn(8, 128, 32, 32).contiguous(memory_format=torch.channels_last)}
    tensors |= {"weight": torch.randn(40, 128, 3, 3), "bias": torch.randn(40)}
    found = []
    for threads in (1, 8):
        torch.set_num_threads(threads)
        found.append(conv3x3(**tensors))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 32, 0, 32, 64, 64),  # groups of tiles
        (6, 48, 16, 96, 16, 16),  # tiles of each thread, by panels
        (1, 64, 0, 96, 8, 8),  # panels of each thread
        (1, 64, 32, 224, 4, 4),  # channels of each thread, of weights as they are
    ],
    ids=str,
)
def test_threads_that_help_each_other_change_nothing(shape):
    """More threads than processors wait for each other by turns, so that others take their tasks."""
    before = torch.get_num_threads()
    tensors, others = make(*shape)
    torch.set_num_threads(1)
    alone = run(conv3x3, tensors, others)
    torch.set_num_threads(3)
    runs = [run(conv3x3, tensors, others) for _ in range(12)]
    torch.set_num_threads(before)
    for result in runs:
        assert all(torch.equal(alone[name], result[name]) for name in alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dtype):
    tensors, others = make(2, 20, 4, 24, 6, 5)
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    wide = {name: tensor.float() for name, tensor in half.items()}
    with use_backend("native"):
        actual, exact = run(conv3x3, half, others), run(conv3x3, wide, others)
    for name in actual:
        assert actual[name].dtype == dtype
    assert torch.equal(actual["out"], exact["out"].to(dtype))
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)


def test_gradients_come_in_any_layout():
    tensors, others = make(2, 8, 4, 6, 5, 7)
    for grad in (torch.randn(2, 6, 5, 7), torch.randn(()).expand(2, 6, 5, 7), torch.randn(2, 6, 7, 5).transpose(2, 3)):
        actual, expected = run(conv3x3, tensors, others, grad), run(reference.conv3x3, tensors, others, grad)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients():
    tensors, others = make(1, 8, 0, 6, 4, 4)
    leaves = {name: tensor.requires_grad_(name == "weight") for name, tensor in tensors.items()}
    conv3x3(**leaves, **others).sum().backward()
    assert leaves["weight"].grad is not None and leaves["x"].grad is None and leaves["bias"].grad is None


def test_nan_stays_visible():
    tensors, others = make(1, 8, 0, 6, 8, 8)
    tensors["x"][0, 3, 5, 5] = float("nan")
    assert conv3x3(**tensors, **others)[0, :, 4:7, 4:7].isnan().all()


def test_operator_keeps_torchs_rules():
    tensors, _ = make(2, 8, 4, 6, 4, 4)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    for upsampled, residual in ((False, leaves["residual"]), (True, None)):
        arguments = (leaves["x"], leaves["skip"], leaves["weight"], leaves["bias"], residual, upsampled)
        torch.library.opcheck(torch.ops.ddpm_fast.native_conv3x3.default, arguments)


def test_refusals():
    tensors, others = make(1, 8, 0, 6, 4, 4)
    for change, reason in (
        (lambda t: t.double(), "float64"),
        (lambda t: t.contiguous(), "not channels-last"),
        (lambda t: t[:0], "empty"),
    ):
        changed = tensors | {"x": change(tensors["x"]), "residual": None}
        with use_backend("native"), pytest.raises(BackendRefused, match=reason):
            conv3x3(**changed, **others)
        assert conv3x3(**changed | {n: t.to(changed["x"].dtype) for n, t in tensors.items() if n in ("weight", "bias")},
                       **others).shape[1:] == (6, 4, 4)  # fmt: skip


def test_tiny_maps_are_left_to_torch():
    tensors, others = make(1, 8, 0, 6, 2, 9, residual=False)
    choice = op._conv3x3_op.choose(**tensors, skip=None, residual=None, **others)
    assert choice.name == "reference" and "H = 2" in op._conv3x3_op.implementations[0].why_not(
        **tensors, skip=None, residual=None, **others
    )


def test_second_derivatives_are_refused():
    tensors, others = make(1, 8, 0, 6, 4, 4)
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(conv3x3(**tensors | {"x": x}, **others).square().sum(), x, create_graph=False)
    assert dx.shape == x.shape
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(conv3x3(**tensors | {"x": x}, **others).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3)}, "x must have shape"),
        ({"weight": torch.zeros(6, 7, 3, 3)}, r"weight must have shape \(K, 8, 3, 3\)"),
        ({"weight": torch.zeros(6, 8, 1, 1)}, "weight must have shape"),
        ({"bias": torch.zeros(5)}, "bias must have shape"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, "skip must have shape"),
        ({"residual": torch.zeros(1, 6, 8, 8)}, "residual must have shape"),
        ({"x": torch.zeros(1, 8, 4, 4, dtype=torch.int32)}, "x must be float32"),
        ({"weight": None}, "weight must be a tensor"),
    ],
)
def test_wrong_arguments(changes, message):
    tensors, others = make(1, 8, 0, 6, 4, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        conv3x3(**tensors | changes, **others)


def test_operator_checks_shapes_itself():
    """The operator's own checks keep memory safe if it is called without op.py."""
    call = torch.ops.ddpm_fast.native_conv3x3
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(6, 8, 3, 3)
    for arguments in (
        (x[0], None, weight, None, None, False),
        (x, x[:, :, :2], weight, None, None, False),
        (x, None, weight[:, :7], None, None, False),
        (x, None, weight, torch.zeros(5), None, False),
        (x, None, weight, None, torch.zeros(1, 6, 4, 5), False),
        (x[:0], None, weight, None, None, False),
    ):
        with pytest.raises(ValueError):
            call(*arguments)
