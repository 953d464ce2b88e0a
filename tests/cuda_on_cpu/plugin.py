"""pytest plugin of the runs in which the CUDA operators serve tensors on the CPU, their threads being fibers (test_cuda.py).

SIMT_ORDER    order and seed of threads and blocks, e.g. random:3
SIMT_LIMIT    threads of the one-block kernel, which makes the gradient of batches that fit; 0: all from statistics
"""

import os
from pathlib import Path

import pytest
from simt.build import Simt

from absgd_fast import _backend, ops

ORDER, _, SEED = os.environ["SIMT_ORDER"].partition(":")
simt = Simt(Path(_backend.__file__).with_name("_ops_cpu.so"))
simt.strict()  # shuffles order no memory

# what is saved for backward is decided as on a GPU
_cuda = ops.OPERATORS["cuda"]
_cuda.gradient_limit = int(os.environ["SIMT_LIMIT"])
for _operators, _of_cuda in ((ops.OPERATORS["cpu"], _cuda), (ops.OPERATORS["cpu"].compiled, _cuda.compiled)):
    _operators.has_rules, _operators.weighs_late, _operators.writes_over_logits = False, True, False
    _operators.has_squares = False
    _operators.backward_mode, _operators.losses_backward_mode = _cuda.backward_mode, _cuda.losses_backward_mode
    for _name in ("settled_logit_loss", "logit_loss_backward"):
        setattr(_operators, _name, getattr(_of_cuda, _name))

# A kernel cannot raise, so a label out of range is ignored and found by a later call: suite.py has the test of that.
LATER = (
    "test_loss_errors",
    "test_bad_label",
    "test_bad_calls_leave_the_state",
    "test_bad_input",
    "test_a_bad_label",
    "test_no_classes",
)
OF_THE_CPU = (
    "test_choosing_an_instruction_set",
    "test_one_operator_forward_and_one_backward",
    "test_logits_are_not_stored",
    "test_benchmark",
    "test_two_processes",
    # here the records of two backends are mixed, and the robust loss leaves z in place of the weights (`weighing`)
    "test_backends_have_the_operators_of_their_records",
    "test_plain_torch_does_what_the_kernels_do[robust_logit_loss]",
)
LARGE = ("test_same_bits_for_1_and_2_threads",)  # batches for two threads of the CPU, which are none of the kernels': deep


@pytest.hookimpl(wrapper=True)  # before conftest.py chooses among what is left
def pytest_collection_modifyitems(config, items):
    left_out = [
        i
        for i in items
        if i.name.startswith(OF_THE_CPU)
        or (i.name.startswith(LATER) and ("target" in i.name or "label" in i.name or "no_classes" in i.name))
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out and "reference" not in item.name]
    for item in items:
        if item.name.startswith(LARGE):
            item.add_marker("deep")
    return (yield)


@pytest.fixture(autouse=True)
def no_reports():
    """A kernel that steps over a bound, waits at different barriers or races is a failure whatever it computed."""
    simt.clear()
    simt.configure(ORDER, int(SEED or 0))
    yield
    assert simt.failures() == []
