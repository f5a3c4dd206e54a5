"""Keep freed memory blocks in the process instead of returning them to the kernel (glibc only).

By default, glibc maps each block above a threshold (128 KB at first, at most 32 MB) again at every allocation, and
every 4 KB page of it costs a page fault. A training step frees and allocates the same blocks again and again. This is
meant for training processes, because freed memory stays with the process, until `return_blocks`.
"""

from __future__ import annotations

import ctypes
import platform
import sys

from . import is_fast

# The parameters' numbers in malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_blocks() -> bool:
    """Set this process's thresholds; False if the C library is not glibc, or the fast path is switched off."""
    if not _is_glibc() or not is_fast("allocator"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_blocks() -> bool:
    """Return the memory that is free to the kernel; False if there is none to return, or the library is not glibc."""
    return _is_glibc() and bool(ctypes.CDLL(None).malloc_trim(0))


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
