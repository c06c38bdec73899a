"""The attention block with GroupNorm in C++ against the reference; weights multiplied beforehand and not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.attention_block import op
from ddpm_fast.ops.attention_block.op import group_norm_attention_block
from ddpm_fast.runtime import extension
from ddpm_fast.testing.attention_block_cases import ORDERS, make
from ddpm_fast.testing.native_cases import (
    GRADS,
    assert_as_accurate_as_the_reference,
    assert_equal,
    instruction_sets,
    instructions,
    run,
    threads,
    without_pairs,
)

pytestmark = pytest.mark.skipif(extension.load() is None, reason=str(extension.reason()))

# B, heads, D, C, h, w; groups. The first is folded at once: one head of C channels, and rows enough.
FOLDED = ((3, 1, 24, 24, 6, 5), 4)
SHAPES = [
    FOLDED,
    ((1, 1, 40, 40, 33, 17), 5),  # folded: several tiles of queries, of channels and of rows
    ((9, 1, 17, 17, 12, 12), 0),  # folded: samples in more than one go, an odd panel, no norm
    ((1, 1, 6, 6, 1, 2), 3),
    ((2, 3, 10, 18, 7, 1), 6),
    ((2, 4, 32, 64, 7, 7), 8),
    ((1, 2, 20, 24, 24, 24), 2),
    ((9, 2, 5, 12, 12, 12), 0),
]


def folds(shape) -> bool:
    B, heads, D, C, h, w = shape
    return op._folds(torch.empty(B, C, h, w, device="meta"), torch.empty(C, heads * D, device="meta"), heads)


def test_which_cases_are_folded():
    assert [folds(shape) for shape, _ in SHAPES] == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_equals_the_reference(isa, shape, groups):
    order = ORDERS[SHAPES.index((shape, groups)) % 3]
    with instructions(isa):
        case = make(shape, groups=groups, order=order, output_scale=0.5**0.5)
        # As for upstream's block, whose sums over positions go through as many products.
        assert_as_accurate_as_the_reference(group_norm_attention_block, *case, floor=8)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", [{"residual": False}, {"biases": False, "groups": 3}])
def test_options(heads, order, kept):
    case = make((2, heads, 24 // heads, 24, 5, 7), order=order, **kept)
    assert_as_accurate_as_the_reference(group_norm_attention_block, *case, floor=8)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("grad", GRADS)
def test_layouts_of_gradients_and_parameters(heads, grad):
    tensors, options = make((2, heads, 24 // heads, 24, 5, 7), groups=4)
    for key in set(tensors) - {"x"}:
        tensors[key] = torch.stack((tensors[key], tensors[key]), dim=-1)[..., 0]
        assert not tensors[key].is_contiguous()
    assert_as_accurate_as_the_reference(group_norm_attention_block, tensors, options, GRADS[grad], floor=8)
    shaped = tensors | {"weight_qkv": tensors["weight_qkv"][:, :, None], "weight": tensors["weight"][..., 0, 0]}
    actual, expected = (run(group_norm_attention_block, "native", given, options) for given in (shaped, tensors))
    assert_equal({key: value.reshape(expected[key].shape) for key, value in actual.items()}, expected)


@pytest.mark.parametrize("shape", [(1, 1, 24, 24, 24, 24), (9, 1, 40, 40, 12, 12), (5, 3, 8, 24, 13, 12)])
def test_the_number_of_threads_changes_nothing(shape):
    tensors, options = make(shape, groups=4)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(group_norm_attention_block, "native", tensors, options))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(heads, dtype):
    """A half map gives what its float32 copy gives, rounded; parameters keep their own type."""
    tensors, options = make((2, heads, 24 // heads, 24, 5, 7), groups=4)
    tensors |= {key: tensors[key].to(dtype) for key in ("x", "bias", "weight_qkv", "gain")}
    with without_pairs():
        actual = run(group_norm_attention_block, "native", tensors, options)
    wide = {key: tensor.float() for key, tensor in tensors.items()}
    out = run(group_norm_attention_block, "native", wide, options)
    expected = run(
        group_norm_attention_block,
        "native",
        wide,
        options,
        lambda grad: GRADS["channels-last"](grad.to(dtype).float()),
    )
    assert torch.equal(actual["out"], out["out"].to(dtype))
    for key, tensor in tensors.items():
        assert actual[f"d{key}"].dtype == tensor.dtype
        assert torch.equal(actual[f"d{key}"], expected[f"d{key}"].to(tensor.dtype)), key


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("scale", [1e-13, 1e-3, 1e4])
def test_small_and_large_numbers(heads, scale):
    tensors, options = make((2, heads, 24 // heads, 24, 5, 7), groups=4)
    tensors["x"] = (tensors["x"] + 1) * scale
    assert_as_accurate_as_the_reference(group_norm_attention_block, tensors, options, floor=8)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_spreads_as_in_the_reference(heads, bad):
    tensors, options = make((2, heads, 24 // heads, 24, 5, 7), groups=4)
    tensors["x"][0, 12, 3, 2] = bad
    actual, expected = (
        run(group_norm_attention_block, backend, tensors, options) for backend in ("native", "reference")
    )
    for key in expected:
        if heads == 1 and key == "dbias_qkv":  # folded, the gradients of the biases of k and v need no softmax
            assert actual[key][24:].isfinite().all() and not actual[key][:24].isfinite().any()
            continue
        assert torch.equal(actual[key].isfinite(), expected[key].isfinite()), key


@st.composite
def cases(draw):
    integers = st.integers
    heads, D = draw(st.sampled_from([(1, 3), (2, 8), (3, 5), (1, 32), (2, 20), (1, 0)]))
    groups, width = draw(st.sampled_from([(0, 7), (1, 18), (2, 8), (3, 5), (4, 11)]))
    C = max(groups, 1) * width
    shape = (draw(integers(1, 3)), heads, D or C, C, draw(integers(1, 15)), draw(integers(2, 15)))
    options = {"groups": groups, "order": draw(st.sampled_from(ORDERS)), "residual": draw(st.booleans())}
    return make(shape, **options, biases=draw(st.booleans()), output_scale=0.5, seed=draw(integers(0, 999)))


@given(cases(), st.sampled_from(instruction_sets() or ["none"]), st.sampled_from(sorted(GRADS)))
@settings(max_examples=60)
def test_drawn_sizes(case, isa, grad):
    # Of a few elements the reference's error may happen to be nearly none, and some gradients are 0 but for rounding.
    with instructions(isa):
        assert_as_accurate_as_the_reference(
            group_norm_attention_block, *case, GRADS[grad], factor=4.0, floor=64.0, least=1.0
        )


@pytest.mark.parametrize("folded", [True, False])
def test_opcheck(folded):
    ops = torch.ops.ddpm_fast
    tensors, _ = make(FOLDED[0], groups=4)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    options = (4, 1e-5, 1, False, folded, True, 0.5)
    torch.library.opcheck(ops.native_group_norm_attention_block.default, (*leaves, *options, True))
    x, gain, offset, weight_qkv, bias_qkv, weight, bias = [tensor.detach() for tensor in leaves]
    bare = (x, None, None, weight_qkv, None, weight, None, 0, *options[1:], False)
    torch.library.opcheck(ops.native_group_norm_attention_block.default, bare)
    out, *kept = ops.native_group_norm_attention_block(
        x, gain, offset, weight_qkv, bias_qkv, weight, bias, *options, True
    )
    given = (out, x, gain, offset, weight_qkv, bias_qkv, weight, *kept, 4, 1, False, folded, True, 0.5)
    backward = ops.native_group_norm_attention_block_backward.default
    torch.library.opcheck(backward, (*given, True))
    torch.library.opcheck(backward, (*given, False))
    assert torch.equal(backward(*given, False)[0], backward(*given, True)[0])


@pytest.mark.parametrize("heads", [1, 2])
def test_nothing_is_kept_without_gradients(heads):
    tensors, options = make((2, heads, 24 // heads, 24, 5, 7), groups=4)
    with use_backend("native"):
        with torch.no_grad():
            out = group_norm_attention_block(**tensors, **options)
        assert torch.equal(group_norm_attention_block(**tensors, **options), out)
    flags = (4, 1e-5, heads, False, heads == 1, True, 1.0, False)
    returned = torch.ops.ddpm_fast.native_group_norm_attention_block(*tensors.values(), *flags)
    assert [tensor.numel() for tensor in returned[1:]] == [0, 0, 0]


def test_compiles_without_a_break():
    tensors, options = make(FOLDED[0], groups=4, order="hd3")
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    compiled = torch.compile(
        lambda **leaves: group_norm_attention_block(**leaves, **options), fullgraph=True, backend="aot_eager"
    )
    with use_backend("native"):
        expected = group_norm_attention_block(**leaves, **options)
        actual = compiled(**leaves)
    assert torch.equal(actual, expected)
    gradients = (torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.contiguous(), "x is not channels-last, its strides are"),
        (lambda x: x.double(), "x is torch.float64, and native code computes in float32"),
        (lambda x: x[:0], "x is empty"),
    ],
)
def test_refusals(change, message):
    tensors, options = make(FOLDED[0], groups=4)
    tensors["x"] = change(tensors["x"])
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        group_norm_attention_block(**tensors, **options)
    assert group_norm_attention_block(**tensors, **options).shape == tensors["x"].shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, "weight must have shape"),
        ({"groups": 5}, "groups must divide"),
        ({"gain": None}, "gain and offset must be given"),
        ({"folded": True, "heads": 2}, "weights are folded for one head of 24 channels, got 2 heads of 12"),
        ({"weight_qkv": torch.zeros(3, 24)}, "weight_qkv must have 1728 elements, got 72"),
        ({"x": torch.zeros(3, 24, 6, 5)}, "x must be channels-last"),
    ],
)
def test_the_operator_refuses_what_would_crash(change, message):
    tensors, _ = make(FOLDED[0], groups=4)
    options = {"groups": 4, "eps": 1e-5, "heads": 1, "by_head": False, "folded": False, "residual": True}
    given = {**tensors, **options, "output_scale": 1.0, "keep": False} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.ddpm_fast.native_group_norm_attention_block(**given)


def test_backward_refuses_what_forward_did_not_keep():
    tensors, _ = make(FOLDED[0], groups=4)
    flags = (4, 1, False, True, True, 1.0)
    x, gain, offset, weight_qkv, bias_qkv, weight, bias = tensors.values()
    out, statistics, qkv, _ = torch.ops.ddpm_fast.native_group_norm_attention_block(
        *tensors.values(), 4, 1e-5, *flags[1:], True
    )
    given = (out, x, gain, offset, weight_qkv, bias_qkv, weight, statistics, qkv, qkv)
    with pytest.raises(ValueError, match="attended must have shape"):
        torch.ops.ddpm_fast.native_group_norm_attention_block_backward(*given, *flags, True)
