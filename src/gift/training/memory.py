"""How much memory was in use at most."""

import ctypes
import gc
import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


def peak_memory_mb() -> int:
    """Return the most memory that was in use: of the accelerator, or else of this process since it began."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    if _STATUS.exists():  # what getrusage says there begins with the memory of the program that started this one
        return round(int(re.findall(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())[0]) * 1024 / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # macOS counts in bytes


def forget_peak_memory() -> bool:
    """Give back what is free and let the peak begin anew, for one of several runs in a process.

    Returns:
        Whether that was possible; else the peak is that of all runs so far.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    # Without it glibc kept 40 MB more after each run of a worker of Ray.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True
