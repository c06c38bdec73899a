"""`ddpm-fast doctor`."""

import dataclasses


@dataclasses.dataclass
class Doctor:
    """Show versions, devices, the compiled extension, registered processes, samplers and spacings, and operations.

    Of each operation it says which implementation would run.
    """

    debug: bool = False
    """Show the traceback of an error."""


def run(options: Doctor) -> None:
    """`ddpm-fast doctor`."""
    import platform

    import torch

    import ddpm_fast
    from ddpm_fast.diffusion.processes import PROCESSES
    from ddpm_fast.diffusion.samplers import FEW_STEPS, SAMPLERS
    from ddpm_fast.diffusion.spacings import SPACINGS
    from ddpm_fast.runtime import extension

    print(f"ddpm_fast {ddpm_fast.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"system: {platform.platform()}, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(names) or 'none'} (torch built for CUDA {torch.version.cuda or 'none'})")
    info = extension.info()
    print(f"extension: {info if info else f'not loaded: {extension.reason()}'}")
    print(f"processes: {', '.join(PROCESSES)}")
    print(f"samplers: {', '.join(sorted(SAMPLERS))} (few steps: {FEW_STEPS})")
    print(f"spacings: {', '.join(SPACINGS)}")
    print(ddpm_fast.explain())
