"""Pages of memory that this process takes anew, as the operating system counts them."""

from __future__ import annotations

import functools
import mmap

import numpy as np

try:
    import resource
except ImportError:  # no Unix: nothing is counted, and nothing taken off measured times
    resource = None  # type: ignore[assignment]

_SAMPLE_BYTES = 1 << 26


def taken() -> int:
    """Pages taken so far, of whatever size; on a GPU's own memory this says nothing."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


@functools.cache
def page_bytes() -> float:
    """Bytes of new memory for each page that is counted: a mean, if some are huge pages."""
    if resource is None:
        return 0.0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, _SAMPLE_BYTES, flags=private) as memory:
        before = taken()
        np.frombuffer(memory, np.uint8).fill(1)
        return _SAMPLE_BYTES / max(taken() - before, 1)
