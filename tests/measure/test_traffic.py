"""Counts of operators, bytes and operations: they match the launches, and ours are compared with upstream's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import ddpm_fast
from ddpm_fast.measure import traffic
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss
from ddpm_fast.ops.norm_silu import launch
from ddpm_fast.ops.norm_silu.op import rms_norm_silu
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime import triton_launch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
command = importlib.util.module_from_spec(importlib.util.spec_from_file_location("traffic_command", SCRIPT))
command.__spec__.loader.exec_module(command)
SEED_CONFIG = command.SEED_CONFIG


@pytest.fixture(scope="module")
def measured(upstream):
    """By network: training and sampling step of the seed configuration."""
    with traffic.kernels_take_meta_tensors():
        ours = {memory: traffic.measure(ddpm_fast, **SEED_CONFIG, memory=memory) for memory in ("fast", "low")}
    return {"upstream": traffic.measure(upstream, **SEED_CONFIG), **ours}


def test_upstream_is_counted_as_it_was_measured(measured):
    training = measured["upstream"]["training step"]
    assert training.operators == pytest.approx(2000, rel=0.02)
    assert training.bytes_kept == pytest.approx(527e6, rel=0.02)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_training_against_upstream(measured, memory):
    upstream, ours = measured["upstream"]["training step"], measured[memory]["training step"]
    assert upstream.bytes_kept / ours.bytes_kept >= {"fast": 2.25, "low": 4.05}[memory]
    assert ours.bytes_moved <= {"fast": 0.38, "low": 0.42}[memory] * upstream.bytes_moved
    assert ours.operators <= {"fast": 435, "low": 470}[memory]


def test_sampling_against_upstream(measured):
    """Both memories sample alike."""
    upstream, ours = measured["upstream"]["sampling step"], measured["fast"]["sampling step"]
    assert ours == measured["low"]["sampling step"]
    assert ours.bytes_moved <= 0.38 * upstream.bytes_moved
    assert ours.operators <= 175


def test_fused_ops_in_the_network(measured):
    """19 blocks of two norms, six linear and three softmax attentions: each is a fused op."""
    sampling, training = (measured["fast"][f"{step} step"].by_operator for step in ("sampling", "training"))
    for name, calls in {"norm_silu": 38, "norm_linear": 9, "linear_attention": 6, "attention": 3}.items():
        assert sampling[f"ddpm_fast::{name}"].calls == training[f"ddpm_fast::{name}"].calls == calls
        if name != "norm_silu":
            assert training[f"ddpm_fast::{name}_backward"].calls == calls
    assert [training[f"ddpm_fast::norm_silu_backward_of_{which}"].calls for which in ("last", "both")] == [19, 19]
    assert sampling["ddpm_fast::linear_residual"].calls == 3
    assert sampling["aten::cat"].calls == 9  # per block that reads a skip


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_bounds(measured, memory, gate):
    for step, found in measured[memory].items():
        for quantity in ("operators", "bytes_moved") + (("bytes_kept",) if step == "training step" else ()):
            gate("traffic", f"{step}, memory={memory}: {quantity}", getattr(found, quantity))


def test_what_the_readme_shows_is_what_is_counted(measured):
    kept = json.loads(command.KEPT.read_text())
    found = json.loads(json.dumps(command.for_the_readme(**measured)))
    if kept["torch"] == found["torch"]:
        assert kept == found, "run benchmarks/traffic.py --keep and benchmarks/render.py"


@pytest.mark.parametrize("network", ["upstream", "fast", "low"])
def test_operators_by_name_add_up(measured, network):
    for found in measured[network].values():
        assert sum(operator.calls for operator in found.by_operator.values()) == found.operators
        assert sum(operator.bytes_moved for operator in found.by_operator.values()) == found.bytes_moved
        assert sum(operator.flops for operator in found.by_operator.values()) == found.total_flops
        moved = [operator.bytes_moved for _, operator in found.dominating()]
        assert moved == sorted(moved, reverse=True) and len(found.dominating(3)) == 3


def test_convolutions_are_those_of_the_network(measured):
    """The first is 7×7 from 3 to 64 channels on the whole image; inference mode hides none of them.

    Ours has as many but those that are part of an attention: nine before, nine after. Three read upsampled maps: they
    have 4 taps per pixel of their output instead of 9.
    """
    upstream, ours = (measured[side]["sampling step"] for side in ("upstream", "fast"))
    assert [side.by_operator["aten::convolution"].calls for side in (upstream, ours)] == [75, 57]
    assert upstream.by_operator["aten::convolution"].flops > 2 * 7 * 7 * 3 * 64 * 128**2
    assert "aten::conv2d" not in ours.by_operator
    upsampled = sum(
        2 * c_in * c_out * size**2 for c_in, c_out, size in ((512, 256, 32), (256, 128, 64), (128, 64, 128))
    )
    after_attention = 2 * 128 * (2 * (64 * 128**2) + (64 + 128) * 64**2 + (128 + 256) * 32**2)
    assert ours.flops["convolution"] == upstream.flops["convolution"] - (9 - 4) * upsampled - after_attention


def count(function) -> traffic.Traffic:
    found = traffic.Traffic()
    with traffic.Counter(found):
        function()
    return found


def test_operations_by_kind():
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    weight = torch.empty(5, 3, 3, 3, device="meta", requires_grad=True)
    forward = 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert count(lambda: F.conv2d(x, weight, padding=1)).flops["convolution"] == forward
    both = count(lambda: F.conv2d(x, weight, padding=1).sum().backward())
    assert both.flops == {"convolution": 3 * forward, "matmul": 0, "attention": 0}
    matrix = torch.empty(7, 11, device="meta")
    with torch.inference_mode():
        assert count(lambda: F.linear(matrix, matrix)).flops["matmul"] == 2 * 7 * 7 * 11


def test_an_op_of_this_package_is_asked_by_name():
    x, g = torch.empty(1, 8, 4, 4, device="meta"), torch.empty(8, device="meta")
    name = "ddpm_fast::norm_silu"
    flops = mock.patch.dict(traffic.FLOPS, {name: lambda arguments, result: {"matmul": arguments["x"].numel()}})
    again = mock.patch.dict(traffic.SECOND_READS, {name: lambda arguments: [arguments["gain"]] * 2})
    scratch = mock.patch.dict(traffic.SCRATCH_BYTES, {name: lambda arguments: 1000 + len(arguments)})
    with flops, again, scratch, traffic.kernels_take_meta_tensors():
        found = count(lambda: rms_norm_silu(x, g))
    assert found.flops["matmul"] == 128
    statistics = 4 * 16
    assert found.bytes_moved == 4 * (2 * 128 + 8) + statistics + 2 * 4 * 8 + 1000 + 12


@pytest.mark.parametrize("C, size, dropout", [(64, 128, False), (512, 16, False), (24, 7, True), (64, 32, True)])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_partial_sums_of_norm_silu_are_those_of_its_launches(C, size, dropout, groups, with_bias):
    kernel = pytest.importorskip("ddpm_fast.ops.norm_silu.triton")
    x = torch.empty(2, C, size, size, device="meta").to(memory_format=torch.channels_last)
    row = torch.empty(C, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
    rows = {"gain": row, "offset": row if groups else None, "bias": row if with_bias else None}
    rows |= {"scale": None, "shift": None, "seed": seed, "groups": groups, "activation": True, "dropout_p": 0.5}
    statistics = torch.empty((2, groups, 2) if groups else (2, size * size), device="meta")
    names = ["group_moments_kernel", "group_merge_kernel", "group_norm_silu_fwd_kernel"]
    names += ["group_norm_silu_sums_kernel", "group_norm_silu_bwd_kernel", "rms_norm_silu_bwd_kernel"]
    names += ["rms_norm_silu_fwd_kernel", "group_means_kernel", "norm_silu_bwd_rows_kernel"]
    names += ["whole_group_norm_silu_fwd_kernel", "whole_group_norm_silu_bwd_kernel"]
    with mock.patch.multiple(kernel, **{name: mock.MagicMock() for name in names}):
        kernel.norm_silu(x, residual=None, eps=1e-5, **rows)
        kernel.norm_silu_backward(x, x, statistics, **rows)
        calls = {name: getattr(kernel, name).__getitem__.return_value.call_args for name in names}
        last_rows = {name: rows[name] for name in ("gain", "offset", "bias", "groups")}
        last_rows |= {"grad2": None, "grad3": None}
        _, last_sums, _ = kernel.norm_silu_backward_of_last(x, x, statistics, **last_rows)
    arguments = {"x": x, "groups": groups, "bias": rows["bias"], "seed": seed}
    # What the operators return and take are bytes of these; with them the two count as two of the whole backward.
    of_last, of_both = (
        traffic.SCRATCH_BYTES[f"ddpm_fast::norm_silu_backward_of_{which}"](given)
        for which, given in (("last", {**arguments, "seed": None}), ("both", arguments))
    )
    without_dropout = traffic.SCRATCH_BYTES["ddpm_fast::norm_silu_backward"]({**arguments, "seed": None})
    assert of_last + 2 * last_sums.nbytes == without_dropout
    assert of_both == traffic.SCRATCH_BYTES["ddpm_fast::norm_silu_backward"](arguments)
    forward = traffic.SCRATCH_BYTES["ddpm_fast::norm_silu"](arguments)
    backward = traffic.SCRATCH_BYTES["ddpm_fast::norm_silu_backward"](arguments)
    twice = traffic.SECOND_READS["ddpm_fast::norm_silu_backward"]({**arguments, "grad": x})
    if groups and launch.choose_groups(size * size, C, groups) is not None:
        assert forward == 0 and not twice and calls["group_norm_silu_bwd_kernel"] is None
        sums = calls["whole_group_norm_silu_bwd_kernel"].args[3]  # (B, 1, 2 or 3, C)
        assert calls["norm_silu_bwd_rows_kernel"].args[0] is sums and backward == 2 * sums.nbytes
    elif groups:
        assert len(twice) == 2 and calls["whole_group_norm_silu_bwd_kernel"] is None
        moments = calls["group_moments_kernel"].args[1]  # (B, chunks, 2, C), means first
        assert forward == moments.nbytes + moments.nbytes + moments.nbytes // 2
        sums = calls["group_norm_silu_sums_kernel"].args[2]  # (B, chunks, 2 or 3, C)
        readers = ("group_norm_silu_bwd_kernel", 3), ("group_means_kernel", 0), ("norm_silu_bwd_rows_kernel", 0)
        assert all(calls[name].args[i] is sums for name, i in readers)
        assert backward == 2 * sums.nbytes + sums[:, :, :2].numel() * 4
    else:
        assert forward == 0 and not twice
        sums = calls["rms_norm_silu_bwd_kernel"].args[3]
        assert calls["norm_silu_bwd_rows_kernel"].args[0] is sums and backward == 2 * sums.nbytes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_partial_sums_of_the_loss_are_those_of_its_launch(memory_format):
    kernel = pytest.importorskip("ddpm_fast.ops.forward_diffusion.triton")
    x = torch.empty(2, 3, 40, 41, device="meta").to(memory_format=memory_format)
    t = torch.empty(2, dtype=torch.int64, device="meta")
    seed, table = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(10, 3, device="meta")
    names = ["diffusion_loss_fwd_kernel", "diffusion_loss_reduce_kernel"]
    with mock.patch.multiple(kernel, **{name: mock.MagicMock() for name in names}):
        kernel.diffusion_loss(x, x, t, table, None, seed, None, True, 0.0, True)
        partial = kernel.diffusion_loss_fwd_kernel.__getitem__.return_value.call_args.args[1]
    assert traffic.SCRATCH_BYTES["ddpm_fast::diffusion_loss"]({"model_output": x}) == 2 * partial.nbytes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_partial_sums_of_the_variational_bound_are_those_of_its_launch(memory_format):
    kernel = pytest.importorskip("ddpm_fast.ops.variational_bound.triton")
    x = torch.empty(2, 3, 40, 41, device="meta")
    output = torch.empty(2, 6, 40, 41, device="meta").to(memory_format=memory_format)
    t = torch.empty(2, dtype=torch.int64, device="meta")
    seed, table = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(10, 14, device="meta")
    names = ["variational_bound_fwd_kernel", "variational_bound_reduce_kernel"]
    with mock.patch.multiple(kernel, **{name: mock.MagicMock() for name in names}):
        kernel.variational_bound(output, x, t, table, None, seed, None, True, 0.0, False, True, 1e-15, True)
        partial = kernel.variational_bound_fwd_kernel.__getitem__.return_value.call_args.args[1]
    arguments = {"model_output": output, "x_start": x}
    assert traffic.SCRATCH_BYTES["ddpm_fast::variational_bound"](arguments) == 2 * partial.nbytes


@pytest.mark.parametrize("given", [False, True], ids=["seed", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_variational_bound_moves_at_most_1_3_times_the_bytes_of_the_plain_loss(dtype, given):
    """Forward and backward, of outputs of one shape; the bound has half of them for the variance."""
    pytest.importorskip("triton")
    output = torch.empty(32, 6, 128, 128, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    t, seed = torch.empty(32, dtype=torch.int64, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    moved = {}
    for function, channels, columns in ((diffusion_loss, 6, 3), (variational_bound, 3, 14)):
        x, table = torch.empty(32, channels, 128, 128, device="meta"), torch.empty(1000, columns, device="meta")
        count = traffic.Traffic()
        leaf = output.clone().requires_grad_()
        with traffic.kernels_take_meta_tensors(), traffic.Counter(count):
            loss = function(leaf, x, t, table, torch.empty_like(x) if given else None, seed=seed)
            loss.backward(torch.empty_like(loss))
        assert set(count.by_operator) >= {f"ddpm_fast::{function.__name__}{end}" for end in ("", "_backward")}
        moved[function] = sum(
            operator.bytes_moved for name, operator in count.by_operator.items() if name.startswith("ddpm_fast")
        )
    assert 0.5 * moved[diffusion_loss] < moved[variational_bound] <= 1.3 * moved[diffusion_loss], moved


@pytest.mark.parametrize("shape", [(1, 64, 128, 128), (3, 24, 7, 9)], ids=str)
def test_partial_sums_of_norm_linear_are_those_of_its_launch(shape):
    kernel = pytest.importorskip("ddpm_fast.ops.norm_linear.triton")
    x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
    g, weight = torch.empty(shape[1], device="meta"), torch.empty(40, shape[1], 1, 1, device="meta")
    grad, norms = kernel.empty_outputs(x, 40)
    kernels = {f"norm_linear_bwd_{n}_kernel": mock.MagicMock() for n in ("x", "weight", "parameters")}
    tf32 = mock.patch.object(triton_launch, "convolution_precision", return_value="tf32")
    with tf32, mock.patch.multiple(kernel, **kernels):
        kernel.norm_linear_backward(grad, x, norms, g, weight)
        sums = kernel.norm_linear_bwd_weight_kernel.__getitem__.return_value.call_args.args[3]
        assert kernel.norm_linear_bwd_parameters_kernel.__getitem__.return_value.call_args.args[0] is sums
    counted = traffic.SCRATCH_BYTES["ddpm_fast::norm_linear_backward"]({"x": x, "weight": weight})
    assert counted == 2 * sums.nbytes


def test_a_table_is_read_where_it_is_looked_up():
    table, rows = torch.empty(1000, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    assert count(lambda: table[rows]).bytes_moved == 2 * 3 * 8 * 4 + 3 * 8


def test_the_command(tmp_path):
    options = ["--dim", "8", "--dim-mults", "1", "2", "--image-size", "16", "--memory", "low"]
    arguments = [sys.executable, str(SCRIPT), *options, "--json", str(tmp_path / "traffic.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads((tmp_path / "traffic.json").read_text())
    assert found["config"]["dim_mults"] == [1, 2]
    for side in ("upstream", "ours"):
        for step in ("training step", "sampling step"):
            assert found[side][step]["operators"] > 0 and found[side][step]["flops"]["convolution"] > 0
    assert printed.count("| training step |") == 5 and printed.count("| sampling step |") == 4
