"""Tests that need a process of their own."""

from __future__ import annotations

import os


def alone() -> dict[str, str]:
    """The environment for a pytest of its own: under xdist, plugins of the child would take it for a worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
