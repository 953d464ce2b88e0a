"""These tests run with the real frameworks, in an environment of their own: `make test-integrations`."""

import sys
from importlib import util

import pytest

pytest.register_assert_rewrite("truth")

FRAMEWORKS = ("accelerate", "lightning", "peft", "skorch", "transformers", "trl")

missing = [name for name in FRAMEWORKS if util.find_spec(name) is None]
if missing:
    raise pytest.UsageError(
        f"tests/integrations needs {', '.join(missing)}; run `make test-integrations`, which makes an environment that has them"
    )


@pytest.fixture(autouse=True)
def no_accelerator_before():
    """Accelerate keeps the settings of the first Accelerator of a process, whichever test or Trainer has made it."""
    if "accelerate" in sys.modules:
        from accelerate import state

        for kept in (state.AcceleratorState, state.GradientState, state.PartialState):
            kept._reset_state()
