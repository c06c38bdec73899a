"""Optional packages: the extra that installs each, and the sentence for one that is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# Import name → the extra in pyproject.toml that installs it.
EXTRAS = {
    "accelerate": "train",
    "ema_pytorch": "train",
    "numpy": "train",
    "PIL": "train",
    "scipy": "train",
    "tqdm": "train",
    "matplotlib": "plot",
    "pytorch_fid": "fid",
    "sklearn": "demo",
    "tyro": "cli",
    "huggingface_hub": "hub",
    "safetensors": "hub",
    "diffusers": "diffusers",
}


class MissingExtraError(ImportError):
    """A package is missing that an extra of ddpm_fast installs."""


@contextmanager
def needed_for(feature: str) -> Iterator[None]:
    """Imports in this block name the extra to install where a package is missing.

    Raises:
        MissingExtraError: a package of `EXTRAS` is not installed. Any other import error passes unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        message = f"{feature} needs {error.name}, which is not installed: {how_to_install(error.name)}"
        raise MissingExtraError(message, name=error.name) from error


def how_to_install(module: str) -> str:
    """The command that installs an optional package, given its import name or one of its modules."""
    return f"pip install 'ddpm_fast[{EXTRAS[module.split('.')[0]]}]'"


def is_installed(module: str) -> bool:
    """True if the package can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None
