"""CUDA graphs on a CUDA device: the bits of the step-by-step loop, no waiting, weights and settings of now."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ema_pytorch import EMA

from ddpm_fast import GaussianDiffusion, Unet, capture_training_step
from ddpm_fast.runtime import measured, recording
from ddpm_fast.testing.recorders import bytes_in_pools

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SAMPLERS = {
    "ddpm": dict(),
    "ddim": dict(sampling_timesteps=5, ddim_sampling_eta=0.5),
    "dpmpp_2m": dict(sampling_timesteps=5, sampler="dpmpp_2m"),
}


@pytest.fixture(autouse=True)
def _the_same_kernels_in_every_run():
    """cuDNN may otherwise choose again, or sum in another order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before
    torch.cuda.set_sync_debug_mode("default")


def make(unet: dict | None = None, **kwargs) -> GaussianDiffusion:
    torch.manual_seed(0)
    model = Unet(16, dim_mults=(1, 2), **(unet or {}))
    return GaussianDiffusion(model, image_size=16, timesteps=12, **kwargs).cuda()


def both(diffusion, batch: int = 4, **kwargs) -> torch.Tensor:
    """Samples, after checking that replayed and step by step they are the same bits."""
    kwargs = {"seed": 3, "progress": False, **kwargs}
    replayed = diffusion.sample(batch, graph=True, **kwargs)
    stepped = diffusion.sample(batch, graph=False, **kwargs)
    assert torch.isfinite(replayed).all() and torch.equal(replayed, stepped)
    return replayed


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_replays_equal_steps(sampler, self_condition, autocast):
    diffusion = make(dict(self_condition=self_condition), **SAMPLERS[sampler])
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        first = both(diffusion)
        assert not torch.equal(both(diffusion, seed=4), first)
        assert torch.equal(both(diffusion), first)
        states = both(diffusion, return_all_timesteps=True)
        assert torch.equal(states[:, -1], first)
        both(diffusion, batch=3, start_index=2)
        assert torch.equal(both(diffusion, progress=True), first)
        assert len(diffusion.graphs) == 2
    torch.cuda.empty_cache()  # also frees the memory of autocast's casts
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        assert torch.equal(diffusion.sample(4, seed=3, progress=False), first) and len(diffusion.graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_networks(dtype):
    both(make(dict(self_condition=True)).to(dtype))


def test_sample_records_by_default():
    diffusion = make()
    assert diffusion.explain_graphs() == "sampling replays a CUDA graph; 0 are kept, 4 at most"
    diffusion.sample(2, progress=False)
    assert len(diffusion.graphs) == 1


@pytest.mark.parametrize("return_all_timesteps", [False, True])
def test_sampling_waits_for_nothing(return_all_timesteps):
    """No wait from the second call on; the first call copies its tables from the host once."""
    diffusion = make(dict(self_condition=True), sampler="dpmpp_2m", sampling_timesteps=6)
    seed = torch.tensor([5], device="cuda")
    options = {"seed": seed, "progress": False}
    first = diffusion.sample(2, return_all_timesteps, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    second = diffusion.sample(2, return_all_timesteps, **options)
    third = diffusion.sample(2, return_all_timesteps, progress=False)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_the_host_runs_ahead_of_the_device():
    """All steps are on their way before the device has done the first: it is kept busy by something else."""
    diffusion = make()
    diffusion.sample(2, seed=torch.tensor([1], device="cuda"), progress=False)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    diffusion.sample(2, seed=torch.tensor([1], device="cuda"), progress=False)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_weights_of_now_are_used():
    diffusion = make()
    before = both(diffusion)
    state = {k: v * 1.2 if k.startswith("model.") else v for k, v in diffusion.state_dict().items()}

    def load():
        diffusion.load_state_dict(state)

    def assign():
        diffusion.load_state_dict({k: v.clone() for k, v in diffusion.state_dict().items()}, assign=True)
        for parameter in diffusion.parameters():
            parameter.data = parameter.data * 1.1

    def average():
        for parameter in diffusion.parameters():
            parameter.data.mul_(1.1)

    for change in (load, assign, average, diffusion.bfloat16, diffusion.float):
        change()
        torch.cuda.empty_cache()
        after = both(diffusion)
        assert change == diffusion.float or not torch.equal(after, before)
        before = after


def test_memory_is_returned():
    """Memory of the graphs, without the libraries' memory per stream, which may grow at any capture."""
    diffusion, before = make(), bytes_in_pools()
    for batch in (1, 2, 3, 4, 5, 6):
        diffusion.sample(batch, progress=False)
    assert len(diffusion.graphs) == 4 and bytes_in_pools() > before
    diffusion.clear_graphs()
    assert bytes_in_pools() == before


def test_what_cannot_be_captured_raises_and_leaves_nothing_behind():
    """In a new process: state that is left behind would spoil this one."""
    script = Path(__file__).parent / "failing_capture.py"
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0 and "all as before" in finished.stdout, finished.stdout + finished.stderr


def trained(graph, steps=8, unet=None, autocast=None, average=True, **kwargs):
    """Losses, weights and averaged weights after some steps, with the graph or without."""
    diffusion = make({"dropout": 0.1, **(unet or {})}, **kwargs)
    rate = torch.tensor(1e-3, device="cuda")
    optimizer = torch.optim.Adam(diffusion.parameters(), rate, capturable=True, fused=True)
    ema = EMA(diffusion, beta=0.9, update_every=2, update_after_step=2, use_foreach=True) if average else None
    batches = torch.rand(steps, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2)).cuda()
    step = capture_training_step(diffusion, optimizer, (4, 3, 16, 16), ema=ema, autocast=autocast, graph=graph)
    assert step.recorder.freezes_decisions == (graph is not False)
    torch.manual_seed(3)
    losses = torch.stack([step(batch) for batch in batches])
    weights = [p.detach() for p in diffusion.parameters()]
    return losses, weights, [p.detach() for p in ema.ema_model.parameters()] if average else []


@pytest.mark.parametrize("unet", [{}, {"self_condition": True}, {"memory": "low"}, {"norm": "group"}])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_captured_training_step_equals_the_step(unet, autocast):
    captured = trained(None, unet=unet, autocast=autocast)
    stepped = trained(False, unet=unet, autocast=autocast)
    assert torch.isfinite(captured[0]).all()
    assert torch.equal(captured[0], stepped[0]), "losses"
    for a, b in zip(captured[1] + captured[2], stepped[1] + stepped[2], strict=True):
        assert torch.equal(a, b)


def test_a_recording_in_half_types_measures_both_forms():
    """Forms of convolutions with norms; on a step the choice is a matter of rounding."""
    torch.use_deterministic_algorithms(False)
    measured.forget()
    losses = trained(None, steps=4, autocast=torch.bfloat16)[0]
    assert {name for name, _ in measured._choices} == {"conv_norm", "conv_norm_gradients"}
    assert all(0 < seconds < 1 for choice in measured._choices.values() for seconds in choice.seconds.values())
    for form in ("fused", "separate"):
        with measured.use_form(form):
            torch.testing.assert_close(trained(None, steps=4, autocast=torch.bfloat16)[0], losses, rtol=0.02, atol=0)


def test_a_captured_training_step_waits_for_nothing():
    diffusion = make(dict(self_condition=True, dropout=0.1))
    optimizer = torch.optim.AdamW(diffusion.parameters(), 1e-3, capturable=True, fused=True)
    ema = EMA(diffusion, update_every=2, update_after_step=2).cuda()
    step = capture_training_step(diffusion, optimizer, (4, 3, 16, 16), ema=ema)
    batch = torch.rand(4, 3, 16, 16, device="cuda")
    pinned = torch.rand(4, 3, 16, 16).pin_memory()
    for _ in range(12):  # both sides of the coin, both kinds of update
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for images in (batch, pinned) * 6:
        loss = step(images)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss) and step.grad_norm > 0


def test_a_captured_training_step_follows_what_changes():
    diffusion = make(dict(dropout=0.0))
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3, capturable=True, fused=True)
    step = capture_training_step(diffusion, optimizer, (4, 3, 16, 16))
    batch = torch.rand(4, 3, 16, 16, device="cuda")
    step(batch)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in diffusion.parameters()]
    step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, diffusion.parameters(), strict=True)), "the rate is read again"
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in diffusion.parameters():
        parameter.data = parameter.data.clone()
    step(batch)
    assert not any(torch.equal(a, b) for a, b in zip(before, diffusion.parameters(), strict=True))
    samples = [diffusion.sample(1, seed=1, progress=False, graph=g) for g in (None, False)]
    assert torch.equal(*samples), "sampling sees what replays changed"
    first = step(batch)
    second = step(batch)
    assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)


def test_an_optimizer_without_capturable_is_refused():
    diffusion = make()
    optimizer = torch.optim.Adam(diffusion.parameters(), fused=True)
    with pytest.raises(ValueError, match="capturable=True, fused=True"):
        capture_training_step(diffusion, optimizer, (4, 3, 16, 16))
    capture_training_step(diffusion, optimizer, (4, 3, 16, 16), graph=False)(torch.rand(4, 3, 16, 16, device="cuda"))


def test_recording_restores_the_generators():
    diffusion = make()
    torch.manual_seed(1)
    expected = torch.randn(3, device="cuda"), torch.randn(3)
    torch.manual_seed(1)
    recorder = recording.CudaRecorder(diffusion.device)
    numbers = torch.zeros(3, device="cuda")
    replay = recorder.record(lambda: numbers.copy_(torch.randn(3, device="cuda")), numbers.zero_)
    assert torch.equal(numbers, torch.zeros_like(numbers))
    assert torch.equal(torch.randn(3, device="cuda"), expected[0]) and torch.equal(torch.randn(3), expected[1])
    torch.manual_seed(1)
    replay()
    assert torch.equal(numbers, expected[0])
