"""A sampling step and a training step never wait for the device or copy from the host, on fake CUDA tensors.

A wait would break a CUDA capture, whichever implementation of an op runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ema_pytorch import EMA
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ddpm_fast import (
    ContinuousTimeGaussianDiffusion,
    ElucidatedDiffusion,
    GaussianDiffusion,
    Guidance,
    RectifiedFlow,
    Unet,
    VParamContinuousTimeGaussianDiffusion,
    noise,
    optim,
    use_backend,
)
from ddpm_fast.diffusion import super_resolution
from ddpm_fast.diffusion.conditions import Conditions
from ddpm_fast.diffusion.inpainting import Resampling
from ddpm_fast.diffusion.sampling import Conditioning, SamplingState
from ddpm_fast.measure import baselines
from ddpm_fast.runtime.recording import EagerRecorder
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep
from ddpm_fast.training.optimizer_step import OptimizerStep
from ddpm_fast.training.trainer import Trainer


def leaves_of(arguments) -> Iterator[object]:
    """What lists, tuples and dicts of arguments hold; torch's tree_leaves takes a third of these tests."""
    for value in arguments:
        if isinstance(value, (list, tuple)):
            yield from leaves_of(value)
        elif isinstance(value, dict):
            yield from leaves_of(value.values())
        else:
            yield value


class Contacts(TorchDispatchMode):
    """Operations that read a number, or that touch tensors of the host (other than numbers) and of the device.

    Sending from pinned memory without waiting is none. `reads_host`: numbers of the host may be read.
    """

    def __init__(self, reads_host: bool = False):
        super().__init__()
        self.found, self.operators = [], 0
        self.reads_host = reads_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        if func is torch.ops.aten._local_scalar_dense.default and not (self.reads_host and is_on_host(args[0])):
            self.found.append(str(func))
            return 1.0
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in leaves_of((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if not is_on_host(t) or t.ndim > 0}
        if len(devices) > 1 and not self._sends_without_waiting(func, args, kwargs or {}):
            self.found.append(str(func))
        return result

    @staticmethod
    def _sends_without_waiting(func, args, kwargs) -> bool:
        if func is torch.ops.aten._to_copy.default:
            return kwargs.get("non_blocking") and is_pinned(args[0])
        if func is torch.ops.aten.copy_.default:
            return args[2:] == (True,) and is_pinned(args[1]) and not is_on_host(args[0])
        return False


class PretendedDevice(TorchFunctionMode):
    """A fake CUDA device beside the real host: tensors on it, and results of operators on them, are fake.

    Autograd's engine needs a real device, so `gradients_of` makes the gradients.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(map(self._is_there, leaves_of((args, kwargs)))):
            with self.fake:
                if func is torch.Tensor.__deepcopy__:  # which would look for a storage
                    return args[0].clone()
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_there(value) -> bool:
        if isinstance(value, (torch.device, str)):
            return str(value).startswith("cuda")
        return isinstance(value, FakeTensor)


def is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "pretends_to_be_pinned", False)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces Tensor.pin_memory, which needs a device."""
    pinned = tensor.clone()
    pinned.pretends_to_be_pinned = True
    return pinned


def gradients_of(model: torch.nn.Module):
    """Replaces Tensor.backward."""

    def backward(loss, *args, **kwargs):
        assert loss.device.type == "cuda"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    return backward


def pretend(diffusion: torch.nn.Module) -> None:
    """Move a module to the fake CUDA device; call it inside a FakeTensorMode."""
    for module in diffusion.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cuda")


def make(dim_mults: tuple[int, ...] = (1, 2), **kwargs) -> GaussianDiffusion:
    model = Unet(8, dim_mults=dim_mults, self_condition=True, **kwargs)
    return GaussianDiffusion(model, image_size=8, timesteps=6, offset_noise_strength=0.1)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_sampling_step(backend):
    diffusion = make()
    plan = diffusion._plan("ddpm", 6)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), use_backend(backend):
        pretend(diffusion)
        x = torch.zeros(2, 3, 8, 8, device="cuda")
        state = SamplingState(diffusion.model, x, 6, num_previous=1, self_condition=True, start_index=0)
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 0)
        assert contacts.found, "tables come from the host once"
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 2)
            state.advance(state.x_start)
        assert contacts.found == [] and contacts.operators > 100


OTHERS = {
    "edm": lambda model: ElucidatedDiffusion(model, image_size=8, num_sample_steps=4),
    "continuous": lambda model: ContinuousTimeGaussianDiffusion(model, image_size=8, num_sample_steps=4),
    "v-continuous": lambda model: VParamContinuousTimeGaussianDiffusion(model, image_size=8, num_sample_steps=4),
    "flow": lambda model: RectifiedFlow(model, image_size=8, num_sample_steps=4),
    "moments": lambda model: GaussianDiffusion(
        model, image_size=8, timesteps=6, beta_schedule="cosine", timestep_sampler="loss-second-moment"
    ),
    "uncertain": lambda model: GaussianDiffusion(model, image_size=8, timesteps=30, uncertainty_weighting=True),
}


@pytest.mark.parametrize("sampler", ["heun", "unipc", "dpmpp_2s_a"])
@pytest.mark.parametrize("process", ["edm", "v-continuous", "flow", "uncertain"])
def test_a_sampling_step_of_every_process(process, sampler):
    diffusion = OTHERS[process](Unet(8, dim_mults=(1, 2)))
    plan = diffusion._plan(sampler, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        pretend(diffusion)
        x = torch.zeros(2, 3, 8, 8, device="cuda")
        options = {"columns": plan.table.shape[1], "num_previous": plan.num_previous, "self_condition": False}
        options["integer_times"] = plan.has_integer_times
        state = SamplingState(diffusion.network, x, len(plan.times), start_index=0, **options)
        state.load(plan, noise.draw_seed(x.device), 0)
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 1)
            state.advance(None)
        assert contacts.found == [] and contacts.operators > 50


GUIDANCES = {
    "scale": Guidance(3.0),
    "interval": Guidance(3.0, interval=(0.5, 5.0)),
    "projection": Guidance(3.0, eta=0.2, norm_threshold=2.0, momentum=-0.5, rescale=0.3),
    "cfg++": Guidance(0.6, cfg_plus_plus=True),
}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_a_guided_sampling_step(process, name, guided):
    diffusion = {**OTHERS, "ddpm": OTHERS["uncertain"]}[process](Unet(8, dim_mults=(1, 2), num_classes=4))
    plan = diffusion._guided_plan(diffusion._plan("ddim", 4), GUIDANCES[name], True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        pretend(diffusion)
        x = torch.zeros(2, 3, 8, 8, device="cuda")
        conditions = Conditions(torch.zeros(2, dtype=torch.int64, device="cuda")).doubled()
        given = Conditioning(
            conditions.arguments(diffusion.network),
            is_doubled=True,
            cond_fn=lambda x, t, y: -x,
            classes=conditions.classes[:2],
        )
        options = {"columns": 25, "num_previous": plan.num_previous, "self_condition": False}
        options |= {"has_update": name == "projection", "reduces": name == "projection", "conditioning": given}
        options["integer_times"] = plan.has_integer_times
        state = SamplingState(diffusion.network, x, len(plan.times), start_index=0, **options)
        state.load(plan, noise.draw_seed(x.device), 0, given)
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 1, given)
            state.advance(None, is_guided=guided)
        assert contacts.found == [] and contacts.operators > 50


@pytest.mark.parametrize("process", OTHERS)
def test_a_conditional_loss_of_every_process(process):
    conditions = {"num_classes": 4, "cond_dim": 3, "cond_channels": 1, "cond_drop_prob": 0.3}
    diffusion = OTHERS[process](Unet(8, dim_mults=(1, 2), **conditions))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(diffusion)
        images = torch.zeros(2, 3, 8, 8, device="cuda", dtype=torch.uint8)
        given = {"classes": torch.zeros(2, device="cuda", dtype=torch.int64), "cond": torch.zeros(2, 3, device="cuda")}
        given |= {"cond_image": torch.zeros(2, 1, 8, 8, device="cuda", dtype=torch.uint8)}
        with Contacts() as contacts:
            loss = diffusion(images, flip=torch.zeros(2, device="cuda", dtype=torch.bool), **given)
        assert loss.device.type == "cuda" and contacts.found == [] and contacts.operators > 100


@pytest.mark.parametrize("process", OTHERS)
def test_a_loss_of_every_process(process):
    diffusion = OTHERS[process](Unet(8, dim_mults=(1, 2), self_condition=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(diffusion)
        images = torch.zeros(2, 3, 8, 8, device="cuda", dtype=torch.uint8)
        flips = torch.zeros(2, device="cuda", dtype=torch.bool)
        for self_conditioned in (False, True):
            with Contacts() as contacts:
                loss = diffusion(images, flip=flips, self_conditioned=self_conditioned)
            assert loss.device.type == "cuda" and contacts.found == [] and contacts.operators > 100


def test_a_loss_of_super_resolution():
    """The level of the condition and its noise are made on the device."""
    network = Unet(8, dim_mults=(1, 2), **super_resolution.unet_arguments(3, num_classes=5))
    diffusion = GaussianDiffusion(network, image_size=8, timesteps=6, super_resolution=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(diffusion)
        images = torch.zeros(2, 3, 8, 8, device="cuda", dtype=torch.uint8)
        told = {"flip": torch.zeros(2, device="cuda", dtype=torch.bool)}
        told["classes"] = torch.zeros(2, device="cuda", dtype=torch.int64)
        with Contacts() as contacts:
            loss = diffusion(images, **told)
        assert loss.device.type == "cuda" and contacts.found == [] and contacts.operators > 100


def test_a_step_of_inpainting():
    diffusion = make()
    plan = diffusion._inpainting_plan(diffusion._plan("ddpm", 6, resampling=Resampling(2, 2)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        pretend(diffusion)
        x = torch.zeros(2, 3, 8, 8, device="cuda")
        given = Conditioning(known=torch.zeros_like(x), mask=torch.zeros(1, 1, 8, 8, device="cuda"))
        options = {"columns": plan.table.shape[1], "num_previous": 1, "self_condition": True, "start_index": 0}
        state = SamplingState(diffusion.model, x, len(plan.times), conditioning=given, **options)
        state.load(plan, noise.draw_seed(x.device), 0, given)
        with Contacts() as contacts:
            state.load(plan, noise.draw_seed(x.device), 2, given)
            state.advance(state.x_start)
        assert contacts.found == [] and contacts.operators > 100


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_training_step_but_for_its_backward(backend, memory):
    """Autograd's engine needs a real device, so `gradients_of` makes the gradients."""
    diffusion = make(dropout=0.1, memory=memory)
    with FakeTensorMode(), use_backend(backend):
        pretend(diffusion)
        optimizer = torch.optim.Adam(diffusion.parameters(), capturable=True)
        options = {"ema": None, "max_grad_norm": 1.0, "autocast": None, "any_module": False}
        step = TrainingStep(diffusion, optimizer, (2, 3, 8, 8), recorder=FrozenRecorder, **options)
        step._hold_rates()
        kind = (torch.float32, False, ())
        step._take_in(kind, torch.zeros(2, 3, 8, 8, device="cuda"), None)
        with Contacts() as contacts, mock.patch.object(torch.Tensor, "backward", gradients_of(diffusion)):
            step._whole_step(kind, True)
    assert contacts.found == [] and contacts.operators > 300


@pytest.fixture(autouse=True)
def torchs_adam(monkeypatch):
    """Fake tensors have no address, which is what the kernels of `adam_step` are given."""
    monkeypatch.setattr(OptimizerStep, "why_not", lambda step, *gradients: "tensors are fake")


@pytest.fixture
def cuda(monkeypatch):
    """The fake CUDA device, also for accelerate, whose state about devices lasts for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where: module)  # all is there: see `pretend`
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with PretendedDevice():
        yield torch.device("cuda")
    AcceleratorState._reset_state(reset_partial_state=True)


class Images(torch.utils.data.Dataset):
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __len__(self):
        return 200

    def __getitem__(self, index):
        value = index if self.dtype == torch.uint8 else index / 200
        return torch.full((3, 8, 8), value, dtype=self.dtype)


@pytest.mark.parametrize(
    "precision, dtype, is_recorded",
    [
        ("no", torch.float32, False),
        pytest.param("no", torch.uint8, True, marks=pytest.mark.release),
        pytest.param("fp16", torch.uint8, False, marks=pytest.mark.release),
        ("fp16", torch.uint8, True),
        ("bf16", torch.uint8, False),
        pytest.param("bf16", torch.float32, True, marks=pytest.mark.release),
    ],
)
def test_a_step_of_the_trainer(cuda, precision, dtype, is_recorded, tmp_path, monkeypatch):
    """Images and flips to the device, loss, clipping, optimizer, scaler and average: all but reading the loss."""
    monkeypatch.setattr(Trainer, "_recorder", FrozenRecorder)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    diffusion = make((1,), dropout=0.1)  # one stage: what the network runs is tested above
    pretend(diffusion)
    monkeypatch.setattr(torch.Tensor, "backward", gradients_of(diffusion))
    options = {"train_batch_size": 16, "gradient_accumulate_every": 2, "num_workers": 0, "calculate_fid": False}
    trainer = Trainer(
        diffusion, Images(dtype), results_folder=tmp_path, amp=precision != "no", mixed_precision_type=precision,
        ema_update_every=2, progress=False, graph=None if is_recorded else False, **options,
    )  # fmt: skip
    # Fused Adam with its rate on the device cannot run on fake tensors.
    monkeypatch.setattr(TrainingStep, "_hold_rates", lambda step: None)
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    trainer.accelerator.state.device = trainer.device  # autocast's
    assert trainer.dl._loader.pin_memory
    # What the loader does where there is a device.
    trainer.dl._batches = map(partial(tree_map, pin), trainer.dl._loader)
    with Contacts(reads_host=True) as contacts:
        for _ in range(4):  # the average begins, rests and moves
            trainer._train_step()
        assert trainer.dl.next_batch().images.dtype == dtype
        assert contacts.found == [] and contacts.operators > 1000
        trainer._read_losses()
        assert contacts.found, "the losses are read"
    assert (trainer._captured is not None) == is_recorded
    assert all(p.device.type == "cuda" for p in trainer.model.parameters()) and int(trainer.ema.step) == 4


def test_the_benchmarks_adam_is_the_trainers(cuda):
    """The baseline of upstream keeps torch's default Adam, as its users do."""
    diffusion = make()
    pretend(diffusion)
    optimizer, label = baselines._fused_adam(diffusion, cuda)
    assert type(optimizer) is optim.Adam and optimizer.defaults["fused"] is True
    assert label == "ddpm_fast.optim.Adam(fused=True)"
    assert baselines._adam(diffusion, cuda)[0].defaults["fused"] is None


@pytest.mark.release(but=lambda recorder, is_pinned: (recorder is FrozenRecorder) == is_pinned)
@pytest.mark.parametrize("recorder", [FrozenRecorder, EagerRecorder])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_captured_step_with_its_images_and_its_average(cuda, recorder, is_pinned, monkeypatch):
    diffusion = make((1,), dropout=0.1)  # one stage: what the network runs is tested above
    pretend(diffusion)
    monkeypatch.setattr(torch.Tensor, "backward", gradients_of(diffusion))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    # Fused Adam with its rate on the device cannot run on fake tensors.
    is_fused = recorder is EagerRecorder
    optimizer = torch.optim.Adam(diffusion.parameters(), capturable=True, fused=is_fused, foreach=not is_fused)
    ema = EMA(diffusion, update_every=2, use_foreach=True)
    options = {"ema": ema, "max_grad_norm": 1.0, "autocast": torch.bfloat16, "any_module": False}
    step = TrainingStep(diffusion, optimizer, (2, 3, 8, 8), recorder=recorder, **options)
    for index in range(6):  # both sides of the coin, both kinds of update
        images = torch.rand(2, 3, 8, 8)
        with Contacts(reads_host=True) as contacts:
            step(pin(images) if is_pinned else images)
        assert contacts.found == [] and contacts.operators > 100, index


def test_noise_and_seeds_of_numbers():
    with FakeTensorMode(), Contacts() as contacts:
        noise.seed_tensor(2**64 - 1, "cuda")
        noise.normal((2, 3), seed=3, step=4, stream=noise.STREAM_STEP, device="cuda")
    assert contacts.found == []


def test_the_check_sees_contacts():
    with FakeTensorMode(), Contacts() as contacts:
        torch.zeros(3).to("cuda")
        torch.tensor([1, 2], device="cuda")
    assert len(contacts.found) == 2


def test_the_check_sees_waiting_copies_and_readings(cuda):
    host, device = torch.zeros(3), torch.zeros(3, device=cuda)
    with Contacts(reads_host=True) as contacts:
        pin(host).to(cuda, non_blocking=True)
        device.copy_(pin(host), non_blocking=True)
        assert host.sum().item() == 0
    assert contacts.found == []
    waits = [
        lambda: host.to(cuda, non_blocking=True),
        lambda: pin(host).to(cuda),
        lambda: device.copy_(host, non_blocking=True),
        lambda: device.copy_(pin(host)),
        lambda: device.cpu(),
        lambda: pin(host).copy_(device, non_blocking=True),
        lambda: device.sum().item(),
        lambda: bool(device.sum() > 0),
    ]
    for number, wait in enumerate(waits):
        with Contacts(reads_host=True) as contacts:
            wait()
        assert len(contacts.found) == 1, number
