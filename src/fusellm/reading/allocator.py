"""The C library's allocator and oneDNN, kept from growing with the number of shards.

glibc raises the size from which it maps memory of its own to that of the largest array freed so
far, and keeps the holes between batches of all shapes; oneDNN keeps what it compiled for each of
the last 1,024 shapes. 50 shards took up to 1.23 times the memory of one, though nothing was held;
attention that makes whole matrices (MPT's) left holes of 100 MB and more.
"""

import ctypes
import os
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_BYTES = 16 << 20
_KEPT_BYTES = 64 << 20
_KEPT_SHAPES = "16"


def keep_flat() -> None:
    """Give arrays of 16 MiB and more a mapping of their own, which freeing them ends.

    Smaller ones come from the heap, whose free end is kept up to 64 MiB. Lower limits are flatter
    by a few MB, and cost a fifth of the speed: new pages for every array.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_SHAPES)  # read when first used
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Return what has been freed to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
