"""The cores that this process may use.

They are read before PyTorch is imported. With ``OMP_PROC_BIND`` or ``GOMP_CPU_AFFINITY``, that import binds the
importing thread to one core, and with it every thread and process that it starts.
"""

import os

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def restore() -> None:
    """Let this thread use all cores again."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(CORES)
