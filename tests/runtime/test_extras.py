"""Optional packages: networks, losses and sampling need torch alone; the rest names the extra to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run_code

from ddpm_fast.runtime import extras

OPTIONAL = [*extras.EXTRAS, "torchvision", "einops", "diffusers"]

# One finder in front of the others, which finds these packages nowhere: as if they were not installed.
WITHOUT = """
import sys

class Without:
    def __init__(self, names, finders):
        self.names, self.finders = names, finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context):
        return (distribution for finder in self.finders if hasattr(finder, "find_distributions")
                for distribution in finder.find_distributions(context))

sys.meta_path[:] = [Without(set({names!r}), list(sys.meta_path))]
"""


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run code in a process in which every optional package is missing, to torch's import, too."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT.format(names=OPTIONAL) + code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)


def test_torch_alone_trains_a_step_and_samples(tmp_path):
    code = """
import torch
import ddpm_fast
from ddpm_fast import GaussianDiffusion, Unet, capture_training_step

torch.manual_seed(0)
diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2), flash_attn=True), image_size=8, timesteps=20)
optimizer = torch.optim.Adam(diffusion.parameters())
step = capture_training_step(diffusion, optimizer, (2, 3, 8, 8))
assert step(torch.rand(2, 3, 8, 8)).isfinite()
for sampler in ("ddpm", "ddim", "dpmpp_2m"):
    other = GaussianDiffusion(diffusion.model, image_size=8, timesteps=20, sampling_timesteps=5, sampler=sampler)
    images = other.sample(2, seed=1)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
ddpm_fast.explain()
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "no progress bar is shown, since tqdm is not installed" in result.stderr
    assert "Error" not in result.stderr


# Code that needs an extra → its purpose in the message, and the first missing package.
NEEDS = {
    "from ddpm_fast import Dataset": ("reading and writing images", "numpy"),
    "import ddpm_fast; ddpm_fast.load_checkpoint('model.pt')": ("load_checkpoint", "ema_pytorch"),
    "from ddpm_fast.training import evaluation": ("FID", "numpy"),
    "from ddpm_fast.measure import charts; charts.bars({}, None, title='', unit='ms')": ("a chart", "matplotlib"),
    "import torch; from ddpm_fast import GaussianDiffusion, Unet\n"
    "diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, immiscible=True)\n"
    "diffusion(torch.rand(2, 3, 8, 8))": ("immiscible=True", "scipy"),
}


def test_a_missing_package_names_its_extra(tmp_path):
    code = f"""
from ddpm_fast.runtime.extras import MissingExtraError

for code in {list(NEEDS)!r}:
    try:
        exec(code, {{}})
    except MissingExtraError as error:
        print(error)
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{feature} needs {module}, which is not installed: {extras.how_to_install(module)}"
        for feature, module in NEEDS.values()
    ]


@pytest.mark.parametrize(
    ("missing", "arguments", "sentence"),
    [
        ("tyro", ["doctor"], "the command ddpm-fast needs tyro, which is not installed: pip install 'ddpm_fast[cli]'"),
        ("accelerate", ["train", "digits"],
         "Trainer needs accelerate, which is not installed: pip install 'ddpm_fast[train]'"),
        ("sklearn", ["train", "digits"],
         "DigitsDataset needs sklearn, which is not installed: pip install 'ddpm_fast[demo]'"),
    ],
)  # fmt: skip
def test_the_command_line_says_it_in_one_line(missing, arguments, sentence, tmp_path):
    code = f"from ddpm_fast.cli import main\nmain({arguments!r})"
    result = run_code(WITHOUT.format(names=[missing]) + code, tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"ddpm-fast: error: {sentence}"]


def test_training_without_matplotlib_draws_no_loss_and_says_so(tmp_path):
    code = """
from ddpm_fast.training.history import LossHistory

history = LossHistory(".")
history.start(0)
history.append(1, 0.5, 10.0)
history.plot()
"""
    result = run_code(WITHOUT.format(names=["matplotlib"]) + code, tmp_path)
    assert "loss.png is not drawn, since matplotlib is not installed: pip install 'ddpm_fast[plot]'" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["loss.csv"]


def test_other_import_errors_pass_unchanged():
    with pytest.raises(ModuleNotFoundError, match="^No module named 'no_such_package'$"):
        with extras.needed_for("a test"):
            import no_such_package  # noqa: F401
    with pytest.raises(ImportError, match="^cannot import name 'Nothing'"):
        with extras.needed_for("a test"):
            from torch import Nothing  # noqa: F401


def test_every_extra_that_is_named_installs_its_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert project["dependencies"] == ["torch>=2.9"]
    distributions = {
        "PIL": "pillow",
        "ema_pytorch": "ema-pytorch",
        "sklearn": "scikit-learn",
        "pytorch_fid": "pytorch-fid",
    }
    for module, extra in extras.EXTRAS.items():
        names = [re.split(r"[><=\[]", requirement)[0] for requirement in declared[extra]]
        assert distributions.get(module, module) in names, f"[{extra}] does not install {module}"
