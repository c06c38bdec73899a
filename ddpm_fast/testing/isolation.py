"""Tests that need a process of their own."""

from __future__ import annotations

import os


def alone() -> dict[str, str]:
    """The environment of a child pytest, without PYTEST_*: under xdist, plugins would take the child for a worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
