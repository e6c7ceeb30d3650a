"""The command line: ``megatron-rlvr train | report | convert | keys``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from megatron_rlvr.config import Config, ConfigError, config_keys, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one sentence on stderr when the user can mend what went wrong."""
    parsed = _parser().parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides) if parsed.command == "train" else None
    except ConfigError as error:  # before torch is imported: a wrong key costs a fraction of a second
        print(f"error: {error}", file=sys.stderr)
        return 2
    if parsed.command == "keys":
        _print_keys()
        return 0
    from megatron_rlvr.core import RLVRError

    try:
        if config is not None:
            return _train(config)
        if parsed.command == "convert":
            from megatron_rlvr.training.convert import convert

            print(convert(parsed.source, parsed.output))
        else:
            from megatron_rlvr.report.report import write_report

            print(write_report(parsed.runs, parsed.output))
    except (RLVRError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megatron-rlvr", description="RLVR on Megatron-Core with controlled entropy.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or resume the run in run.dir")
    train.add_argument("config", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    report = commands.add_parser("report", help="figures and a summary of one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, the baseline first")
    report.add_argument("--output", metavar="DIR", help="where to write; default: the first run's directory")
    convert = commands.add_parser("convert", help="write a run's checkpoint as a Hugging Face model")
    convert.add_argument(
        "source", metavar="RUN", help="run directory (its newest checkpoint) or RUN/checkpoints/step_N"
    )
    convert.add_argument("output", metavar="OUT", help="directory to write")
    commands.add_parser("keys", help="list every configuration key with its default")
    return parser


def _train(config: Config) -> int:
    """Start this machine's ranks, or be one of them where torchrun or srun started this process."""
    from megatron_rlvr.training import worker

    if worker.is_rank():
        return worker.run_rank(config)
    from megatron_rlvr.training.launch import launch, preflight
    from megatron_rlvr.training.run_directory import RunDirectory

    preflight(config)
    directory = RunDirectory(config.run.dir)
    directory.open(config)
    if directory.finished(config.run.steps):
        print(f"{directory.path} has all its {config.run.steps} steps; see: megatron-rlvr report {directory.path}")
    else:
        launch(directory.config_file, config.world_size)
    return 0


def _print_keys() -> None:
    for key, entry in config_keys().items():
        default = "" if entry.default is dataclasses.MISSING else entry.default
        shown = "(required)" if default == "???" else f"[{default}]"
        print(f"{key:32} {shown:12} {entry.metadata['help']}")


if __name__ == "__main__":
    sys.exit(main())
