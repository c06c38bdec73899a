"""The package: imports form layers, importing is cheap and quiet, and works outside the source tree."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddpm_fast"

# A module imports only from rows below its own; modules of one row do not import each other, unless listed here.
ROWS = [
    ["__main__", "classifier_free_guidance"],
    ["cli"],
    ["cli/commands"],
    [
        "cli/train",
        "cli/prepare",
        "cli/sample",
        "cli/likelihood",
        "cli/progressive",
        "cli/bench",
        "cli/doctor",
    ],
    ["cli/asked"],
    ["cli/inputs", "cli/processes"],
    ["cli/labels"],
    ["cli/options"],
    ["measure/command"],
    ["measure/profile"],
    ["measure/compare"],
    ["measure/baselines", "measure/foreign"],
    ["measure/machine"],
    ["measure/timing", "measure/charts", "measure/traffic", "measure/rate_distortion"],
    ["measure/op_costs"],
    ["optim", "training/trainer"],
    ["training/saved_run", "training/arguments", "training/samples"],
    ["training/resuming", "training/prepared", "training/conditioning"],
    ["training/data", "training/step_runner"],
    ["training/trained"],
    ["training/checkpoint", "training/evaluation", "training/batches", "training/history", "training/value_range"],
    ["training/checkpoint_states", "training/inferred"],
    ["training/checkpoint_files"],
    ["training/labels", "training/items"],
    ["training/image_folder", "training/images_in", "training/images_out"],
    ["training/pixels"],
    [
        "training/atomic_files",
        "training/numpy_pickles",
        "training/state_names",
        "training/accelerator",
        "training/stop_signals",
    ],
    ["training/captured_step"],
    ["training/step_recordings"],
    ["training/step_body"],
    ["training/adam_state", "training/recordable", "training/transfers"],
    ["training/optimizer_step"],
    ["training/average"],
    ["integrations/diffusers_folders", "integrations/diffusers_pipelines"],
    ["integrations/diffusers_network"],
    ["integrations/accelerate"],
    [
        "integrations/torch_modules",
        "integrations/upstream",
        "integrations/rectified_flow",
        "integrations/diffusers",
        "integrations/openai",
        "integrations/edm",
    ],
    ["integrations/replays"],
    ["integrations/family"],
    ["integrations/rules", "integrations/weights"],
    ["diffusion/openai", "diffusion/processes"],
    [
        "diffusion/learned_gaussian_diffusion",
        "diffusion/weighted_objective",
        "diffusion/classifier_free_diffusion",
    ],
    [
        "diffusion/gaussian_diffusion",
        "diffusion/elucidated_diffusion",
        "diffusion/continuous_time",
        "diffusion/xm",
        "diffusion/rectified_flow",
    ],
    ["diffusion/continuous_process"],
    ["diffusion/discrete_process"],
    ["diffusion/diffusion_process"],
    ["diffusion/measured_process", "diffusion/editing_process"],
    ["diffusion/sampled_process"],
    ["diffusion/likelihood"],
    ["diffusion/likelihood_chain"],
    ["diffusion/sampling", "diffusion/inpainting", "diffusion/super_resolution"],
    ["diffusion/guidance", "diffusion/sampling_run"],
    ["diffusion/single_step_samplers", "diffusion/multistep_samplers"],
    ["diffusion/samplers"],
    ["diffusion/spacings", "diffusion/schedules"],
    ["diffusion/weightings", "diffusion/timestep_history", "diffusion/conditions"],
    ["diffusion/levels", "diffusion/images", "diffusion/registry"],
    ["models/networks"],
    ["models/unet", "models/classifier_free_unet"],
    ["models/unet_base"],
    ["models/resnet", "models/attention", "models/convolution", "models/recorded_calls"],
    ["runtime/snapshot"],
    ["runtime/recording"],
    ["models/embeddings", "models/conditions"],
    ["models/norm", "models/narrow_weights"],
    ["models/derived_weights"],
    ["models/stock"],
    ["ops/*_block/op"],
    ["ops/*_block/composite", "ops/*_block/reference", "ops/*_block/triton"],
    ["ops/*_block/conv_norm"],
    ["ops/*_block/triton_conv_norm"],
    ["ops/*/op"],
    ["ops/*/operators", "ops/*/checks"],
    ["ops/*/triton", "ops/*/native", "ops/*/reference"],
    ["ops/*_block/triton_fwd", "ops/*_block/triton_bwd"],
    ["ops/*_block/triton_tile"],
    ["ops/*_block/triton_output", "ops/*_block/triton_downsample"],
    [
        "ops/*/triton_rms",
        "ops/*/triton_rms_conv",
        "ops/*/triton_group",
        "ops/*/triton_whole_group",
        "ops/*/triton_rows",
    ],
    ["ops/*/triton_conv", "ops/*/triton_fwd", "ops/*/triton_bwd"],
    ["ops/*/triton_tile"],
    ["ops/*/launch", "ops/*_block/launch", "ops/*/settings"],
    ["ops/layout", "ops/common/triton_rows"],
    [
        "ops/arguments",
        "ops/branches",
        "ops/images",
        "ops/operator",
        "ops/common/triton",
        "ops/common/norm",
        "ops/common/reference",
    ],
    ["ops/common/tables", "ops/registration"],
    ["runtime/compile_ahead", "runtime/pretrained"],
    ["runtime/dispatch", "runtime/triton_launch", "noise"],
    [
        "runtime/extension",
        "runtime/autocast",
        "runtime/extras",
        "runtime/plain",
        "runtime/tensor_sums",
        "runtime/measured",
        "runtime/mapped_files",
        "runtime/threads",
    ],
]


def is_a_block(op: str) -> bool:
    """True for the package of an op that is made of other ops."""
    return op.endswith("_block") or op == "resample"


def kind_of(module: str) -> str:
    """The last part of a module's name; "triton" for a file of kernels, which may be several of an op, triton_*.py."""
    name = module.split("/")[-1]
    return "triton" if name.startswith("triton_") and module.startswith("ops/") else name


def row_of(module: str) -> int:
    parts = module.split("/")
    in_an_op = parts[0] == "ops" and len(parts) == 3 and parts[1] != "common"
    folder = "*_block" if in_an_op and is_a_block(parts[1]) else "*"
    pattern = f"ops/{folder}/{parts[2]}" if in_an_op else module
    (row,) = [i for i, names in enumerate(ROWS) if pattern in names]
    return row


def package_imports(path: Path) -> list[str]:
    """Modules of this package that a file imports, anywhere in it, as paths relative to the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "ddpm_fast":
                base = PACKAGE.parent.joinpath(*node.module.split("."))
                names = [
                    f"{node.module}.{a.name}"
                    if (base / a.name).is_dir() or (base / f"{a.name}.py").exists()
                    else node.module
                    for a in node.names
                ]
        found += [name.removeprefix("ddpm_fast.").replace(".", "/") for name in names if name.startswith("ddpm_fast.")]
    return found


MODULES = {
    str(p.relative_to(PACKAGE).with_suffix("")): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name != "__init__.py" and "testing" not in p.relative_to(PACKAGE).parts
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_form_layers(module):
    for imported in package_imports(MODULES[module]):
        if imported == "ops" or imported == "_C":
            continue
        assert row_of(imported) > row_of(module), f"{module} imports {imported}, which is not below it"
        if module.startswith("ops/") and imported.startswith("ops/"):
            kind = kind_of(module)
            of_kind = (
                ("common/norm", "common/triton_rows", f"common/{kind}")
                if kind in ("triton", "reference")
                else ("arguments", "branches", "images", "operator")
            )
            shared = imported in [f"ops/{name}" for name in (*of_kind, "common/tables")]
            same_op = module.split("/")[1] == imported.split("/")[1]
            shared |= (module, imported) == ("ops/operator", "ops/registration")
            from_a_block = is_a_block(module.split("/")[1])  # made of the steps' ops
            assert same_op or shared or from_a_block, f"{module} imports another op, {imported}"


def test_only_kernels_import_triton_and_references_import_no_kernel():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        if kind_of(module) != "triton":
            assert "triton" not in roots, module


def test_references_are_imported_by_their_op_and_by_references():
    for module, path in MODULES.items():
        for imported in package_imports(path):
            if imported.endswith("/reference"):
                kind, folder = module.split("/")[-1], module.rsplit("/", 1)[0]
                assert kind == "reference" or module == f"{folder}/op", f"{module} imports {imported}"
                assert kind == "reference" or imported == f"{folder}/reference", f"{module} imports {imported}"


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny tensors: threads would only wait for each other
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_import_prints_nothing_and_touches_no_device(tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("error")
import torch
import ddpm_fast
assert not torch.cuda.is_initialized()
heavy = {"accelerate", "ema_pytorch", "matplotlib", "sklearn", "scipy", "PIL", "tyro", "torchvision", "triton"}
heavy.add("ddpm_fast._C")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_importing_outside_the_source_tree(tmp_path):
    result = run_python("import ddpm_fast, os; print(ddpm_fast.__version__, os.getcwd())", tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout


def test_lazy_names_are_real():
    import ddpm_fast

    for name in ddpm_fast.__all__:
        assert getattr(ddpm_fast, name) is not None
        assert name in dir(ddpm_fast)
    assert not hasattr(ddpm_fast, "Unet3D")


def test_seed_notebook_runs_with_the_import_changed(tmp_path):
    """The demo at the end of the notebook that this project starts from, smaller in size only."""
    code = """
import torch
from ddpm_fast import Unet, GaussianDiffusion

model = Unet(
    dim = 16,
    dim_mults = (1, 2, 4, 8),
    flash_attn = True
)

diffusion = GaussianDiffusion(
    model,
    image_size = 32,
    timesteps = 30    # number of steps
)

training_images = torch.rand(8, 3, 32, 32) # images are normalized from 0 to 1
loss = diffusion(training_images)
loss.backward()

sampled_images = diffusion.sample(batch_size = 4)
assert sampled_images.shape == (4, 3, 32, 32)
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    bar = [line for line in re.split(r"[\r\n]", result.stderr) if "sampling loop time step" in line]
    assert "30/30" in bar[-1], "upstream's progress bar, of a call of the network per step"


def test_pytest_looks_into_every_folder_of_tests(request):
    """Its own list of folders to leave out has "build"."""
    left_out = request.config.getini("norecursedirs")
    folders = {file.parent.name for file in Path(__file__).parent.rglob("test_*.py")}
    assert {"build", "norm_silu"} <= folders
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)]
