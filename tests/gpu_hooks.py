"""What pytest looks for in each test_gpu_*.py: their tables, and the settings that a body runs under."""

from contextlib import contextmanager

import torch
from gpu_cases import places


def pytest_generate_tests(metafunc):
    import pytest

    for name, table in getattr(metafunc.function, "tables", {}).items():
        metafunc.parametrize(name, list(table.values()), ids=list(table))
    if "where" in metafunc.fixturenames:
        params = [(where, where.why_not()) for where in places(metafunc.function)]
        marked = [pytest.param(w, marks=pytest.mark.skipif(bool(reason), reason=str(reason)), id=str(w)) for w, reason in params]
        metafunc.parametrize("where", marked)


_settings = []


def setup_function(function=None):
    """torch.empty returns NaN, so that a read of uninitialised memory shows; torch's own operators are not meant by it. One
    thread, because on small tensors two would mostly wait for each other."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    _settings.append((*before, torch.get_num_threads()))
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.set_num_threads(1)


def teardown_function(function=None):
    enabled, warn_only, threads = _settings.pop()
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.set_num_threads(threads)


@contextmanager
def unpoisoned():
    """Where launches count, no kernel fills what torch.empty returns."""
    setup_function()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        teardown_function()
