"""Memory: what is in use in the C heap, what a call needs at most, and what a step leaves behind."""

import ctypes
import gc
from functools import partial
from pathlib import Path

GROWTH_STEPS = 5000


def heap():
    """The exact number of bytes in use in the C heap, which holds tensors and graphs. It needs Linux with glibc 2.33 or newer."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # struct mallinfo2

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd


def growth(peer):
    """The number of bytes that one step leaves behind in the heap."""
    after = []
    for _ in range(2):  # in the first pass, caches still grow
        for _ in range(GROWTH_STEPS):
            peer.run()
        after.append(heap())
    return (after[1] - after[0]) / GROWTH_STEPS


def _resident(field):
    """A field of /proc/self/status in bytes: VmRSS, the resident memory, or VmHWM, its highest value so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(run):
    """The largest memory in use during a call, less the memory in use before it. It includes the scratch memory of kernels."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident could be used again and would not be counted
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present value
    run()
    return _resident("VmHWM") - before


def peak(peer, **options):
    """The peak memory of forward and backward, as a multiple of the gradient's size."""
    peer.leaf.grad = None
    return peak_bytes(partial(peer.run, **options)) / (peer.leaf.numel() * peer.leaf.element_size())


def retained(peer):
    """The same as peak(), while the graph is kept for another backward."""
    return peak(peer, retain_graph=True)


MEASURES = {"growth": growth, "peak": peak, "retained": retained}


def attempt(measure, peer):
    try:
        return measure(peer)
    except (OSError, AttributeError, RuntimeError):  # not this system; torch.compile cannot retain a graph
        return None
