"""The seven commands as one choice, parsed by tyro."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from ddpm_fast.cli import bench, doctor, likelihood, prepare, progressive, sample, train

Command = (
    Annotated[train.Train, tyro.conf.subcommand("train")]
    | Annotated[prepare.Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[sample.Sample, tyro.conf.subcommand("sample")]
    | Annotated[likelihood.Likelihood, tyro.conf.subcommand("likelihood")]
    | Annotated[progressive.Progressive, tyro.conf.subcommand("progressive")]
    | Annotated[bench.Bench, tyro.conf.subcommand("bench")]
    | Annotated[doctor.Doctor, tyro.conf.subcommand("doctor")]
)

Options = (
    train.Train
    | prepare.Prepare
    | sample.Sample
    | likelihood.Likelihood
    | progressive.Progressive
    | bench.Bench
    | doctor.Doctor
)


def parse(arguments: Sequence[str] | None) -> Options:
    """The command with its options, from these arguments or from the command line; a mistake there exits with 2."""
    return tyro.cli(
        Command,
        prog="ddpm-fast",
        args=arguments,
        description="Denoising diffusion, fast: train, prepare, sample, likelihood, progressive, bench, doctor.",
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def run(command: Options) -> None:
    """Run a parsed command."""
    match command:
        case train.Train():
            train.run(command)
        case prepare.Prepare():
            prepare.run(command)
        case sample.Sample():
            sample.run(command)
        case likelihood.Likelihood():
            likelihood.run(command)
        case progressive.Progressive():
            progressive.run(command)
        case bench.Bench():
            bench.run(command)
        case doctor.Doctor():
            doctor.run(command)
