"""The command `ddpm-fast`, whose parts are in `commands`. Functions have the heavy imports."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from ddpm_fast.runtime.extras import MissingExtraError, needed_for


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ddpm-fast`; errors that the user can put right end with one line and exit code 2, Ctrl-C with 130."""
    try:
        with needed_for("the command ddpm-fast"):
            from ddpm_fast.cli import commands
    except MissingExtraError as error:
        _stop(error)
    command = commands.parse(arguments)
    warnings.showwarning = _show_warning
    try:
        commands.run(command)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, ValueError, TypeError, MissingExtraError) as error:
        if command.debug or not _is_for_the_user(error):
            raise
        _stop(error)


def _stop(error: Exception) -> NoReturn:
    print(f"ddpm-fast: error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def _is_for_the_user(error: Exception) -> bool:
    """True if our own code raised it as a check: an error from deeper down is a fault of the program."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "")
    return isinstance(error, OSError) or module.split(".")[0] in ("ddpm_fast", "accelerate")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"ddpm-fast: warning: {message}", file=sys.stderr)
