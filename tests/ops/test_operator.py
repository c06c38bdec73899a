"""`Operator`: a call that nothing watches skips torch's dispatcher; all others see the registered operator."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ddpm_fast.ops.operator import Operator
from ddpm_fast.testing.operator_names import OperatorNames

NAME = "scaled_for_tests"
LAUNCHES: list[str] = []


def launch(x, weight, bias, residual, power):
    """out = x·weight^power + bias + residual, one weight and one bias per column."""
    LAUNCHES.append("forward")
    out = x * weight.to(x.dtype) ** power
    for term in (bias, residual):
        out = out if term is None else out + term.to(x.dtype)
    return out, weight.float() ** power


def launch_backward(grad, x, powers, weight, bias, power):
    """Gradients in float32, as kernels make them: `Operator` restores dtypes and shapes."""
    LAUNCHES.append("backward")
    dweight = (grad.double() * x.double() * power * weight.double() ** (power - 1)).sum(0)
    dbias = None if bias is None else grad.double().sum(0)
    return grad * powers.to(grad.dtype), dweight.reshape(-1), dbias


kernels = types.ModuleType("kernels_for_tests")
setattr(kernels, NAME, launch)
setattr(kernels, f"{NAME}_backward", launch_backward)
sys.modules[kernels.__name__] = kernels

scaled = Operator(
    NAME,
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float power",
    returns="out, powers",
    fake=lambda x, weight, **_: (torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)),
    backward="grad, x, powers, weight, bias, power",
    gradients="x, weight, bias",
    passes="residual",
    triton=kernels.__name__,
).triton


@pytest.fixture(autouse=True)
def _no_launches():
    LAUNCHES.clear()


def arguments(dtype=torch.float32, bias=True, residual=True):
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 3, generator=generator, dtype=dtype), torch.rand(3, generator=generator) + 0.5
    leaves = [x, weight, torch.randn(3) if bias else None, torch.randn(5, 3).bfloat16() if residual else None]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves] + [2.0]


def expected(values):
    x, weight, bias, residual, power = values
    return launch(x, weight, bias, residual, power)[0]


def gradients_of(function, values):
    leaves = [value for value in values if isinstance(value, torch.Tensor)]
    out = function(values)
    return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype))]


def is_direct(out: torch.Tensor) -> bool:
    """Whether the result comes from our autograd function, and not from the one that torch.library makes."""
    return type(out.grad_fn).__name__ == f"{NAME}Backward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias, residual", [(True, True), (False, True), (True, False), (False, False)])
def test_a_call_goes_straight_to_the_launches(dtype, bias, residual):
    values = arguments(dtype, bias, residual)
    out, powers = scaled(*values)
    assert is_direct(out) and not powers.requires_grad
    with OperatorNames() as names:
        watched, _ = scaled(*values)
    assert names.seen == [NAME] and not is_direct(watched)
    assert LAUNCHES == ["forward"] * 2
    results = [gradients_of(lambda values: scaled(*values)[0], values), gradients_of(expected, values)]
    for value, actual, other in zip([out, *(v for v in values if isinstance(v, torch.Tensor))], *results, strict=True):
        assert actual.dtype == value.dtype and actual.shape == value.shape
        torch.testing.assert_close(actual, other, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_the_same_bits_watched_or_not():
    values = arguments()
    direct = gradients_of(lambda values: scaled(*values)[0], values)
    with OperatorNames() as names:
        watched = gradients_of(lambda values: scaled(*values)[0], values)
    assert names.seen == [NAME, f"{NAME}_backward"]
    for a, b in zip(direct, watched, strict=True):
        assert torch.equal(a, b)


def test_a_mode_sees_the_backward_of_a_call_before_it():
    values = arguments()
    out, _ = scaled(*values)
    with OperatorNames() as names:
        out.sum().backward()
    assert is_direct(out) and names.seen == [f"{NAME}_backward"]


def test_only_wanted_gradients():
    x, weight, *others = arguments()
    out, _ = scaled(x, weight.detach(), None, None, 2.0)
    out.sum().backward()
    assert torch.equal(x.grad, (weight.detach() ** 2).expand(5, 3))
    residual = others[1]
    scaled(x.detach(), weight.detach(), None, residual, 2.0)[0].sum().backward()
    assert residual.grad.dtype == torch.bfloat16 and LAUNCHES == ["forward", "backward", "forward"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_graph(context):
    values = arguments()
    with context():
        out, _ = scaled(*values)
    assert out.grad_fn is None and torch.equal(out, expected(values))
    assert (
        scaled(*(value.detach() if isinstance(value, torch.Tensor) else value for value in values))[0].grad_fn is None
    )


def test_second_derivatives_are_refused():
    x, *others = arguments()
    out, _ = scaled(x, *others)
    with pytest.raises(RuntimeError, match=f"{NAME}: the Triton kernel's gradient cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


def test_gradcheck():
    x, weight = (value.detach().double().requires_grad_() for value in arguments()[:2])
    assert torch.autograd.gradcheck(lambda x, weight: scaled(x, weight, None, None, 1.0)[0], (x, weight))


def test_saved_tensor_hooks_and_checkpoint():
    values, packed = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out, powers = scaled(*values)
    assert is_direct(out) and [t.shape for t in packed] == [(5, 3), (3,), (3,), (3,)]
    plain = gradients_of(lambda values: scaled(*values)[0], values)
    LAUNCHES.clear()
    again = gradients_of(lambda values: checkpoint(lambda *v: scaled(*v)[0], *values, use_reentrant=False), values)
    assert LAUNCHES == ["forward", "forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_function_modes_and_subclasses_see_the_operator():
    x, weight, *_ = arguments()
    with Seen() as seen:
        scaled(x, weight, None, None, 2.0)
    assert any(NAME in name for name in seen.functions)
    out, _ = scaled(x.detach().as_subclass(Subclass), weight, None, None, 2.0)
    assert isinstance(out, Subclass)
    out, _ = scaled(x, torch.nn.Parameter(weight.detach()), None, None, 2.0)
    assert is_direct(out)


def test_tensors_that_the_dispatcher_resolves():
    """A lazy negation is carried out, and meta tensors launch nothing."""
    x, weight, *_ = arguments()
    negative = torch._neg_view(x.detach())
    assert torch.equal(scaled(negative, weight.detach(), None, None, 2.0)[0], -x * weight**2)
    LAUNCHES.clear()
    out, _ = scaled(x.to("meta"), weight.to("meta"), None, None, 2.0)
    assert out.is_meta and not LAUNCHES
    with FakeTensorMode() as mode:
        out, _ = scaled(mode.from_tensor(x), mode.from_tensor(weight), None, None, 2.0)
    assert isinstance(out, FakeTensor) and not LAUNCHES


def test_one_argument_on_meta_is_refused():
    """torch takes the fake for it, whose result on the CPU would be memory that nobody has written."""
    x, weight, *rest = arguments()
    with pytest.raises(ValueError, match="weight must be on the device of x, cpu, got meta"):
        scaled(x, weight.to("meta"), *rest)
    out, _ = scaled(x, weight, *rest)
    with pytest.raises(ValueError, match="weight must be on the device of grad, cpu, got meta"):
        getattr(torch.ops.ddpm_fast, f"{NAME}_backward")(out, x, weight, weight.to("meta"), None, 2.0)


def test_traces_have_the_operator():
    x, weight, *_ = (value.detach() if isinstance(value, torch.Tensor) else value for value in arguments())

    def function(x, weight):
        return scaled(x, weight, None, None, 2.0)[0]

    graph = make_fx(function)(x, weight)
    assert [node.target for node in graph.graph.nodes if "ddpm_fast" in str(node.target)]
    traced = torch.jit.trace(function, (x, weight))
    assert f"ddpm_fast::{NAME}" in str(traced.graph) and torch.equal(traced(x, weight), function(x, weight))


def test_transforms_of_torch_func():
    """vmap runs the operator; torch.func.grad has never been possible with operators of torch.library, and says so."""
    x, weight, *_ = (value.detach() if isinstance(value, torch.Tensor) else value for value in arguments())
    rows = torch.func.vmap(lambda row: scaled(row[None], weight, None, None, 2.0)[0][0])(x)
    torch.testing.assert_close(rows, x * weight**2)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(lambda x: scaled(x, weight, None, None, 2.0)[0].sum())(x)


def test_compiled_it_is_one_graph():
    values = arguments()

    def function(values):
        return scaled(*values)[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients_of(function, values), gradients_of(compiled, values), strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    torch.library.opcheck(getattr(torch.ops.ddpm_fast, NAME).default, tuple(arguments()))
