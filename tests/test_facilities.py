"""The network and the diffusion with torch's features: narrow types, layouts, compile, export, copies, DDP."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.diffusion import schedules
from ddpm_fast.testing.truth import assert_close_to_truth, errors

NARROW = [torch.float16, torch.bfloat16]


def make(objective: str = "pred_v", **unet) -> GaussianDiffusion:
    torch.manual_seed(0)
    model = Unet(8, **{"dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4, **unet})
    return GaussianDiffusion(model, image_size=8, timesteps=6, objective=objective)


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(diffusion, x, **kwargs):
    """On fixed times and noise."""
    diffusion.zero_grad()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    loss = diffusion(x, times=torch.tensor([1, 4]), noise=eps.to(x), **kwargs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in diffusion.parameters()])


def schedule_of(diffusion) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in diffusion.named_buffers() if not name.startswith("model.")}


@pytest.mark.parametrize("dtype", NARROW)
def test_the_schedule_stays_float32_in_half_a_network(dtype):
    diffusion = make()
    before = {name: buffer.clone() for name, buffer in schedule_of(diffusion).items()}
    conversions = (
        lambda d: d.to(dtype),
        lambda d: d.half() if dtype == torch.float16 else d.bfloat16(),
        lambda d: d.to("cpu", dtype).to(torch.float32).to(dtype),
        lambda d: copy.deepcopy(d.to(dtype)),
    )
    for convert in conversions:
        narrow = convert(copy.deepcopy(diffusion))
        assert {p.dtype for p in narrow.parameters()} == {dtype}
        after = schedule_of(narrow)
        assert list(after) == list(before)
        assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)
        narrow.load_state_dict(diffusion.state_dict())
        assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert schedule_of(copy.deepcopy(diffusion).double())["betas"].dtype == torch.float64
    moved = copy.deepcopy(diffusion).to("meta", dtype)
    assert {(b.device.type, b.dtype) for b in schedule_of(moved).values()} == {("meta", torch.float32)}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_narrow_networks_train_and_sample(dtype, self_condition, objective):
    wide = make(objective, self_condition=self_condition)
    narrow = copy.deepcopy(wide).to(dtype)
    chosen = {"self_conditioned": self_condition}
    eps = 40 * torch.finfo(dtype).eps
    loss, gradients = loss_and_gradients(wide, images(), **chosen)
    for x in (images(), images().to(dtype)):
        narrow_loss, narrow_gradients = loss_and_gradients(narrow, x, **chosen)
        assert narrow_loss.dtype == torch.float32 and narrow_gradients.dtype == dtype
        assert narrow_loss.item() == pytest.approx(loss.item(), rel=eps)
        assert errors(narrow_gradients, gradients)[0] < eps * gradients.pow(2).mean().sqrt()
    samples = narrow.sample(2, seed=1, progress=False)
    assert samples.dtype == torch.float32
    assert (samples - wide.sample(2, seed=1, progress=False)).abs().mean() < eps
    step = narrow.p_sample(torch.randn(2, 3, 8, 8), 3, seed=1)
    assert step[0].dtype == step[1].dtype == torch.float32
    assert torch.isfinite(narrow(images()))


@pytest.mark.parametrize("self_conditioned", [False, True])
def test_autocast_trains_every_weight(self_conditioned):
    """Also those that a first pass without gradients has cast already."""
    diffusion = make(self_condition=True)
    loss, gradients = loss_and_gradients(diffusion, images(), self_conditioned=self_conditioned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_loss, low_gradients = loss_and_gradients(diffusion, images(), self_conditioned=self_conditioned)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in diffusion.parameters())
    assert low_loss.dtype == torch.float32 and low_loss.item() == pytest.approx(loss.item(), rel=0.05)
    assert errors(low_gradients, gradients)[0] < 0.2 * gradients.pow(2).mean().sqrt()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_either_memory_layout_of_inputs_and_weights(memory):
    diffusion = make(memory=memory)
    truth = loss_and_gradients(copy.deepcopy(diffusion).double(), images().double())
    expected = loss_and_gradients(diffusion, images())
    other = copy.deepcopy(diffusion).to(memory_format=torch.channels_last)
    for model in (diffusion, other):
        for x in (images(), images().contiguous(memory_format=torch.channels_last)):
            for name, a, e, t in zip(("loss", "gradients"), loss_and_gradients(model, x), expected, truth, strict=True):
                assert_close_to_truth(a, e, t, name=name)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    with torch.no_grad():
        outputs = [
            model(x.contiguous(memory_format=layout), t)
            for model in (diffusion.model, other.model)
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
        truth = copy.deepcopy(diffusion.model).double()(x.double(), t)
    for output in outputs:
        assert_close_to_truth(output, outputs[0], truth, name="output")
    assert other.state_dict().keys() == diffusion.state_dict().keys()
    diffusion.load_state_dict(other.state_dict())


def test_a_whole_loss_and_its_backward_compile():
    """With self-conditioning's first pass; diffusion/test_upstream.py compiles the loss without it."""
    diffusion = make(self_condition=True, dim_mults=(1,))
    kwargs = {"self_conditioned": True}
    expected = loss_and_gradients(diffusion, images(), **kwargs)
    truth = loss_and_gradients(copy.deepcopy(diffusion).double(), images().double(), **kwargs)
    compiled = torch.compile(diffusion, backend="aot_eager", fullgraph=True)
    for name, a, e, t in zip(
        ("loss", "gradients"), loss_and_gradients(compiled, images(), **kwargs), expected, truth, strict=True
    ):
        assert_close_to_truth(a, e, t, name=name)


def test_the_network_compiles_in_autocast():
    model = make(dim_mults=(1,)).model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(x, t), model(x, t), rtol=0.05, atol=0.05)


def test_a_compiled_network_samples():
    diffusion = make(dim_mults=(1,))
    expected = diffusion.sample(1, seed=1, progress=False)
    diffusion.model = torch.compile(diffusion.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(diffusion.sample(1, seed=1, progress=False), expected, rtol=1e-4, atol=1e-4)


def test_the_network_exports_for_any_batch_size():
    model = make(self_condition=True).model.eval()

    def arguments(batch):
        return torch.randn(batch, 3, 8, 8), torch.arange(batch), torch.randn(batch, 3, 8, 8)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "time": {0: batch}, "x_self_cond": {0: batch}}
    with torch.no_grad():
        program = torch.export.export(model, arguments(2), dynamic_shapes=shapes)
        for size in (2, 5):
            given = arguments(size)
            torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_are_equal_and_independent(copied):
    diffusion = make(self_condition=True, dropout=0.1)
    diffusion.sample(1, seed=1, progress=False)
    loss_and_gradients(diffusion, images())
    other = copied(diffusion.eval())
    assert torch.equal(other.sample(2, seed=1, progress=False), diffusion.sample(2, seed=1, progress=False))
    assert other.config == diffusion.config and other.model.config == diffusion.model.config
    before = diffusion.sample(1, seed=1, progress=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert torch.equal(diffusion.sample(1, seed=1, progress=False), before)
    assert not torch.equal(other.sample(1, seed=1, progress=False), before)
    model = copied(diffusion.model)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([2])
    assert torch.equal(model(x, t), diffusion.model(x, t))


def test_distributed_data_parallel(tmp_path):
    """One process here; test_trainer.py trains with two."""
    diffusion = make()
    loss, gradients = loss_and_gradients(diffusion, images())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    parallel = DistributedDataParallel(diffusion)
    parallel_loss, parallel_gradients = loss_and_gradients(parallel, images())
    distributed.destroy_process_group()
    assert torch.equal(parallel_loss, loss) and torch.equal(parallel_gradients, gradients)
