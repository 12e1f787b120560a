"""Large buffers, which glibc returns to the system when they are freed: above 32 MiB, it maps them anew every time.

In eager PyTorch a training step frees and allocates such buffers from batches of 512 on, or with 49 channels, and
mapping them page by page may take longer than computing them.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_large_buffers() -> None:
    """Let this process reuse freed buffers of any size, if it uses glibc; it keeps its peak memory until it ends."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_TRIM_THRESHOLD, -1)  # never return memory
