"""The command line; see ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        arguments: those of the command line; None: of this process.

    Returns:
        The exit status: 1 where a row failed, else 0, whatever was reached.
    """
    parsed = _parser().parse_args(arguments)
    pinned = threads.prepare(parsed.threads, pin=not parsed.no_pin)
    from .run import Options, run, select  # imports torch

    given = sys.argv[1:] if arguments is None else arguments
    options = Options(
        rows=tuple(parsed.rows),
        quick=parsed.quick,
        cold=parsed.cold,
        tiny=parsed.tiny,
        minutes=parsed.minutes or (0.01 if parsed.tiny else 1.5 if parsed.quick else 11.0),
        limit_seconds=0.02 if parsed.tiny else 0.3,
        out=parsed.out,
        command=" ".join(["python -m benchmarks", *given]),
        pinned=pinned,
    )
    try:
        rows = select(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if parsed.list:
        for row in rows:
            print(f"{row.name:44} {row.title}")
        return 0
    results = run(options)
    return 1 if any(row.status == "failed" for row in results.rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times x_rope_cls and its peers by turns, beside the limits of this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer rows, nothing that is compiled")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names (see --list), their beginnings up to a slash, or patterns with *",
    )
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--cold", action="store_true", help="empty the caches in front of every call")
    parser.add_argument("--minutes", type=_positive(float), help="for everything (default: 11, quick 1.5)")
    parser.add_argument("--threads", type=_positive(int), help="default: one for each processor")
    parser.add_argument("--no-pin", action="store_true", help="let threads move between processors")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: times mean nothing, for tests")
    return parser


def _positive(kind: type[int] | type[float]) -> object:
    def convert(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {value}")
        return value

    return convert


if __name__ == "__main__":
    sys.exit(main())
