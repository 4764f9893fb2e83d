"""The peak of memory is that of one run, also where a process has done others before."""

import numpy as np

from gift.training.memory import forget_peak_memory, peak_memory_mb


def test_the_peak_is_of_what_came_after_it_was_forgotten():
    before = peak_memory_mb()
    np.ones(300_000_000 // 8).sum()
    peak = peak_memory_mb()
    assert peak >= before
    if forget_peak_memory():  # else the system cannot: then no line has a peak
        forgotten = peak_memory_mb()
        assert forgotten < peak - 150
        np.ones(300_000_000 // 8).sum()
        assert peak_memory_mb() > forgotten + 150
