"""Linear attention and its block in C++ against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import use_backend
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
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
    without_pairs,
)

pytestmark = pytest.mark.skipif(extension.load() is None, reason=str(extension.reason()))

OPS = {"tail": linear_attention, "block": linear_attention_block}
# B, heads, D, C, M, H, W
SHAPES = [
    (1, 1, 1, 1, 0, 1, 1),
    (3, 2, 8, 3, 1, 1, 3),
    (1, 3, 10, 17, 2, 7, 1),
    (3, 4, 32, 64, 4, 7, 7),
    (1, 2, 5, 100, 3, 3, 7),
    (1, 1, 40, 513, 2, 3, 3),
    (2, 4, 32, 64, 4, 33, 17),  # several groups of positions
    (1, 3, 10, 100, 2, 13, 11),  # a sample alone: small groups, odd heads
    (40, 1, 4, 6, 1, 2, 2),  # samples in more than one go
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
    if name == "block":
        tensors = {"x": normal(B, C, H, W), "gain_in": 1 + 0.3 * normal(1, C, 1, 1)}
        tensors["weight_qkv"] = 2 * normal(3 * hidden, C, 1, 1) / C**0.5
    else:
        tensors = {"qkv": 2 * normal(B, 3 * hidden, H, W)}
    tensors |= {
        "mem_kv": normal(2, heads, D, M),
        "weight": normal(C, hidden, 1, 1) / hidden**0.5,
        "bias": 0.5 * normal(C),
        "gain": 1 + 0.3 * normal(1, C, 1, 1),
    }
    if residual:
        tensors["residual"] = normal(B, C, H, W)
    return tensors, {"heads": heads}


@each_op
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(name, isa, shape):
    # A block's sums over positions go through four products: 6 units instead of 4.
    with instructions(isa):
        assert_as_accurate_as_the_reference(OPS[name], *make(name, shape), floor=6 if name == "block" else 4)


@each_op
@pytest.mark.parametrize("grad", GRADS)
def test_layouts_of_gradients_and_parameters(name, grad):
    tensors, options = make(name, (3, 2, 8, 20, 3, 5, 7), residual=False)
    for key in set(tensors) - {"x", "qkv"}:
        tensors[key] = torch.stack((tensors[key], tensors[key]), dim=-1)[..., 0]
        assert not tensors[key].is_contiguous()
    assert_as_accurate_as_the_reference(OPS[name], tensors, options, GRADS[grad])
    flat = dict(tensors, gain=tensors["gain"].flatten(), weight=tensors["weight"].flatten(1))
    if name == "block":
        flat |= {"gain_in": tensors["gain_in"].flatten(), "weight_qkv": tensors["weight_qkv"].flatten(1)}
    actual, expected = run(OPS[name], "native", flat, options), run(OPS[name], "native", tensors, options)
    assert_equal(actual, {key: value.reshape(actual[key].shape) for key, value in expected.items()})


@each_op
def test_residual_of_another_layout_and_none(name):
    tensors, options = make(name, SHAPES[3])
    expected = run(OPS[name], "native", tensors, options)
    tensors["residual"] = tensors["residual"].contiguous()
    assert_equal(run(OPS[name], "native", tensors, options), expected)
    residual = tensors.pop("residual")
    torch.testing.assert_close(
        run(OPS[name], "native", tensors, options)["out"] + residual, expected["out"], rtol=1e-6, atol=1e-6
    )


@each_op
@pytest.mark.parametrize("shape", [(3, 4, 32, 64, 4, 24, 24), (40, 2, 4, 6, 1, 2, 2), (1, 5, 30, 190, 4, 16, 15)])
def test_the_number_of_threads_changes_nothing(name, shape):
    tensors, options = make(name, shape)
    results = []
    for count in (1, 2, 3, 5, 7):
        with threads(count):
            results.append(run(OPS[name], "native", tensors, options))
    for other in results[1:]:
        assert_equal(other, results[0])


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(name, dtype):
    """A half map gives what its float32 copy gives, rounded; parameters keep their own type."""
    tensors, options = make(name, (2, 2, 8, 20, 3, 5, 7))
    maps = ["x" if name == "block" else "qkv", "residual"]
    tensors |= {key: tensors[key].to(dtype) for key in [*maps, "bias"]}
    with without_pairs():
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
        tensors["weight_qkv"] = tensors["weight_qkv"] * min(scale, 5)
    else:
        tensors["qkv"] = tensors["qkv"] * min(scale, 5)
        tensors["weight"], tensors["bias"] = tensors["weight"] * scale, tensors["bias"] * scale
    # Where one key has all the weight the reference takes a gradient from itself, and ours the sum of the products.
    assert_as_accurate_as_the_reference(OPS[name], tensors, options, floor=16.0)


@each_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_spreads_as_in_the_reference(name, bad):
    tensors, options = make(name, (2, 2, 8, 20, 3, 17, 17))
    first = next(iter(tensors))
    tensors[first][0, 12, 3, 2] = bad
    actual, expected = (run(OPS[name], backend, tensors, options) for backend in ("native", "reference"))
    for key in expected:
        assert torch.equal(actual[key].isfinite(), expected[key].isfinite()), key


def test_keys_of_minus_infinity_weigh_nothing():
    tensors, options = make("tail", (2, 2, 8, 20, 3, 17, 17))
    tensors["qkv"][0, 16:32, 3:] = -torch.inf  # whole groups of positions
    tensors["mem_kv"][0, :, :, 1] = -torch.inf
    with use_backend("native"):
        out = linear_attention(**tensors, **options)
    with use_backend("reference"):
        torch.testing.assert_close(out, linear_attention(**tensors, **options), rtol=1e-5, atol=1e-5)


@st.composite
def cases(draw):
    integers = st.integers
    heads, D = draw(st.sampled_from([(1, 3), (2, 8), (3, 5), (1, 32), (2, 20)]))
    C = draw(integers(2, 40))  # of one channel the norm is a sign, and most gradients are 0 but for rounding
    shape = (draw(integers(1, 3)), heads, D, C, draw(integers(0, 5)), draw(integers(1, 20)), draw(integers(1, 20)))
    return draw(st.sampled_from(sorted(OPS))), shape, draw(st.booleans()), draw(integers(0, 999))


@given(cases(), st.sampled_from(instruction_sets() or ["none"]), st.sampled_from(sorted(GRADS)))
@settings(max_examples=200)
def test_drawn_sizes(case, isa, grad):
    name, shape, residual, seed = case
    tensors, options = make(name, shape, residual, seed)
    # Of a few elements the reference's error may happen to be nearly none, and some gradients are 0 but for rounding.
    with instructions(isa):
        assert_as_accurate_as_the_reference(OPS[name], tensors, options, GRADS[grad], factor=4.0, floor=64.0, least=1.0)


@each_op
def test_opcheck(name):
    tensors, options = make(name, (2, 2, 8, 20, 3, 3, 5))
    residual = tensors.pop("residual")
    forward = getattr(torch.ops.ddpm_fast, "native_linear_attention" + ("_block" if name == "block" else ""))
    backward = getattr(torch.ops.ddpm_fast, forward._qualified_op_name.partition("::")[2] + "_backward")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(forward.default, (*leaves, residual.requires_grad_(), 2))
    torch.library.opcheck(forward.default, (*leaves, None, 2))
    leaves = [tensor.detach() for tensor in leaves]
    out, *kept = forward(*leaves, None, 2)
    torch.library.opcheck(backward.default, (out, *leaves, *kept, 2))


@each_op
@pytest.mark.parametrize("H, W, C", [(1, 1, 5), (3, 3, 1), (1, 1, 1), (1, 4, 3)])
def test_formats_are_those_of_the_reference(name, H, W, C):
    tensors, options = make(name, (2, 2, 4, C, 1, H, W))
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
    tensors, options = make("block", (2, 2, 8, 20, 3, 30, 30))
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), use_backend("native"):
        linear_attention_block(**leaves, **options)
    maps = [tensor for tensor in saved if tensor.numel() >= 2 * 30 * 30]
    assert [tensor.data_ptr() for tensor in maps] == [tensors["x"].data_ptr()]


@each_op
def test_second_derivatives_are_refused(name):
    tensors, options = make(name, SHAPES[1])
    first = next(iter(tensors.values())).requires_grad_()
    with use_backend("native"):
        out = OPS[name](**tensors, **options)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.sum(), first, create_graph=True)


@each_op
def test_what_native_refuses_runs_in_the_reference(name):
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
        ({"mem_kv": torch.zeros(2, 3, 8, 1)}, ValueError, "mem_kv must have shape"),
        ({"weight": torch.zeros(19, 16)}, ValueError, "weight must have the 20 channels of x"),
        ({"weight": torch.zeros(20, 15)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
        ({"residual": torch.zeros(2, 20, 3, 4)}, ValueError, "residual must have shape"),
        ({"gain": 3}, TypeError, "gain must be a tensor"),
        ({"bias": torch.zeros(20).int()}, TypeError, "bias must be float32"),
        ({"heads": 0}, ValueError, "heads must be a positive integer"),
    ],
)
def test_bad_input_of_the_block_gets_one_sentence(change, error, sentence):
    tensors, options = make("block", (2, 2, 8, 20, 3, 3, 5))
    with pytest.raises(error, match=sentence):
        linear_attention_block(**(tensors | options | change))


def test_the_operators_themselves_guard_memory():
    ops = torch.ops.ddpm_fast
    for name in OPS:
        tensors, _ = make(name, (2, 2, 8, 20, 3, 3, 5))
        residual = tensors.pop("residual")
        given = list(tensors.values())
        forward = ops.native_linear_attention_block if name == "block" else ops.native_linear_attention
        backward = (
            ops.native_linear_attention_block_backward if name == "block" else ops.native_linear_attention_backward
        )
        out, statistics, sums = forward(*given, residual, 2)
        with pytest.raises(ValueError, match="channels-last"):
            forward(given[0].contiguous(), *given[1:], None, 2)
        with pytest.raises(ValueError, match="mem_kv must have shape"):
            forward(*given, None, 3)
        with pytest.raises(ValueError, match="residual must have shape"):
            forward(*given, residual[:1], 2)
        with pytest.raises(ValueError, match="gain must have 20 elements"):
            forward(*given[:-1], given[-1][:, 1:], None, 2)
        with pytest.raises(TypeError, match="must be float32"):
            forward(*given[:-1], given[-1].double(), None, 2)
        with pytest.raises(ValueError, match="channels"):
            forward(given[0][:, :-1].contiguous(memory_format=CHANNELS_LAST), *given[1:], None, 2)
        with pytest.raises(ValueError, match="statistics must have"):
            backward(out, *given, statistics[1:], sums, 2)
        with pytest.raises(ValueError, match="sums must have"):
            backward(out, *given, statistics, sums[1:], 2)
        with pytest.raises(ValueError, match="grad must have shape"):
            backward(out[1:], *given, statistics, sums, 2)
