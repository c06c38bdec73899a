"""What every accelerated network keeps: hooks, copies, pickles, wrappers, and whatever a user does to a module."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from forks import run_code
from torch import nn
from torch.nn.utils import parametrize

import ddpm_fast
from ddpm_fast.integrations import family
from ddpm_fast.integrations.accelerate import is_accelerated, table
from ddpm_fast.runtime import dispatch
from ddpm_fast.testing.accelerated import assert_same_bits, outputs_and_gradients, randomise_all
from ddpm_fast.testing.foreign_packages import small_diffusers_unet, small_edm_unet, small_openai_unet

upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
with_classes = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
rectified_flow = pytest.importorskip("rectified_flow_pytorch.rectified_flow")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "upstream": lambda: upstream.Unet(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
    "upstream with classes": lambda: with_classes.Unet(8, num_classes=4, dim_mults=(1, 2), cond_drop_prob=0.0),
    "rectified flow": lambda: rectified_flow.Unet(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
    "diffusers": small_diffusers_unet,
    "torchcfm": small_openai_unet,
    "EDM": small_edm_unet,
}
ALL = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_all(NETWORKS[name]())


def network(name: str) -> nn.Module:
    """A fresh one, of the same weights in every call."""
    return copy.deepcopy(made(name))


def arguments(name: str) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 7])
    return {
        "upstream with classes": (x, t, torch.tensor([1, 3])),
        "rectified flow": (x, t / 10),
        "torchcfm": (t / 10, x),
        "EDM": (x, t / 10, None),
    }.get(name, (x, t))


def results(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(model, arguments(name))


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-4) -> None:
    """The same numbers but for rounding: a change that is not made is off by far more."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-2)
        assert ((actual[name] - value).abs().max() / scale) < tolerance, name


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "upstream"])  # which cannot be pickled
def test_pickles(name):
    model = ddpm_fast.accelerate(network(name))
    expected = results(model, name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(a) for a in copied.modules()] == [type(b) for b in model.modules()]
        assert_same_bits(results(copied, name), expected)


@ALL
def test_checkpoints(name):
    model = ddpm_fast.accelerate(network(name))
    plain = network(name)
    randomise_all(plain)
    plain.load_state_dict(model.state_dict())
    assert_same_bits(results(plain, name), results(network(name), name))
    assert_same_bits(results(ddpm_fast.restore(model), name), results(plain, name))


@ALL
def test_accelerating_twice_and_restoring_twice_change_nothing(name):
    model = network(name)
    classes = [type(module) for module in model.modules()]
    ddpm_fast.accelerate(model)
    fast = [type(module) for module in model.modules()]
    assert fast != classes and [type(module) for module in ddpm_fast.accelerate(model).modules()] == fast
    assert all(issubclass(a, b) and a.__name__ == b.__name__ for a, b in zip(fast, classes, strict=True))
    ddpm_fast.restore(model)
    assert [type(module) for module in ddpm_fast.restore(model).modules()] == classes


def changed(x):
    """Smooth, with a bounded slope: at a kink rounding alone would change a gradient."""
    return x + 0.3 * x.sin()


class Wrapper(nn.Module):
    """As LoRA's layers do, it calls the module that it replaces and adds to its output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))


def replace(model, path, module):
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def forward_hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, out: changed(out))


def pre_hook(model, path):
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (changed(args[0].float()), *args[1:]))


def backward_hook(model, path):
    model.get_submodule(path).register_full_backward_hook(
        lambda module, grads, outs: tuple(None if g is None else 1.5 * g for g in grads)
    )


def patched_forward(model, path):
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: changed(forward(*args, **kwargs))


def wrapped(model, path):
    replace(model, path, Wrapper(model.get_submodule(path)))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())


def weight_norm(model, path):
    torch.nn.utils.weight_norm(model.get_submodule(path))
    model.get_submodule(path).weight_g.data *= 1.5


CALLS = (forward_hook, pre_hook, backward_hook, patched_forward, wrapped)
WEIGHTS = (parametrized, weight_norm)


def places(model: nn.Module, weights: bool) -> list[str]:
    """The first module of each kind that is called, below the network; of those with a convolution's weight or not."""
    found: dict[tuple, str] = {}
    for path, module in model.named_modules():
        if not path or isinstance(module, nn.ModuleList) or "xattnres" in path or "attend" in path:
            continue
        has_weight = isinstance(module, (nn.Conv2d, nn.Linear))
        if weights and not has_weight:
            continue
        kernel = tuple(module.weight.shape[2:]) if has_weight else path.rpartition(".")[2]
        found.setdefault((family.path_of(family.own_class(module)), kernel), path)
    return list(found.values())


def called(model: nn.Module, name: str, paths: list[str]) -> set[str]:
    """The modules among them that the network calls with a tensor and that return one, each time."""
    fits: dict[str, list[bool]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: fits[path].append(
                bool(args) and torch.is_tensor(args[0]) and torch.is_tensor(out)
            )
        )
        for path in paths
    ]
    with torch.no_grad():
        model(*arguments(name))
    for handle in handles:
        handle.remove()
    return {path for path in paths if fits[path] and all(fits[path])}


@ALL
def test_changed_modules_do_what_they_do_in_the_eager_network(name):
    """Changes to modules before and after `accelerate`: another one for each kind of module, in turns."""
    eager = network(name)
    # EDM's layers write into their inputs, which torch refuses behind backward hooks; its networks ask for classes.
    calls = [change for change in CALLS if name != "EDM" or change not in (backward_hook, wrapped)]
    paths = places(eager, False)
    fit = called(eager, name, paths)
    cases = [(calls[i % len(calls)], path) for i, path in enumerate(paths) if path in fit]
    cases += [(WEIGHTS[i % len(WEIGHTS)], path) for i, path in enumerate(places(eager, True)[1:5])]
    assert len(cases) > 8
    plain = results(eager, name)["output"]
    for i, (change, path) in enumerate(cases):
        theirs, ours = network(name), network(name)
        change(theirs, path)
        if i % 2:
            ddpm_fast.accelerate(ours)
            change(ours, path)
        else:
            change(ours, path)
            ddpm_fast.accelerate(ours)
        expected = results(theirs, name)
        if change is not backward_hook:
            assert not torch.allclose(expected["output"], plain, rtol=1e-3), f"{change.__name__} of {path} does nothing"
        try:
            assert_equal(results(ours, name), expected)
        except AssertionError as error:
            raise AssertionError(f"{change.__name__} of {path}") from error


@ALL
def test_a_patched_class_computes_by_its_patch(name, monkeypatch):
    model = ddpm_fast.accelerate(network(name))
    for own in {family.own_class(module) for module in model.modules() if is_accelerated(module)} - {nn.Sequential}:
        forward = own.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                own, "forward", lambda self, *args, forward=forward, **kwargs: _last(forward(self, *args, **kwargs))
            )
            assert_equal(results(model, name), results(network(name), name))
            late = ddpm_fast.accelerate(network(name))
            assert not any(is_accelerated(m) for m in late.modules() if family.own_class(m) is own)
            assert_equal(results(late, name), results(network(name), name))


def _last(out):
    return changed(out) if isinstance(out, torch.Tensor) else out


@ALL
def test_hooks_on_every_module_and_the_reference_call_the_own_forwards(name):
    model, eager = ddpm_fast.accelerate(network(name)), network(name)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert_same_bits(results(model, name), results(eager, name))
    finally:
        handle.remove()
    with ddpm_fast.use_backend("reference"):
        assert_same_bits(results(model, name), results(eager, name))
        assert all(line.runs is None for line in table(model))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "EDM"])  # which has a switch of its own
def test_autocast(name):
    def output(model):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return model(*arguments(name))

    def tensor(out):
        return getattr(out, "sample", out).float()

    eager = tensor(output(network(name)))
    truth = tensor(network(name)(*arguments(name))).detach()
    fast = tensor(output(ddpm_fast.accelerate(network(name))))
    assert (fast - truth).pow(2).mean() <= 4 * (eager - truth).pow(2).mean() + 1e-6


@ALL
def test_forward_mode_and_transforms_take_the_own_forward(name):
    model, eager = ddpm_fast.accelerate(network(name)), network(name)
    if name == "diffusers":  # torch's fused attention has no forward mode
        for module in (*model.modules(), *eager.modules()):
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    args = arguments(name)
    place = 1 if name == "torchcfm" else 0

    def call(network):
        def function(x):
            out = network(*args[:place], x, *args[place + 1 :])
            return getattr(out, "sample", out)

        return torch.func.jvp(function, (args[place],), (torch.ones_like(args[place]),))

    for actual, expected in zip(call(model), call(eager), strict=True):
        assert torch.equal(actual, expected)


def test_an_average_of_weights():
    from ema_pytorch import EMA

    model = ddpm_fast.accelerate(network("upstream"))
    average = EMA(model, update_after_step=0, update_every=1)
    average.update()
    assert all(
        is_accelerated(m) is is_accelerated(n)
        for m, n in zip(model.modules(), average.ema_model.modules(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(average(*arguments("upstream")), model(*arguments("upstream")))


@pytest.mark.parametrize("name", ["upstream", "diffusers"])
def test_distributed_data_parallel(name, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = ddpm_fast.accelerate(network(name))
        expected = results(model, name)
        parallel = nn.parallel.DistributedDataParallel(model)
        found = {key.removeprefix("module."): value for key, value in results(parallel, name).items()}
        assert_equal(found, expected, 1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "name",
    [
        "upstream",
        "diffusers",
        "torchcfm",
        "EDM",
        *(pytest.param(name, marks=pytest.mark.release) for name in ("upstream with classes", "rectified flow")),
    ],
)
def test_torch_compile_traces_the_whole_network(name):
    torch._dynamo.reset()
    model = ddpm_fast.accelerate(network(name))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = outputs_and_gradients(model, arguments(name), call=lambda _, *args: compiled(*args))
    assert_equal(found, results(model, name), 1e-5 if name == "upstream" else 1e-4)


def test_classes_are_called_as_before():
    """peft makes a layer of LoRA as type(layer)(...), and a slice of a sequence is one of its class."""
    for name in ("diffusers", "upstream"):
        for module in ddpm_fast.accelerate(network(name)).modules():
            if isinstance(module, nn.Conv2d):
                made = type(module)(3, 4, module.kernel_size, module.stride, module.padding, bias=False)
                assert made(torch.randn(1, 3, 8, 8)).shape[1] == 4
            elif type(module).__name__ == "Sequential":
                x = torch.randn(1, 16, 8, 8)
                if isinstance(module[-1], nn.Conv2d):
                    assert torch.equal(module[:1](x), module[0](x))


def test_save_pretrained(tmp_path):
    model = ddpm_fast.accelerate(network("diffusers"))
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is UNet2DModel
    assert_same_bits(dict(loaded.state_dict()), dict(model.state_dict()))


def test_restoring_a_parametrized_module():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    ddpm_fast.accelerate(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    assert "its class was changed to ParametrizedConv2d" in table(model)[0].reason
    ddpm_fast.restore(model)
    assert not is_accelerated(model[0])
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(model[0]) is nn.Conv2d


def test_restoring_modules_whose_forward_a_wrapper_keeps():
    """As accelerate's and diffusers' offloading hooks keep it."""
    model = ddpm_fast.accelerate(network("diffusers"))
    for module in model.modules():
        module.forward = module.forward
    ddpm_fast.restore(model)
    assert_same_bits(results(model, "diffusers"), results(network("diffusers"), "diffusers"))


# Batch, side of the image and of the kernel → what runs.
STEMS = {(1, 16, 3): None, (2, 12, 3): "stem_conv", (1, 17, 3): "stem_conv", (1, 8, 5): "stem_conv"}


@pytest.mark.parametrize("case", STEMS)
def test_a_rule_about_a_shape(case):
    """A first convolution of few pixels is called as it was, and explain says so."""
    batch, side, kernel = case
    eager, x = nn.Conv2d(3, 8, kernel, padding=kernel // 2), torch.randn(batch, 3, side, side)
    fast = ddpm_fast.accelerate(copy.deepcopy(eager))
    with dispatch.watch_choices() as choices:
        found = fast(x)
    assert [op for op, *_ in choices] == ([] if STEMS[case] is None else ["stem_conv"])
    torch.testing.assert_close(found, eager(x), rtol=1e-4, atol=1e-5)
    assert "stem_conv keeps its own forward where on the CPU it is 3×3, of up to 256 pixels" in ddpm_fast.explain(fast)


def test_float64_and_other_calls_keep_the_own_forward():
    model, eager = ddpm_fast.accelerate(network("upstream")).double(), network("upstream").double()
    x, t = arguments("upstream")
    assert torch.equal(model(x.double(), t.double()), eager(x.double(), t.double()))
    with pytest.raises(AssertionError, match="need to be divisible by 2"):
        ddpm_fast.accelerate(network("upstream"))(torch.randn(2, 3, 7, 7), t)
    conv = ddpm_fast.accelerate(nn.Conv2d(4, 4, 3, padding=1))
    assert conv(torch.randn(4, 6, 6)).shape == (4, 6, 6)


def test_explain_has_a_line_for_each_block():
    model = network("upstream")
    assert "ResnetBlock" not in ddpm_fast.explain(model=model)
    ddpm_fast.accelerate(model)
    model.mid_block1.block1.proj.register_forward_hook(lambda *_: None)
    text = ddpm_fast.explain(model=model)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["downs.0.0"].split()[1:] == ["ResnetBlock", "resnet_block"]
    assert "its own forward: block1.proj: it has hooks" in lines["mid_block1"]
    assert "every block keeps its own forward where no kernel computes in float64" in text


def test_other_objects_are_refused():
    for function in (ddpm_fast.accelerate, ddpm_fast.restore):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a known pipeline, got int"):
            function(3)


def test_no_package_is_imported(tmp_path):
    code = """
import sys, torch, ddpm_fast
model = ddpm_fast.accelerate(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1)))
assert type(model[0]) is not torch.nn.Conv2d
foreign = {"diffusers", "torchcfm", "physicsnemo", "denoising_diffusion_pytorch", "rectified_flow_pytorch", "einops"}
assert not foreign & set(sys.modules), foreign & set(sys.modules)
"""
    run_code(code, tmp_path)


@pytest.mark.parametrize(("name", "path"), [("diffusers", "conv_norm_out"), ("torchcfm", "out.0")])
def test_explain_knows_what_a_network_computes_itself(name, path):
    model = ddpm_fast.accelerate(network(name))
    lines = {line.path: line for line in table(model)}
    assert lines[path].runs == "group_norm_silu"
    inner = model.get_submodule(path)
    inner.register_forward_hook(lambda *_: None)
    lines = {line.path: line for line in table(model)}
    assert lines[path].runs is None and lines[path].reason == "no family knows its class"
