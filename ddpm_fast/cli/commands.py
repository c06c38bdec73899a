"""The five commands as one choice, parsed by tyro."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from ddpm_fast.cli import bench, doctor, prepare, sample, train

Command = (
    Annotated[train.Train, tyro.conf.subcommand("train")]
    | Annotated[prepare.Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[sample.Sample, tyro.conf.subcommand("sample")]
    | Annotated[bench.Bench, tyro.conf.subcommand("bench")]
    | Annotated[doctor.Doctor, tyro.conf.subcommand("doctor")]
)


def parse(
    arguments: Sequence[str] | None,
) -> train.Train | prepare.Prepare | sample.Sample | bench.Bench | doctor.Doctor:
    """The command with its options, from these arguments or from the command line; a mistake there exits with 2."""
    return tyro.cli(
        Command,
        prog="ddpm-fast",
        args=arguments,
        description="Denoising diffusion, fast: train, prepare, sample, bench, doctor.",
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def run(command: train.Train | prepare.Prepare | sample.Sample | bench.Bench | doctor.Doctor) -> None:
    """Run a parsed command."""
    match command:
        case train.Train():
            train.run(command)
        case prepare.Prepare():
            prepare.run(command)
        case sample.Sample():
            sample.run(command)
        case bench.Bench():
            bench.run(command)
        case doctor.Doctor():
            doctor.run(command)
