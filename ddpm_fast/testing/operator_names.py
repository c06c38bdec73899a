"""Which operators of this package a block calls."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorNames(TorchDispatchMode):
    """Their names in the order of calls, `seen`, without the namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "ddpm_fast":
            self.seen.append(func._schema.name.removeprefix("ddpm_fast::"))
        return func(*args, **(kwargs or {}))
