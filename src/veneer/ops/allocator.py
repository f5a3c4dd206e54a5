"""glibc keeps large blocks instead of giving them back to the kernel on every free.

By itself it maps every block beyond 32 MB (at first 128 KB) afresh, and each 4 KB of it cost a page fault; a training
step frees and takes the same blocks again and again. Only for processes that train: what was freed stays with them.
"""

from __future__ import annotations

import ctypes
import platform
import sys

from . import is_fast

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""


def keep_blocks() -> bool:
    """Set the thresholds of this process; false where the C library is another, or the path is switched off."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or not is_fast("allocator"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(bool(mallopt(*pair)) for pair in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)))
