"""What holds for every test of the Triton kernels in Triton's interpreter: fixtures and marks."""

import pytest

from absgd_fast.kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where a row that is masked is NaN


@pytest.fixture(params=["one", "many"])
def launches(request, monkeypatch):
    """Up to 16384 losses in one launch; the same through the launches for more."""
    if request.param == "many":
        monkeypatch.setattr(launch, "ONE_LAUNCH", 0)


@pytest.fixture(autouse=True)
def counters_are_left_zero():
    yield
    assert not any(done.any() for done in launch._counters.values())
