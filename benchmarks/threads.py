"""Threads and the processors they run on. To be imported before torch, whose threads read the environment once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_CAN_PIN = hasattr(os, "sched_getaffinity")
_ALLOWED = os.sched_getaffinity(0) if _CAN_PIN else set(range(os.cpu_count() or 1))


def prepare(threads: int | None, pin: bool) -> bool:
    """Sets how many threads torch will have, and gives each a processor of its own.

    Args:
        threads: how many; None: one for each processor that this process may run on.
        pin: whether a thread keeps its processor.

    Returns:
        Whether threads are pinned.
    """
    count = threads or len(_ALLOWED)
    os.environ["OMP_NUM_THREADS"] = str(count)
    pin = pin and _CAN_PIN and count <= len(_ALLOWED)
    if pin:
        os.environ["OMP_PLACES"] = ",".join(f"{{{processor}}}" for processor in sorted(_ALLOWED)[:count])
        os.environ["OMP_PROC_BIND"] = "true"
    return pin


@contextmanager
def unpinned() -> Iterator[None]:
    """Threads and processes started here may run where this process could at first, which they inherit from here."""
    if not _CAN_PIN:
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _ALLOWED)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
