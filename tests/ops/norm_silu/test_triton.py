"""The Triton kernels of norm_silu against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.models import stock
from ddpm_fast.ops.branches import MOST_BRANCHES, branch, branching
from ddpm_fast.ops.norm_silu import launch, op, reference
from ddpm_fast.ops.norm_silu import triton as kernel
from ddpm_fast.ops.norm_silu.op import first_norm_silu, group_norm_silu_beside, last_norm_silu
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.norm_silu_cases import (
    LAYOUTS,
    NORMS,
    OPTIONS,
    SHAPES,
    assert_as_accurate_as_the_reference,
    make,
    run,
)
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
SMALL = (3, 24, 4, 5, 4)

both_norms = pytest.mark.parametrize("norm", NORMS)


@pytest.mark.release(but=lambda option, layout, **_: (option, layout) in (("all", "nhwc"), ("plain", "nchw")))
@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(norm, layout, option, shape):
    assert_as_accurate_as_the_reference(norm, *make(norm, shape, option, layout, DEVICE))


# Pixels that are no multiple of four change how masks of dropout are drawn, and nothing of the other options.
@pytest.mark.release(but=lambda shape, option, **_: shape == SMALL or option in ("dropout", "all"))
@pytest.mark.arithmetic(only="all")
@both_norms
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [SMALL, (3, 24, 3, 5, 4)], ids=str)
def test_options(norm, option, shape):
    assert_as_accurate_as_the_reference(norm, *make(norm, shape, option, "nhwc", DEVICE))


def test_many_channels_and_many_pixels():
    """In the interpreter, too, programs walk over several tiles, and there are several of them, the last not full."""
    height, width = (17, 19) if triton_launch.interpreted() else (33, 31)
    for norm in NORMS:
        assert_as_accurate_as_the_reference(norm, *make(norm, (1, 513, height, width, 27), "bias", "nhwc", DEVICE))


@pytest.fixture
def in_several_passes(monkeypatch):
    """GroupNorm as of maps whose groups no program holds."""
    monkeypatch.setattr(launch, "choose_groups", lambda *sizes: None)
    launch._whole_plan.cache_clear()
    yield
    launch._whole_plan.cache_clear()


@pytest.mark.parametrize("option", ["plain", "all", "dropout"])
@pytest.mark.parametrize("shape", [SMALL, (3, 24, 3, 5, 4), (1, 24, 33, 31, 8), (1, 513, 1, 7, 27)], ids=str)
def test_groups_in_several_passes(shape, option, in_several_passes):
    for layout in LAYOUTS:
        assert_as_accurate_as_the_reference("group", *make("group", shape, option, layout, DEVICE))


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_in_several_passes(dtype, in_several_passes):
    tensors, others = make("group", (3, 24, 4, 6, 4), "all", "nhwc", DEVICE)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["bias"] = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_as_accurate_as_the_reference("group", tensors, others)


def test_programs_of_whole_groups():
    """One program has a group, or several small ones."""
    choose = launch.choose_groups
    assert choose(32 * 32, 128, 32) == launch.Groups(1, 1024, 4, num_warps=8)
    assert choose(32 * 32, 256, 32) == launch.Groups(1, 1024, 8, num_warps=16)
    assert choose(16 * 16, 384, 32) == launch.Groups(1, 256, 16, num_warps=8)
    assert choose(16 * 16, 128, 32) == launch.Groups(2, 256, 8, num_warps=4)
    assert choose(4 * 4, 256, 32) == launch.Groups(4, 16, 32, num_warps=1)
    assert choose(32 * 32, 384, 32) is None


@pytest.mark.release(but=lambda layout, dtype, **_: (layout == "nhwc") == (dtype == torch.bfloat16))
@pytest.mark.arithmetic
@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(norm, layout, dtype):
    """Maps and the time embedding's rows in a half type, parameters in float32, as under autocast; then all in half."""
    tensors, others = make(norm, (3, 24, 4, 6, 4), "all", layout, DEVICE)
    for name in ("x", "scale", "shift", "residual"):
        tensors[name] = tensors[name].to(dtype)
    assert_as_accurate_as_the_reference(norm, tensors, others)
    assert_as_accurate_as_the_reference(norm, {name: tensor.to(dtype) for name, tensor in tensors.items()}, others)


@pytest.mark.parametrize("option", ["bias", "all"])
@pytest.mark.parametrize("shape", [(19, 24, 4, 6, 4), (3, 513, 1, 7, 27)], ids=str)
def test_a_bias_for_each_sample(shape, option):
    tensors, others = make("group", shape, option, "nhwc", DEVICE)
    B, C = shape[:2]
    tensors["bias"] = torch.randn(B, C, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_as_accurate_as_the_reference("group", tensors, others)


def test_rows_of_a_bias_are_read_where_they_are():
    """Rows with a stride, with gaps, and one row for all samples: the bits of contiguous ones."""
    tensors, others = make("group", (3, 24, 4, 6, 4), "all", "nhwc", DEVICE)
    wide = torch.randn(3, 49, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for bias in (wide[:, 24:48], wide[:, ::2][:, :24], wide[:1, :24].expand(3, -1)):
        found = []
        for given in (bias, bias.contiguous()):
            x, row = tensors["x"].detach().requires_grad_(), given.detach().requires_grad_()
            with use_backend("triton"):
                out = NORMS["group"](**{**tensors, "x": x, "bias": row}, **others)
            found.append((out, *torch.autograd.grad(out.sin().sum(), (x, row))))
        assert all(torch.equal(strided, dense) for strided, dense in zip(*found, strict=True))


@both_norms
def test_maps_of_other_layouts_and_dtypes(norm):
    """A residual and rows in another layout than x."""
    tensors, others = make(norm, (3, 24, 4, 6, 4), "all", "nhwc", DEVICE)
    tensors["residual"] = tensors["residual"].contiguous().to(torch.bfloat16)
    wide = torch.randn(3, 48, device=DEVICE)
    tensors["scale"], tensors["shift"] = wide.chunk(2, dim=1)
    with use_backend("triton"):
        out = NORMS[norm](**tensors, **others)
        same = NORMS[norm](**{name: tensor.contiguous() for name, tensor in tensors.items()}, **others)
    assert torch.equal(out, same) and out.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_the_reference(norm, tensors, others)
    tensors["scale"] = tensors["scale"].t().contiguous().t()
    with use_backend("triton"):
        assert torch.equal(NORMS[norm](**tensors, **others), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [("offset", "bias", "scale", "shift"), ("bias",), ("shift",), ("offset", "scale")])
def test_rows_of_more_samples_and_chunks_than_a_block(dtype, given):
    """The finishing kernel by itself: gain in float32, the others in `dtype`, each rounded once."""
    B, chunks, C = (9, 37, 21) if triton_launch.interpreted() else (37, 67, 21)
    generator = torch.Generator().manual_seed(1)
    sums = torch.randn(B, chunks, 3 if "bias" in given else 2, C, generator=generator)
    shapes = {"gain": (C,), "offset": (C,), "bias": (C,), "scale": (B, C), "shift": (B, C)}
    values = {name: torch.randn(shapes[name], generator=generator) for name in shapes if name in ("gain", *given)}
    values = {name: value if name == "gain" else value.to(dtype) for name, value in values.items()}
    gain, offset, _, scale, _ = (values[name].double() if name in values else None for name in shapes)
    dy, dy_normed, *dx = sums.double().sum(1).unbind(1)
    factor = 1 if scale is None else 1 + scale
    expected = {"gain": (dy_normed * factor).sum(0), "offset": (dy * factor).sum(0), "shift": dy}
    expected |= {"bias": dx[0].sum(0) if dx else None}
    expected |= {"scale": dy_normed * gain + (0 if offset is None else dy * offset)}
    values = {name: value.to(DEVICE) for name, value in values.items()}
    made = {name: torch.full_like(value, float("nan")) for name, value in values.items()}
    blocks = launch.rows_blocks(C, triton_launch.interpreted())
    inputs = (sums.to(DEVICE), *(values.get(name) for name in ("gain", "offset", "scale")))
    programs, gradients = -(-C // blocks["BLOCK_C"]), [made.get(name) for name in shapes]
    kernel.norm_silu_bwd_rows_kernel[(programs, 1)](
        *inputs, *gradients, None, None, None, None, B, C, chunks, C, 0, **blocks
    )
    for name, gradient in made.items():
        torch.testing.assert_close(gradient.cpu(), expected[name].to(gradient.dtype), msg=lambda m, name=name: name + m)

    # Those of another norm, without scale and shift, in the same launch.
    last_sums = torch.randn(B, chunks // 2, sums.shape[2], C, generator=generator)
    dy, dy_normed, *dx = last_sums.double().sum((0, 1))
    expected_of_last = {"gain": dy_normed, "offset": dy, "bias": dx[0] if dx else None}
    again, of_last = (
        {name: torch.full_like(value, float("nan")) for name, value in values.items() if name in kinds}
        for kinds in (shapes, expected_of_last)
    )
    kernel.norm_silu_bwd_rows_kernel[(programs, 2)](
        *inputs, *(again.get(name) for name in shapes), last_sums.to(DEVICE),
        *(of_last.get(name) for name in expected_of_last), B, C, chunks, C, chunks // 2, **blocks,
    )  # fmt: skip
    assert all(torch.equal(again[name], made[name]) for name in made)
    for name, gradient in of_last.items():
        expected_one = expected_of_last[name].to(gradient.dtype)
        torch.testing.assert_close(gradient.cpu(), expected_one, msg=lambda m, name=name: f"last {name} {m}")


def make_two(norm, option, dtype=torch.float32, shape=(3, 24, 4, 6, 4)) -> tuple[dict, dict]:
    """Arguments of two norms, of which the last has those named last_*, and gain in another shape."""
    tensors, others = make(norm, shape, option, "nhwc", DEVICE)
    last, _ = make(norm, shape, "all", "nhwc", DEVICE, seed=1)
    residual = {"residual": tensors.pop("residual", last["residual"])}
    tensors |= {f"last_{name}": last[name] for name in ("gain", "offset", "bias") if name in last and name in tensors}
    tensors["last_gain"] = tensors["last_gain"].reshape(-1)
    halves = {name: tensors[name].to(dtype) for name in ("x", "scale", "shift") if name in tensors}
    return tensors | halves | residual, others


def run_two(tensors: dict, others: dict, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """Both norms, with a function of their own between."""
    given = {**tensors, **leaves}
    rows = [given.get(name) for name in ("x", "gain", "offset", "bias", "scale", "shift")]
    last = tuple(given.get(f"last_{name}") for name in ("gain", "offset", "bias"))
    kind = {"groups": others.get("groups", 0), "eps": 1e-5}
    with use_backend("triton"):
        dropout = {"dropout_p": others.get("dropout_p", 0.0)}
        h, sums = first_norm_silu(*rows, others.get("seed"), last, **kind, **dropout)
        return last_norm_silu(h.sin(), *last, given["residual"], sums, **kind)


def gradients_of_two(tensors: dict, others: dict, wanted) -> dict[str, torch.Tensor]:
    """The output and the gradients of the tensors of these names, with poisoned memory."""
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in wanted}
    with poisoned_memory():
        out = run_two(tensors, others, leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def count_finishing(monkeypatch) -> list[int]:
    """Programs per channel of every later launch of the finishing kernel."""
    launches, finish = [], kernel.gradients_of_rows

    def counted(x, sums, rows, last_sums=None):
        launches.append(1 if last_sums is None else 2)
        return finish(x, sums, rows, last_sums)

    monkeypatch.setattr(kernel, "gradients_of_rows", counted)
    return launches


@pytest.mark.release(but=lambda option, dtype, **_: (dtype == torch.bfloat16) == (option == "all"))
@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["plain", "bias", "all"])
def test_two_norms_are_finished_by_one_launch_with_the_same_bits(norm, option, dtype, monkeypatch):
    launches = count_finishing(monkeypatch)
    tensors, others = make_two(norm, option, dtype)
    together = gradients_of_two(tensors, others, tensors)
    assert launches == [2]
    monkeypatch.setattr(op, "_are_finished_together", lambda x, first, last: False)
    apart = gradients_of_two(tensors, others, tensors)
    assert launches == [2, 1, 1]
    for name, gradient in apart.items():
        assert torch.equal(gradient, together[name]) and gradient.stride() == together[name].stride(), name
        assert gradient.shape == together[name].shape == (tensors[name] if name != "out" else gradient).shape
        assert gradient.dtype == together[name].dtype


def test_chunks_of_the_first_norm_that_dropout_makes_larger(monkeypatch):
    """With 1024 channels a tile has one pixel, and four under dropout; on a GPU chunks differ between the norms."""
    tile = partial(launch.choose_tile, 64, 1024, whole_rows=True, sums=True, interpreted=False)
    assert tile(dropout=True).chunk == 4 * tile(dropout=False).chunk
    if triton_launch.interpreted():
        monkeypatch.setattr(launch, "choose_tile", partial(few_pixels, launch.choose_tile))
        monkeypatch.setattr(launch, "_plan", launch._plan.__wrapped__)  # without its cache
    tensors, others = make_two("rms", "all", shape=(2, 24 if triton_launch.interpreted() else 1024, 8, 8, 4))
    together = gradients_of_two(tensors, others, tensors)
    monkeypatch.setattr(op, "_are_finished_together", lambda x, first, last: False)
    apart = gradients_of_two(tensors, others, tensors)
    assert all(torch.equal(apart[name], together[name]) for name in apart)


def few_pixels(choose, HW: int, C: int, *, dropout: bool, **others: bool) -> launch.Tile:
    """As `choose`, with tiles of 4 or, under dropout, 16 pixels."""
    tile = choose(HW, C, dropout=dropout, **others)
    return replace(tile, block_n=16 if dropout else 4, tiles=2)


# A group of few pixels, which a program holds whole, and one of many, which several read in chunks.
@pytest.mark.release(but=lambda dtype, readers, **_: (dtype == torch.bfloat16) == (readers == 3))
@pytest.mark.parametrize("norm, shape", [("rms", SMALL), ("group", SMALL), ("group", (2, 8, 65, 64, 2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_gradients_of_the_readers_of_the_last_norm(norm, shape, dtype, readers):
    """Each reader has a branch, and no pass adds their gradients: the same bits as in float32, rounded once."""
    tensors, others = make_two(norm, "all", dtype, shape)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with branching():
        out = run_two(tensors, others, leaves)
    maps = [out, *(branch(out) for _ in range(readers - 1))]
    grads = [
        torch.randn(out.shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last) for _ in maps
    ]
    grads[-1] = grads[-1].contiguous()  # of any strides
    assert len({map.data_ptr() for map in maps}) == 1 and len({id(map) for map in maps}) == readers
    made = torch.autograd.grad(maps, list(leaves.values()), grads)
    total = sum(grad.float() for grad in grads).to(dtype)
    without = run_two(tensors, others, leaves)
    assert torch.equal(without, out)
    for name, one, expected in zip(
        leaves, made, torch.autograd.grad(without, list(leaves.values()), total), strict=True
    ):
        assert torch.equal(one, expected), name


def test_branches_are_taken_once_and_made_only_where_they_are_wanted():
    tensors, others = make_two("rms", "bias")
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with branching():
        out = run_two(tensors, others, leaves)
        with torch.no_grad():
            assert branch(frozen := run_two(tensors, others, leaves)) is frozen
    assert all(branch(out) is not out for _ in range(MOST_BRANCHES)) and branch(out) is out
    assert branch(plain := run_two(tensors, others, leaves)) is plain
    (only,) = torch.autograd.grad(branch(run_two(tensors, others, leaves)).sum(), leaves["x"])
    with branching():
        out = run_two(tensors, others, leaves)
    assert torch.equal(torch.autograd.grad(branch(out).sum(), leaves["x"])[0], only)  # the map itself has no gradient


def test_branches_that_nobody_takes_end_with_their_map():
    tensors, others = make_two("rms", "bias")
    with branching():
        out = run_two(tensors, others, {name: tensors[name].requires_grad_() for name in ("x", "last_gain")})
    taken = branch(out)
    map, left = weakref.ref(out), weakref.ref(out._ddpm_fast_branches[0])
    del out
    assert map() is None and left() is None and taken.requires_grad


@cache
def all_gradients_of_two() -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """Arguments of two norms, and their output and every gradient."""
    tensors, others = make_two("group", "all")
    return tensors, others, gradients_of_two(tensors, others, tensors)


@pytest.mark.parametrize("wanted", ["x", "gain", "bias", "last_gain", "last_bias", "last_offset", "residual", "scale"])
def test_of_two_norms_only_the_gradient_that_is_asked_for(wanted):
    tensors, others, expected = all_gradients_of_two()
    assert torch.equal(gradients_of_two(tensors, others, [wanted])[wanted], expected[wanted])
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = run_two(tensors, others, leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
    assert torch.equal(torch.autograd.grad(out, leaves[wanted], grad)[0], expected[wanted])


@pytest.mark.parametrize(
    "change, launches",
    [
        (lambda tensors: ["gain", "bias", "last_gain", "last_bias"], [1, 1]),  # nothing before the first norm
        (lambda tensors: ["x", "gain", "bias"], [1, 1]),  # a frozen last norm
        (lambda tensors: tensors.update(last_gain=tensors["last_gain"].half()) or tensors, [1, 1]),
        (lambda tensors: tensors.update(last_bias=tensors["last_bias"].half()) or tensors, [1, 1]),
        (lambda tensors: tensors.update(last_bias=None) or [n for n in tensors if n != "last_bias"], [1, 1]),
        (lambda tensors: ["x", "last_bias"], [2]),
    ],
)
def test_two_norms_that_are_finished_together_or_not(change, launches, monkeypatch):
    made = count_finishing(monkeypatch)
    tensors, others = make_two("rms", "bias")
    wanted = change(tensors)
    results = gradients_of_two(tensors, others, wanted)
    assert made == launches and all(results[name].isfinite().all() for name in wanted)
    assert [run_two(tensors, others, {}).grad_fn, made] == [None, launches]


def test_two_norms_of_which_the_last_runs_another_backend():
    """Its gradients are its own, to which the first adds nothing."""
    tensors, others = make_two("rms", "bias")
    expected = gradients_of_two(tensors, others, tensors)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    last = (leaves["last_gain"], None, leaves["last_bias"])
    with use_backend("triton"):
        rows = (leaves["x"], leaves["gain"], None, leaves["bias"], None, None, None)
        h, sums = first_norm_silu(*rows, last, groups=0, eps=0.0, dropout_p=0.0)
    with use_backend("reference"):
        out = last_norm_silu(h.sin(), *last, leaves["residual"], sums, groups=0, eps=0.0)
    assert sums is not None
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_two_norms_compiled_have_backwards_of_their_own(monkeypatch):
    launches = count_finishing(monkeypatch)
    tensors, others = make_two("rms", "all")
    expected = gradients_of_two(tensors, others, tensors)
    compiled = torch.compile(partial(run_two, tensors, others), backend="aot_eager", fullgraph=True)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = compiled(leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape))
    assert torch.equal(out, expected["out"]) and launches == [2, 1, 1]
    assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in leaves.items())


@both_norms
def test_opcheck_of_two_norms(norm):
    tensors, others = make(norm, (2, 8, 3, 4, 2), "all", "nhwc", DEVICE)
    rows = [tensors.get(name) for name in ("gain", "offset", "bias", "scale", "shift")]
    groups, seed, dropout_p = others.get("groups", 0), others["seed"], others["dropout_p"]
    operators, x = torch.ops.ddpm_fast, tensors["x"]
    out, statistics = operators.norm_silu(x, *rows, None, seed, groups, 1e-5, True, dropout_p)
    of_last = (out, x, statistics, *rows[:3])
    for branches in ((x, x), (x, None), (None, None)):
        torch.library.opcheck(operators.norm_silu_backward_of_last.default, (*of_last, *branches, groups))
    _, sums, _ = operators.norm_silu_backward_of_last(*of_last, None, None, groups)
    of_both = (out, x, statistics, *rows, seed, sums, groups, dropout_p)
    torch.library.opcheck(operators.norm_silu_backward_of_both.default, of_both)


@pytest.mark.arithmetic
def test_rows_of_zeros():
    """The norm is clamped: finite, and equal to the reference in its huge gradient as well."""
    tensors, others = make("rms", SMALL, "scale", "nhwc", DEVICE)
    with torch.no_grad():
        tensors["x"][:, :, 1] = 0
        tensors["x"][0, :, 2] *= 1e-14
    assert_as_accurate_as_the_reference("rms", tensors, others)


@pytest.mark.arithmetic
def test_gradients_that_cancel():
    """One channel per norm: x of RMSNorm only gives its sign, and a bias before GroupNorm changes nothing.

    RMSNorm, with d the gradient at x̂: the root of RN(x²) is |x|, so that x̂ = x·RN(1/|x|) is ±1 or ±(1 − 2⁻²⁴). Then
    d − x̂·(x̂·d) is at most 2⁻²⁴·|d| in the first case (where d is fused and not rounded) and 6·2⁻²⁴·|d| in the second,
    and dx that over |x|: 5e-6 here, since the smallest x are of the first case. Both roundings must be correct for
    that: with the 2 units that an approximate division may be off, dx is up to 2e-5.
    GroupNorm: the sum of 25 dx of size 1, each off by half a unit, and 25 times the error of a mean of size ½.
    """
    tensors, others = make("rms", (2, 1, 5, 5, 1), "plain", "nhwc", DEVICE)
    gradients = run("rms", "triton", tensors, others)
    assert gradients["dx"].abs().max() < 1e-5
    y = (tensors["x"].sign() * tensors["gain"]).double()
    d = torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape) * tensors["gain"]
    d = d * y.sigmoid() * (1 + y * (1 - y.sigmoid()))
    assert (gradients["dx"].abs() <= 1.001 * 6 * 2**-24 * d.abs() / tensors["x"].abs()).all()
    gradients = run("group", "triton", *make("group", (2, 3, 5, 5, 3), "bias", "nhwc", DEVICE))
    assert gradients["dbias"].abs().max() < 1e-5


@pytest.mark.arithmetic
@pytest.mark.parametrize("shape", [(2, 24, 5, 7, 4), (1, 8, 40, 40, 2)], ids=str)
def test_variance_far_from_zero(shape):
    """Mean 1000, deviation 1: E[x²] − E[x]² in float32 would have no correct digit of the variance."""
    tensors, others = make("group", shape, "bias", "nhwc", DEVICE)
    tensors["x"] = tensors["x"] + 1000
    actual = run("group", "triton", tensors, others)
    truth = run("group", "reference", {name: tensor.double() for name, tensor in tensors.items()}, others)
    assert (actual["out"] - truth["out"]).abs().max() < 1e-3
    assert (actual["dx"] - truth["dx"]).abs().max() < 1e-3 * truth["dx"].abs().max()


@both_norms
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=["quads", "single"])
def test_dropout(norm, size):
    tensors, others = make(norm, (4, 24, *size, 4), "plain", "nhwc", DEVICE)
    p, seed = 0.3, torch.tensor([-5], device=DEVICE)
    with use_backend("triton"):
        plain = NORMS[norm](**tensors, **others)
        dropped = NORMS[norm](**tensors, **others, dropout_p=p, seed=seed)
        other = NORMS[norm](**tensors, **others, dropout_p=p, seed=seed + 1)
    keep = reference.keep_mask(plain.shape, p, seed)
    torch.testing.assert_close(dropped, torch.where(keep, plain / (1 - p), 0.0))
    assert torch.equal(dropped != 0, keep & (plain != 0))
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    for out in (dropped, other):
        assert abs((out != 0).double().mean().item() - (1 - p)) < 5 * deviation
    assert not torch.equal(dropped != 0, other != 0)
    assert torch.equal(reference.keep_mask(plain.shape, p, seed)[:2], reference.keep_mask(plain[:2].shape, p, seed))


@both_norms
def test_backward_drops_what_forward_dropped(norm):
    """With one pixel and no activation the gradient of shift is the mask itself."""
    tensors, others = make(norm, (4, 24, 1, 1, 4), "shift", "nhwc", DEVICE)
    shift = tensors["shift"].requires_grad_()
    options = {"activation": False, "dropout_p": 0.5, "seed": torch.tensor([9], device=DEVICE)}
    with use_backend("triton"):
        out = NORMS[norm](**tensors, **others, **options)
    out.sum().backward()
    assert torch.equal(shift.grad, (out[:, :, 0, 0] != 0) * 2.0)


@both_norms
def test_finite_differences(norm):
    """Central differences of the kernels' own forward along a random direction, for every input."""
    tensors, others = make(norm, (2, 24, 3, 4, 4), "all", "nhwc", DEVICE)
    gradients = run(norm, "triton", tensors, others)
    weights = torch.linspace(-1, 1, tensors["x"].numel(), device=DEVICE).reshape(tensors["x"].shape).double()
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        values = []
        with use_backend("triton"):
            for h in (1e-2, -1e-2):
                out = NORMS[norm](**{**tensors, name: tensor + h * direction}, **others)
                values.append((out.double() * weights).sum())
        expected = ((values[0] - values[1]) / 2e-2).item()
        actual = (gradients[f"d{name}"] * direction).sum().item()
        assert abs(actual - expected) < 5e-3 * max(1, abs(expected)), name


@both_norms
def test_deterministic_and_independent_of_the_batch(norm):
    shape = (2, 12, 40, 40, 2)
    tensors, others = make(norm, shape, "all", "nhwc", DEVICE)
    first, second = run(norm, "triton", tensors, others), run(norm, "triton", tensors, others)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    alone = {name: t[:1] if name in ("x", "scale", "shift", "residual") else t for name, t in tensors.items()}
    with use_backend("triton"):
        assert torch.equal(NORMS[norm](**alone, **others), first["out"][:1])


@both_norms
def test_keeps_only_x_and_a_few_floats(norm):
    B, C, H, W, G = shape = (2, 24, 8, 8, 4)
    tensors, others = make(norm, shape, "all", "nhwc", DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NORMS[norm](**leaves, **others)
    given = {tensor.data_ptr() for tensor in (*tensors.values(), others["seed"])}
    new = [tensor for tensor in kept if tensor.data_ptr() not in given]
    assert [tensor.numel() for tensor in new] == [B * H * W if norm == "rms" else B * G * 2]
    assert tensors["residual"].data_ptr() not in {tensor.data_ptr() for tensor in kept}


@pytest.mark.release(but=lambda norm, option: (norm == "rms") == (option == "plain"))
@both_norms
@pytest.mark.parametrize("option", ["plain", "all"])
def test_opcheck(norm, option):
    tensors, others = make(norm, (2, 8, 3, 4, 2), option, "nhwc", DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    rows = [leaves.get(name) for name in ("gain", "offset", "bias", "scale", "shift")]
    numbers = (others.get("groups", 0), 1e-5, True, others.get("dropout_p", 0.0))
    arguments = (leaves["x"], *rows, leaves.get("residual"), others.get("seed"), *numbers)
    torch.library.opcheck(torch.ops.ddpm_fast.norm_silu.default, arguments)
    out, statistics = torch.ops.ddpm_fast.norm_silu(*arguments)
    detached = [None if row is None else row.detach() for row in rows]
    options = (others.get("seed"), numbers[0], *numbers[2:])
    arguments = (out.detach(), leaves["x"].detach(), statistics, *detached, *options)
    torch.library.opcheck(torch.ops.ddpm_fast.norm_silu_backward.default, arguments)


@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(norm, layout):
    tensors, others = make(norm, (2, 8, 3, 4, 2), "all", layout, DEVICE)

    def loss(tensors):
        out = NORMS[norm](**tensors, **others)
        return (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)).sum(), out

    results = []
    with use_backend("triton"):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
            value, out = function(leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


def test_autocast_keeps_the_inputs_dtype():
    tensors, others = make("rms", SMALL, "all", "nhwc", DEVICE)
    with use_backend("triton"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert NORMS["rms"](**tensors, **others).dtype == torch.float32
        tensors["x"] = tensors["x"].bfloat16()
        assert NORMS["rms"](**tensors, **others).dtype == torch.bfloat16


REFUSED = {
    "float64": (lambda x: x.double(), "x is torch.float64, and the kernels compute in float32"),
    "empty": (lambda x: x[:0], "x is empty"),
    "strided": (lambda x: x[:, :, ::2], "x is neither contiguous nor channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_the_reference_runs(name):
    change, reason = REFUSED[name]
    tensors, others = make("group", SMALL, "bias", "nhwc", DEVICE)
    tensors["x"] = change(tensors["x"])
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"group_norm_silu: .* refuses: {reason}"):
        NORMS["group"](**tensors, **others)
    assert NORMS["group"](**tensors, **others).shape == tensors["x"].shape


def test_refuses_rows_that_registers_do_not_hold():
    x, gain = torch.zeros(1, 8193, 1, 1, device=DEVICE), torch.zeros(8193, device=DEVICE)
    with use_backend("triton"), pytest.raises(RuntimeError, match="x has 8193 channels, and a program of the RMSNorm"):
        NORMS["rms"](x, gain)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_another_reader_is_added(layout, activation):
    """Output, and every gradient of a function of both outputs, in one backward pass of the norm."""

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        with use_backend(backend):
            out, x = group_norm_silu_beside(**leaves, **others, eps=1e-5, activation=activation)
        assert (x is leaves["x"]) == (backend == "reference")
        (out.sin() * x.cos()).sum().backward()
        return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    tensors, others = make("group", (3, 24, 5, 6, 4), "plain", layout, DEVICE)
    actual, expected = gradients("triton", torch.float32), gradients("reference", torch.float32)
    truth = gradients("reference", torch.float64)
    for name, value in truth.items():
        assert_close_to_truth(actual[name], expected[name], value, name=name, floor=16)


def test_triton_is_preferred_where_it_runs():
    rows = [line for line in dispatch.explain(devices=[torch.device(DEVICE)]).splitlines() if "_norm_silu" in line]
    assert len(rows) == 6
    assert all(("* triton" in row and "accepts" in row) == ("triton" in row) for row in rows)


@pytest.mark.release(but=lambda norm, dim_mults: (norm, dim_mults) == ("rms", (1,)))
@pytest.mark.parametrize("norm, dim_mults", [("rms", (1,)), ("rms", (1, 2)), ("group", (1,))])
def test_unet(norm, dim_mults, monkeypatch):
    """A whole network, output and every gradient: blocks with time embedding, residuals and equal dropout.

    The reference would call modules, with torch's dropout: here blocks stay composed of their steps.
    """
    monkeypatch.setattr(stock, "forced_backend", lambda: None)
    model = Unet(8, dim_mults=dim_mults, dropout=0.2, norm=norm, resnet_block_groups=4).to(DEVICE)
    x, t = torch.randn(2, 3, 4, 4, device=DEVICE), torch.tensor([3, 500], device=DEVICE)
    results = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        model.zero_grad()
        with use_backend(backend), exact_convolutions():
            out = model(x, t)
            out.square().mean().backward()
        results[backend] = {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}
    for name, expected in results["reference"].items():
        torch.testing.assert_close(results["triton"][name], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_a_residual_block_compiles_whole():
    """With time embedding and dropout, forward and backward; every other op compiles in the tests of its own."""
    block = Unet(8, dim_mults=(1,), dropout=0.2).downs[0][0].to(DEVICE)
    x, time = torch.randn(2, 8, 4, 4, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    with use_backend("triton"):
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        compiled(x, time).square().mean().backward()
        block.eval()
        torch.testing.assert_close(compiled(x, time), block(x, time))
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.release
def test_unet_compiles_whole():
    model = Unet(8, dim_mults=(1,), dropout=0.2).to(DEVICE)
    x, t = torch.randn(2, 3, 4, 4, device=DEVICE), torch.tensor([3, 500], device=DEVICE)
    with use_backend("triton"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x, t).square().mean().backward()
        model.eval()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x, t), model(x, t))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_second_derivative_of_two_norms_is_refused_and_not_wrong():
    tensors, others = make_two("rms", "bias")
    x = tensors["x"].requires_grad_()
    out = run_two(tensors, others, {"last_gain": tensors["last_gain"].requires_grad_()})
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong():
    x = torch.randn(1, 4, 4, 4, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        out = NORMS["rms"](x, torch.ones(4, device=DEVICE))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)
