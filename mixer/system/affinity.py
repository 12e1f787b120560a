"""The cores that this process may use.

Asked before PyTorch is imported, since with ``OMP_PROC_BIND`` or ``GOMP_CPU_AFFINITY`` that import binds the importing
thread to one core, and with it every process and thread that it starts.
"""

import os

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def restore() -> None:
    """Let this thread run on all of them again."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


def cores() -> int:
    """How many there are."""
    return len(CORES)
