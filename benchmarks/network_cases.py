"""The networks that the benchmarks time, by size; the tests run the quick ones."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm_fast.bench.compare import PHASES
from ddpm_fast.bench.contenders import Configuration

SEED = {"dim": 64, "dim_mults": (1, 2, 4, 8)}
EAGER = ("peer", "peer-channels-last")
COMPILED = ("peer-compiled", "peer-max-autotune")

# Seconds that compiling a contender may take in one phase; it is left out where less is left.
COMPILE_SECONDS = {"peer-compiled": 90, "peer-max-autotune": 180}


@dataclass(frozen=True, eq=False)
class NetworkCase:
    """A configuration, the phases in which it is timed, and whom ours meets there; each is held equal to ours first."""

    configuration: Configuration
    rivals: tuple[str, ...]
    phases: tuple[str, ...] = PHASES

    def __str__(self) -> str:
        return str(self.configuration)


_CPU = Configuration(**SEED, image_size=32, batch=2, steps=20)

# Sampling runs take few steps, all of them alike; the report gives seconds per 1,000.
_CASES = {
    "full": [
        NetworkCase(
            Configuration(**SEED, image_size=128, batch=32, dtype="bf16", steps=20),
            ("ours-captured", "ours-low-memory", *EAGER, *COMPILED, "diffusers"),
            PHASES[:1],
        ),
        NetworkCase(
            Configuration(**SEED, image_size=128, batch=4, dtype="bf16", steps=50),
            (*EAGER, *COMPILED, "diffusers"),
            PHASES[1:],
        ),
        NetworkCase(Configuration(**SEED, image_size=128, batch=8, dtype="fp32", steps=20), EAGER),
    ],
    # Compiling for a CPU takes minutes: first for training, for sampling where time is left.
    "cpu": [
        NetworkCase(_CPU, ("ours-low-memory", *EAGER, "peer-compiled", "diffusers"), PHASES[:1]),
        NetworkCase(
            Configuration(dim=32, dim_mults=(1, 2, 4), image_size=16, batch=1, steps=100), (*EAGER, "diffusers")
        ),
        NetworkCase(_CPU, (*EAGER, "diffusers", "peer-compiled"), PHASES[1:]),
    ],
    "quick": [
        NetworkCase(Configuration(dim=16, dim_mults=(1, 2), image_size=8, batch=2, steps=3), ("peer", "diffusers"))
    ],
}


def network_cases(size: str) -> list[NetworkCase]:
    """The cases of a size: "full", "cpu" or "quick"."""
    return _CASES[size]
