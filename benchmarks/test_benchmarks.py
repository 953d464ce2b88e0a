"""The same cases under pytest-benchmark: `make bench`, or `pytest benchmarks -k "128 and fused"`.

Each group of the output compares the competitors of one case. They are timed one after the other. `absgd-fast bench` interleaves
them, so quote its ratios. A test fails only if a result is wrong, never because of a time.
"""

from functools import lru_cache

import pytest
import torch

from .cases import CASES
from .peer import OURS, LeftOut, ready
from .peers import PEERS

TIMED = [(case, name) for case in CASES if case.suite != "memory" for name in PEERS[case.suite]]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)  # only one, because the largest case fills a gigabyte; the tests of a case come one after the other
def data_of(case):
    return case.data()


@pytest.mark.benchmark(disable_gc=True, max_time=0.5)
@pytest.mark.parametrize("case, name", TIMED, ids=[f"{case.suite}: {case.name}: {name}" for case, name in TIMED])
def test_time(benchmark, case, name):
    try:
        peer, error = ready(PEERS[case.suite][name], data_of(case))
    except LeftOut as reason:
        if name == OURS:
            raise
        pytest.skip(str(reason))
    benchmark.group = f"{case.suite}: {case.name}"
    benchmark.name = name
    benchmark.extra_info["error"] = error
    benchmark(peer.run)
