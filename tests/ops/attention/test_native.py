"""Attention and its block in C++ against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import attention_block
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.native_cases import (
    CHANNELS_LAST,
    GRADS,
    assert_as_accurate_as_the_reference,
    assert_equal,
    instruction_sets,
    instructions,
    run,
    threads,
)

pytestmark = pytest.mark.skipif(extension.load() is None, reason=str(extension.reason()))

OPS = {"core": attention, "block": attention_block}
# B, heads, D, C, M, H, W
SHAPES = [
    (1, 1, 1, 1, 0, 1, 1),
    (3, 2, 8, 3, 1, 1, 3),
    (1, 3, 10, 17, 2, 7, 1),
    (3, 4, 32, 64, 4, 7, 7),
    (1, 2, 5, 100, 3, 3, 7),
    (1, 1, 40, 513, 2, 3, 3),
    (2, 4, 32, 64, 4, 4, 4),  # rows few enough for weights as they are, with AVX-512 only
    (2, 2, 16, 24, 4, 33, 17),  # several tiles of queries
    (5, 1, 4, 6, 1, 16, 16),  # samples in more than one go
]
each_op = pytest.mark.parametrize("name", OPS)


def make(name: str, shape, residual: bool = True, seed: int = 0) -> tuple[dict, dict]:
    """Random float32 tensors, maps in channels-last, and the options."""
    B, heads, D, C, M, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        tensor = torch.randn(*size, generator=generator)
        return tensor.contiguous(memory_format=CHANNELS_LAST) if len(size) == 4 and size[2:] == (H, W) else tensor

    hidden = heads * D
    if name == "core":
        return {"qkv": 2 * normal(B, 3 * hidden, H, W), "mem_kv": normal(2, heads, M, D)}, {"heads": heads}
    tensors = {
        "x": normal(B, C, H, W),
        "gain_in": 1 + 0.3 * normal(1, C, 1, 1),
        "weight_qkv": 2 * normal(3 * hidden, C, 1, 1) / C**0.5,
        "mem_kv": normal(2, heads, M, D),
        "weight": normal(C, hidden, 1, 1) / hidden**0.5,
        "bias": 0.5 * normal(C),
    }
    if residual:
        tensors["residual"] = normal(B, C, H, W)
    return tensors, {"heads": heads}


@each_op
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(name, isa, shape):
    # A block's sums over positions go through four products: 8 units instead of 4.
    with instructions(isa):
        assert_as_accurate_as_the_reference(OPS[name], *make(name, shape), floor=8 if name == "block" else 4)


@each_op
@pytest.mark.parametrize("grad", GRADS)
def test_layouts_of_gradients_and_parameters(name, grad):
    tensors, options = make(name, (3, 2, 8, 20, 3, 5, 7), residual=False)
    for key in set(tensors) - {"x", "qkv"}:
        tensors[key] = torch.stack((tensors[key], tensors[key]), dim=-1)[..., 0]
        assert not tensors[key].is_contiguous()
    assert_as_accurate_as_the_reference(OPS[name], tensors, options, GRADS[grad])
    if name == "core":
        return
    flat = tensors | {"gain_in": tensors["gain_in"].flatten()}
    flat |= {key: tensors[key].flatten(1) for key in ("weight", "weight_qkv")}
    actual, expected = run(OPS[name], "native", flat, options), run(OPS[name], "native", tensors, options)
    assert_equal(actual, {key: value.reshape(actual[key].shape) for key, value in expected.items()})


def test_residual_of_another_layout_and_none():
    tensors, options = make("block", SHAPES[3])
    expected = run(attention_block, "native", tensors, options)
    tensors["residual"] = tensors["residual"].contiguous()
    assert_equal(run(attention_block, "native", tensors, options), expected)
    residual = tensors.pop("residual")
    without = run(attention_block, "native", tensors, options)["out"]
    torch.testing.assert_close(without + residual, expected["out"], rtol=1e-6, atol=1e-6)


@each_op
@pytest.mark.parametrize("shape", [(3, 4, 32, 64, 4, 12, 12), (2, 2, 16, 24, 4, 24, 24), (40, 2, 4, 6, 1, 6, 6)])
def test_the_number_of_threads_changes_nothing(name, shape):
    tensors, options = make(name, shape)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(OPS[name], "native", tensors, options))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(name, dtype):
    """A half map gives what its float32 copy gives, rounded; parameters keep their own type."""
    tensors, options = make(name, (2, 2, 8, 20, 3, 5, 7))
    half = set(tensors) & {"x", "qkv", "residual", "bias"}
    tensors |= {key: tensors[key].to(dtype) for key in half}
    actual = run(OPS[name], "native", tensors, options)
    wide = {key: tensor.float() for key, tensor in tensors.items()}
    out = run(OPS[name], "native", wide, options)
    expected = run(OPS[name], "native", wide, options, lambda grad: GRADS["channels-last"](grad.to(dtype).float()))
    assert torch.equal(actual["out"], out["out"].to(dtype))
    for key, tensor in tensors.items():
        assert actual[f"d{key}"].dtype == tensor.dtype
        assert torch.equal(actual[f"d{key}"], expected[f"d{key}"].to(tensor.dtype)), key


@each_op
@pytest.mark.parametrize("scale", [1e-13, 1e-4, 1e4])
def test_small_and_large_numbers(name, scale):
    """Softmax of wide scores, norms below their bound of 1e-12."""
    tensors, options = make(name, (2, 2, 8, 20, 3, 5, 7))
    if name == "block":
        tensors["x"] = tensors["x"] * scale
    else:
        tensors["qkv"] = tensors["qkv"] * min(scale, 2)
    assert_as_accurate_as_the_reference(OPS[name], tensors, options)


@each_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_spreads_as_in_the_reference(name, bad):
    tensors, options = make(name, (2, 2, 8, 20, 3, 7, 7))
    first = next(iter(tensors))
    tensors[first][0, 12, 3, 2] = bad
    actual, expected = (run(OPS[name], backend, tensors, options) for backend in ("native", "reference"))
    for key in expected:
        assert torch.equal(actual[key].isfinite(), expected[key].isfinite()), key


@st.composite
def cases(draw):
    integers = st.integers
    heads, D = draw(st.sampled_from([(1, 3), (2, 8), (3, 5), (1, 32), (2, 20)]))
    C = draw(integers(2, 40))  # of one channel the norm is a sign, and most gradients are 0 but for rounding
    shape = (draw(integers(1, 3)), heads, D, C, draw(integers(0, 5)), draw(integers(1, 15)), draw(integers(1, 15)))
    return draw(st.sampled_from(sorted(OPS))), shape, draw(st.booleans()), draw(integers(0, 999))


@given(cases(), st.sampled_from(instruction_sets() or ["none"]), st.sampled_from(sorted(GRADS)))
@settings(max_examples=200)
def test_drawn_sizes(case, isa, grad):
    name, shape, residual, seed = case
    tensors, options = make(name, shape, residual, seed)
    # Of a few elements the reference's error may happen to be nearly none, and some gradients are 0 but for rounding.
    with instructions(isa):
        assert_as_accurate_as_the_reference(OPS[name], tensors, options, GRADS[grad], factor=4.0, floor=64.0, least=1.0)


def test_opcheck():
    ops = torch.ops.ddpm_fast
    tensors, _ = make("core", (2, 2, 8, 20, 3, 3, 5))
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(ops.native_attention.default, (*leaves, 2))
    leaves = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(ops.native_attention_backward.default, (ops.native_attention(*leaves, 2), *leaves, 2))


def test_opcheck_of_the_block():
    ops = torch.ops.ddpm_fast
    tensors, _ = make("block", (2, 2, 8, 20, 3, 3, 5))
    residual = tensors.pop("residual").requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(ops.native_attention_block.default, (*leaves, residual, 2))
    torch.library.opcheck(ops.native_attention_block.default, (*leaves, None, 2))
    leaves = [tensor.detach() for tensor in leaves]
    out = ops.native_attention_block(*leaves, None, 2)
    torch.library.opcheck(ops.native_attention_block_backward.default, (out, *leaves, 2))


@each_op
@pytest.mark.parametrize("H, W, C", [(1, 1, 5), (3, 3, 1), (1, 1, 1), (1, 4, 3)])
def test_formats_are_those_of_the_reference(name, H, W, C):
    tensors, options = make(name, (2, 1, C, C, 1, H, W))
    native, reference = (run(OPS[name], backend, tensors, options)["out"] for backend in ("native", "reference"))
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        assert native.is_contiguous(memory_format=layout) == reference.is_contiguous(memory_format=layout)


@each_op
def test_compiles_without_a_break(name):
    tensors, options = make(name, (2, 2, 8, 20, 3, 3, 5))
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    compiled = torch.compile(lambda **leaves: OPS[name](**leaves, **options), fullgraph=True, backend="aot_eager")
    with use_backend("native"):
        expected = OPS[name](**leaves, **options)
        actual = compiled(**leaves)
    assert torch.equal(actual, expected)
    gradients = (torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)


def test_the_block_keeps_no_map_but_x():
    tensors, options = make("block", (2, 2, 8, 20, 3, 10, 10))
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), use_backend("native"):
        attention_block(**leaves, **options)
    assert {tensor.data_ptr() for tensor in saved} == {t.data_ptr() for k, t in tensors.items() if k != "residual"}


@each_op
def test_second_derivatives_are_refused(name):
    tensors, options = make(name, SHAPES[1])
    first = next(iter(tensors.values())).requires_grad_()
    with use_backend("native"):
        out = OPS[name](**tensors, **options)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.sum(), first, create_graph=True)


@each_op
def test_what_native_refuses_runs_elsewhere(name):
    tensors, options = make(name, (2, 2, 8, 20, 3, 3, 5), residual=False)
    first = next(iter(tensors))
    for changes, reason in (
        ({key: tensor.double() for key, tensor in tensors.items()}, "float64"),
        ({first: tensors[first].contiguous()}, "not channels-last"),
        ({first: tensors[first][:0]}, "is empty"),
    ):
        arguments = tensors | changes
        with use_backend("native"), pytest.raises(RuntimeError, match=reason):
            OPS[name](**arguments, **options)
        out = OPS[name](**arguments, **options)
        assert out.shape[0] == arguments[first].shape[0]
    rows = [line.split() for line in dispatch.explain(devices=[torch.device("cpu")]).splitlines()]
    assert [OPS[name].__name__, "cpu", "*", "native", "accepts"] in rows


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"x": torch.zeros(3)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(2, 7, 3, 5)}, ValueError, "weight_qkv must have shape"),
        ({"gain_in": torch.zeros(3)}, ValueError, "gain_in must have 20 elements"),
        ({"mem_kv": torch.zeros(2, 3, 1, 8)}, ValueError, "mem_kv must have shape"),
        ({"weight": torch.zeros(19, 16)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
        ({"residual": torch.zeros(2, 20, 3, 4)}, ValueError, "residual must have shape"),
        ({"weight": 3}, TypeError, "weight must be a tensor"),
        ({"bias": torch.zeros(20).int()}, TypeError, "bias must be float32"),
        ({"heads": 0}, ValueError, "heads must be a positive integer"),
    ],
)
def test_bad_input_of_the_block_gets_one_sentence(change, error, sentence):
    tensors, options = make("block", (2, 2, 8, 20, 3, 3, 5))
    with pytest.raises(error, match=sentence):
        attention_block(**(tensors | options | change))


def test_the_operators_themselves_guard_memory():
    ops = torch.ops.ddpm_fast
    for name in OPS:
        tensors, _ = make(name, (2, 2, 8, 20, 3, 3, 5), residual=False)
        given = list(tensors.values())
        optional = (None,) if name == "block" else ()
        forward = ops.native_attention_block if name == "block" else ops.native_attention
        backward = ops.native_attention_block_backward if name == "block" else ops.native_attention_backward
        out = forward(*given, *optional, 2)
        with pytest.raises(ValueError, match="channels-last"):
            forward(given[0].contiguous(), *given[1:], *optional, 2)
        with pytest.raises(ValueError, match="mem_kv must have shape"):
            forward(*given, *optional, 3)
        with pytest.raises(ValueError, match="channels|elements"):
            forward(given[0][:, :-1].contiguous(memory_format=CHANNELS_LAST), *given[1:], *optional, 2)
        with pytest.raises(TypeError, match="must be float32"):
            forward(*given[:-1], given[-1].double(), *optional, 2)
        with pytest.raises(ValueError, match="grad must have shape"):
            backward(out[1:], *given, 2)
    with pytest.raises(ValueError, match="bias must have 20 elements"):
        forward(*given[:-1], given[-1][1:], None, 2)
    with pytest.raises(ValueError, match="residual must have shape"):
        forward(*given, given[0][1:], 2)
