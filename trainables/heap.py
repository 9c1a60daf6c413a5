"""The memory of this process: what is freed is kept for the next batch instead of going back to the kernel.

Training and rendering take and free the same arrays of a few megabytes again and again. glibc returns them each time,
and the kernel then clears every page anew: on two cores that was a fifth of a training epoch and a third of a scoring.
Results do not change. At most ``KEPT_BYTES`` are held that are not in use. Other allocators are left as they are.
"""

from __future__ import annotations

import ctypes
from functools import cache

KEPT_BYTES = 256 << 20
LARGEST_KEPT_BYTES = 32 << 20  # the most that glibc takes for it; what is larger goes back to the kernel
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


@cache
def keep_freed_memory() -> bool:
    """Set this process's allocator so, once; False where it is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(TRIM_THRESHOLD, KEPT_BYTES))
