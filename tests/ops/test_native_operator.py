"""A native operator's direct call and gradients, which run in C++: the same as the registered operator's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ddpm_fast import use_backend
from ddpm_fast.ops import group_norm_silu, rms_norm_silu
from ddpm_fast.ops.norm_silu import op as norm_silu_op
from ddpm_fast.ops.norm_silu.operators import norm_silu
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.operator_names import OperatorNames

CPU = torch.device("cpu")
NORM = ("x", "gain", "offset", "bias", "scale", "shift", "residual")


@pytest.fixture(autouse=True)
def _native():
    if extension.load() is None:
        pytest.skip(extension.reason())


def is_direct(out: torch.Tensor) -> bool:
    """Whether autograd of the result is that of csrc/python/native_operator.cpp."""
    return "NativeGradient" in out.grad_fn.name()


def norm_arguments(dtype=torch.float32, dropout_p=0.0):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 8, 5, 3), (8,), (8,), (8,), (2, 8), (2, 8), (2, 8, 5, 3))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.tensor(5) if dropout_p else None, 2, 1e-5, True, dropout_p]


def gradients_of(function, values):
    leaves = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
    out = function(values)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad, allow_unused=True)]


def same(results, others) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(results, others, strict=True))


def of_norm(values):
    return norm_silu.native(*values)[0]


# The ops whose native gradients run in C++: all but those made of torch's operators or of several tensors.
DIFFERENTIABLE = (
    "attention", "attention_block", "conv3x3", "diffusion_loss", "group_norm_attention_block", "group_norm_silu",
    "linear", "linear_attention", "linear_attention_block", "linear_residual", "norm_linear", "preactivation_block",
    "resnet_block", "rms_norm_silu", "upsample_conv", "variational_bound",
)  # fmt: skip


def fill(value, generator):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    return torch.randn(value.shape, generator=generator).to(value.dtype).as_strided(value.shape, value.stride())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_same_bits_watched_or_not(name):
    """Every op with its example's arguments: the output, all gradients, and each gradient alone."""
    op, generator = dispatch.ops()[name], torch.Generator().manual_seed(7)
    native = next(i for i in op.implementations if i.name == "native")
    args, kwargs = op.examples[name](CPU)
    args = [fill(value, generator) for value in args]
    kwargs = {key: fill(value, generator) for key, value in kwargs.items()}
    assert native.refuses(*args, **kwargs) is None
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    floating = [value for value in given if value.is_floating_point()]

    def results(leaves, direct):
        for value in floating:
            value.requires_grad_(any(value is leaf for leaf in leaves))
        out = native.function(*args, **kwargs)
        if out.grad_fn is None:
            return [out]  # a gradient that the native kernel does not give
        assert is_direct(out) == direct
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) / 3, allow_unused=True)]

    assert len(results(floating, True)) > 1
    for leaves in [[], floating, *([leaf] for leaf in floating)]:
        direct = results(leaves, True)
        with OperatorNames():
            watched = results(leaves, False)
        assert same(direct, watched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_call_runs_no_python(dtype, dropout_p):
    values = norm_arguments(dtype, dropout_p)
    out, statistics = norm_silu.native(*values)
    assert is_direct(out) and not statistics.requires_grad
    with OperatorNames() as names:
        watched = of_norm(values)
    assert names.seen == ["native_norm_silu"] and not is_direct(watched)
    assert same(gradients_of(of_norm, values), gradients_of(lambda values: watched, values))


def test_a_mode_sees_the_backward_of_a_call_before_it():
    out = of_norm(norm_arguments())
    with OperatorNames() as names:
        out.sum().backward()
    assert is_direct(out) and names.seen == ["native_norm_silu_backward"]


def test_a_residual_alone_takes_no_backward_operator():
    """Its gradient is the output's, in its own dtype."""
    values = [value.detach() if isinstance(value, torch.Tensor) else value for value in norm_arguments()]
    values[6] = residual = values[6].bfloat16().requires_grad_()
    out = of_norm(values)
    with OperatorNames() as names:
        out.sum().backward()
    assert is_direct(out) and names.seen == []
    assert residual.grad.dtype == torch.bfloat16 and torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_graph(context):
    values = norm_arguments()
    with context():
        out = of_norm(values)
    assert out.grad_fn is None and torch.equal(out, of_norm(values))
    assert of_norm([value.detach() if isinstance(value, torch.Tensor) else value for value in values]).grad_fn is None


def test_second_derivatives_are_refused():
    x, *others = norm_arguments()
    with pytest.raises(RuntimeError, match="norm_silu: the native kernel's gradient cannot be differentiated again"):
        torch.autograd.grad(of_norm([x, *others]).square().sum(), x, create_graph=True)


def test_a_graph_runs_twice_only_if_it_is_kept():
    values = norm_arguments()
    out = of_norm(values).sum()
    first = torch.autograd.grad(out, values[:7], retain_graph=True)
    assert same(first, torch.autograd.grad(out, values[:7]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, values[:7])


def test_a_graph_frees_what_it_keeps():
    values = norm_arguments()
    kept = values[0] * 1
    seen = weakref.ref(kept)
    out = of_norm([kept, *values[1:]]).sum()
    del kept
    gc.collect()
    assert seen() is not None
    out.backward()
    gc.collect()
    assert seen() is None


def test_a_tensor_changed_after_the_call_is_refused():
    values = norm_arguments()
    x = values[0] * 1
    out = of_norm([x, *values[1:]])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensor_hooks_and_checkpoint():
    values, packed = norm_arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = of_norm(values)
    assert is_direct(out) and len(packed) == 7
    plain = gradients_of(of_norm, values)
    assert same(plain, gradients_of(lambda v: checkpoint(lambda *v: of_norm(v), *v, use_reentrant=False), values))


def test_compiled_autograd():
    values = norm_arguments()
    expected = gradients_of(of_norm, values)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        assert same(expected, gradients_of(of_norm, values))


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def call(x, gain, offset, **options):
    return group_norm_silu(x, gain, offset, groups=2, **options)


def test_what_watches_operators_sees_the_operator():
    x, gain, offset = (value.detach() for value in norm_arguments()[:3])
    expected = call(x, gain, offset)
    with Seen() as seen:
        call(x, gain, offset)
    assert any("native_norm_silu" in name for name in seen.functions)
    with OperatorNames() as names:
        call(x, gain, offset)
    assert names.seen == ["native_norm_silu"]
    assert isinstance(call(x.as_subclass(Subclass), gain, offset), Subclass)
    assert torch.equal(call(torch._neg_view(-x), gain, offset), expected)
    assert torch.equal(call(x, torch.nn.Parameter(gain), offset), expected)
    with FakeTensorMode() as mode:
        assert isinstance(call(*(mode.from_tensor(value) for value in (x, gain, offset))), FakeTensor)
    graph = make_fx(lambda *tensors: call(*tensors))(x, gain, offset)
    assert [node.target for node in graph.graph.nodes if "native_norm_silu" in str(node.target)]
    traced = torch.jit.trace(call, (x, gain, offset))
    assert "ddpm_fast::native_norm_silu" in str(traced.graph) and torch.equal(traced(x, gain, offset), expected)
    rest = (None, None, None, None, None, 2, 1e-5, True, 0.0)
    rows = torch.func.vmap(lambda row: norm_silu.native(row[None], gain, offset, *rest)[0][0])(x)
    assert torch.equal(rows, expected)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(lambda x: norm_silu.native(x, gain, offset, *rest)[0].sum())(x)


def test_compiled_it_is_one_graph():
    values = norm_arguments()[:3]
    compiled = torch.compile(lambda values: call(*values), backend="aot_eager", fullgraph=True)
    assert same(gradients_of(lambda values: call(*values), values), gradients_of(compiled, values))


@pytest.fixture
def fitted(monkeypatch):
    """The ops whose checks and choice in Python are skipped, in the order of calls."""
    seen = []
    check = norm_silu_op._check
    monkeypatch.setattr(norm_silu_op, "_check", lambda *args, **kwargs: seen.append("python") or check(*args, **kwargs))
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_call_that_fits_asks_python_nothing(fitted, layout):
    x, gain, offset, bias, scale, shift, residual = (value.detach() for value in norm_arguments()[:7])
    x = x.contiguous(memory_format=layout)
    options = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    out = call(x, gain, offset, **options)
    rms = rms_norm_silu(x, gain.view(1, 8, 1, 1), activation=False)
    assert fitted == [] and out.stride() == rms.stride() == x.stride()
    with use_backend("native"):
        assert torch.equal(out, call(x, gain, offset, **options))
        assert torch.equal(rms, rms_norm_silu(x, gain.view(1, 8, 1, 1), activation=False))
    assert fitted == ["python"] * 2


def test_python_takes_every_other_call(fitted):
    """Each of them is a call that another implementation runs, that something counts, or that is an error."""
    x, gain, offset, bias, scale = (value.detach() for value in norm_arguments()[:5])
    call(x.double(), gain.double(), offset.double())
    call(x.transpose(2, 3), gain, offset)
    call(x[:0], gain, offset)
    call(x, gain, offset, bias=scale)
    call(x, gain, offset, dropout_p=0.5, seed=torch.tensor(1))
    call(x.to("meta"), gain.to("meta"), offset.to("meta"))
    with dispatch.watch_choices() as choices:
        call(x, gain, offset)
    assert [key[:2] for key in choices] == [("group_norm_silu", "native")]
    with use_backend("reference"):
        call(x, gain, offset)
    torch.func.jvp(lambda x: call(x, gain, offset), (x,), (x,))
    assert fitted == ["python"] * 9
    for wrong in ({"bias": bias[:3]}, {"scale": bias}, {"residual": x[:1]}, {"seed": torch.tensor(1.0)}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))} must "):
            call(x, gain, offset, **wrong)
    with pytest.raises(TypeError, match="^x must be a tensor, got list"):
        call([x], gain, offset)
    with pytest.raises(TypeError, match="^offset must be a tensor, got NoneType"):
        call(x, gain, None)
    for groups in (0, 3, -2):
        with pytest.raises(ValueError, match=f"^groups must divide the 8 channels of x, got {groups}$"):
            group_norm_silu(x, gain, offset, groups=groups)
