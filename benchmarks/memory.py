"""Peak memory of one side of a row, in a process of its own: ``python -m benchmarks.memory ROW SIDE``."""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path

from . import threads

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_memory(row: str, side: str, count: int, tiny: bool) -> dict[str, int]:
    """Bytes that were resident before the work ("before"), and at most while it ran ("peak").

    Args:
        row: its name.
        side: the name of a peer, or ``case.OURS``.
        count: of threads.
        tiny: with the row's tiny sizes.

    Raises:
        RuntimeError: the other process failed.
    """
    command = [sys.executable, "-m", __spec__.name, row, side, f"--threads={count}", *(["--tiny"] if tiny else [])]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"peak_memory: {' '.join(command)} failed: {done.stderr.strip()}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Runs the work of one side twice: small, so that libraries are set up, and then in full, watched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("side")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    threads.prepare(options.threads, pin=False)
    import torch

    from .case import OURS, Case, all_rows

    def work(case: Case) -> None:
        runs = {OURS: case.ours, **{peer.name: peer.run for peer in case.peers}}
        with torch.inference_mode(not row.backward):
            runs[options.side]()

    row = next(row for row in all_rows() if row.name == options.row)
    work(row.make(tiny=True))
    case = row.make(options.tiny)
    before = _forget_peak()
    work(case)
    print(json.dumps({"before": before, "peak": _peak()}))
    return 0


def _forget_peak() -> int:
    """Gives free memory back, forgets the peak so far where the system can, and returns what is resident."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if not _CLEAR.exists():
        return _peak()
    _CLEAR.write_text("5")
    return _status_bytes("VmRSS")


def _peak() -> int:
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
