"""Folders of `config.json` and `model.safetensors`, as huggingface_hub's mixin for PyTorch writes and reads them.

That mixin is a base class, and importing it takes longer than this package; so `Pretrained` has its methods and its
files, and imports `safetensors` where a folder is written or read and `huggingface_hub` where a repository is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_aten = torch.ops.aten


class UndrawnWeights(TorchDispatchMode):
    """A block in which what would be drawn is left uninitialised, and no generator moves on.

    For classes of this package whose random tensors are all in their state dict, which then is loaded whole.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.uniform_.default, _aten.normal_.default):
            return args[0]
        if func is _aten.randn.default:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch imports torch.compile, 1.2 s, to skip a mode."""
        return False


class Pretrained:
    """A module that says by which arguments it is built again: `save_pretrained`, `from_pretrained`, `push_to_hub`."""

    def pretrained_config(self) -> dict[str, Any]:
        """What `from_pretrained_config` builds the module from, plain values."""
        raise NotImplementedError

    @classmethod
    def from_pretrained_config(cls, config: dict[str, Any], **arguments: Any) -> Self:
        """The module without its weights.

        Args:
            arguments: of the constructor, in place of those in the config.
        """
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | os.PathLike, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write the arguments to `config.json` and the state dict to `model.safetensors`.

        Args:
            folder: made where there is none.
            push_to_hub, repo_id: also upload it; the repository has the folder's name if None.
            options: of `push_to_hub`.

        Returns:
            The address of the commit with `push_to_hub`.
        """
        from ddpm_fast.runtime.extras import needed_for

        with needed_for("save_pretrained"):
            from safetensors.torch import save_file
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.pretrained_config(), indent=2, sort_keys=True)
        state: dict[str, torch.Tensor] = self.state_dict()  # type: ignore[attr-defined]
        # safetensors takes contiguous tensors only, and weights on the CPU may be channels-last.
        weights = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        # Whole or not at all: a disk that is full must not cost an earlier file.
        parts = {name: path / f"{name}.part" for name in (WEIGHTS, CONFIG)}
        try:
            save_file(weights, str(parts[WEIGHTS]), metadata={"format": "pt"})
            parts[CONFIG].write_text(text, encoding="utf-8")
            for name, part in parts.items():
                os.replace(part, path / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        return self._upload(path, path.name if repo_id is None else repo_id, **options) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        map_location: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Build a module from a folder that `save_pretrained` wrote, in evaluation mode as huggingface_hub's mixin.

        Args:
            folder: on this machine, then nothing is downloaded; or a repository's name, "user/name".
            map_location: the device.
            revision, cache_dir, force_download, local_files_only, token: of `hf_hub_download`.
            arguments: of the constructor, in place of those in `config.json`.

        Raises:
            FileNotFoundError: the folder lacks a file.
            OSError: the disk cannot read a file.
            ValueError: a file is damaged, the folder is of another class, or the weights are of another architecture.
        """
        from ddpm_fast.runtime.extras import needed_for
        from ddpm_fast.runtime.mapped_files import read_pages

        with needed_for("from_pretrained"):
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        if os.path.isdir(folder):
            config_file, weights_file = (os.path.join(folder, name) for name in (CONFIG, WEIGHTS))
        else:
            check_repository(folder)
            with needed_for("from_pretrained of a repository"):
                from huggingface_hub import hf_hub_download
            options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
            options |= {"force_download": force_download, "local_files_only": local_files_only}
            config_file, weights_file = (hf_hub_download(folder, name, **options) for name in (CONFIG, WEIGHTS))
        for file in (config_file, weights_file):
            if not os.path.isfile(file):
                raise FileNotFoundError(f"folder {folder} has no {os.path.basename(file)}")
        try:
            config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config_file} is damaged: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{config_file} must hold a dictionary, got a {type(config).__name__}")
        module: Any = cls.from_pretrained_config(config, **arguments)
        try:
            state = load_file(weights_file)
            read_pages(state.values(), weights_file)
        except SafetensorError as error:
            raise ValueError(f"{weights_file} is damaged: {error}") from error
        difference = _first_difference(module.state_dict(), state)
        if difference is not None:
            raise ValueError(f"folder {folder} is of another architecture: {difference}")
        module.load_state_dict(state)
        return module.to(map_location).eval()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the module as `save_pretrained` writes it.

        Args:
            repo_id: "user/name", made where there is none.
            options: of `huggingface_hub.HfApi.upload_folder`, and `private` and `token`.

        Returns:
            The address of the commit.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._upload(Path(folder), repo_id, **options)

    def _upload(
        self, folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        from ddpm_fast.runtime.extras import needed_for

        with needed_for("push_to_hub"):
            from huggingface_hub import HfApi
        api = HfApi(token=token)
        name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, **options))


def check_repository(folder: str | os.PathLike) -> None:
    """Raise FileNotFoundError for a path that is no folder and no repository's name, "name" or "user/name"."""
    name = os.fspath(folder)
    if isinstance(folder, os.PathLike) or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        what = "is no folder" if os.path.exists(name) else "does not exist"
        raise FileNotFoundError(f"folder {name} {what}")


def _first_difference(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> str | None:
    """The first name that is missing, unknown or of another shape, in one clause."""
    for name, tensor in own.items():
        if name not in given:
            return f"it lacks {name!r}"
        if given[name].shape != tensor.shape:
            return f"{name!r} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
    unknown = [name for name in given if name not in own]
    return f"it has an unknown {unknown[0]!r}" if unknown else None
