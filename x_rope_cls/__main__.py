"""``python -m x_rope_cls demo`` and ``python -m x_rope_cls info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import demo
from ._info import info_lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: those of the command line; None: of this process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    if options.command == "info":
        print("\n".join(info_lines(None) if options.no_measure else info_lines()))
        return 0
    try:
        demo.require_packages()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    demo.run(
        demo.Options(
            quick=options.quick, seeds=options.seeds, epochs=options.epochs, out=options.out, threads=options.threads
        )
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m x_rope_cls", description="Rotary positions and CLS tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "train small x-transformers encoders on real data in six ways to use CLS, time and check them"
    run = commands.add_parser("demo", help=text, description=text)
    run.add_argument("--quick", action="store_true", help="a few seconds in all, to see that everything works")
    run.add_argument("--seeds", type=_positive, metavar="N", help="initialisations and orders of the data (default 2)")
    run.add_argument(
        "--epochs", type=_positive, metavar="N", help="passes over the training data (default: by data set)"
    )
    run.add_argument("--out", type=Path, default=demo.Options.out, metavar="DIR", help="default: %(default)s")
    run.add_argument("--threads", type=_positive, metavar="N", help="of torch (default: as torch chooses)")
    text = "versions, what was built and is in use, and the measured limits of this machine"
    info = commands.add_parser("info", help=text, description=text)
    info.add_argument("--no-measure", action="store_true", help="leave out the limits, which take two seconds")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
