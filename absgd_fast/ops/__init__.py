"""The operators: the functions by which the rest of the package calls the kernels of every backend.

    spec.py       the loss on logits that an operator is asked for
    modes.py      whether torch.func transforms or torch.export are active, and whether a graph is kept
    labels.py     errors about labels out of range
    in_torch.py   operators in plain torch
    schemas.py    one record per operator: its schema, its fake, and which backends have it
    backends.py   the operators of each backend, and the choice of the one that serves a call
    autograd.py   how a value gets its gradient
    inputs.py     how it gets those of sample weights and soft targets

The native libraries (CPU, CUDA) register the kernels of the namespace `absgd_fast`, and backends.py those of `absgd_fast_triton`.
Each file imports only from those above it.
"""

from .._codes import (
    HARD,
    INIT_FIRST,
    KIND,
    PRUNE,
    RULES,
    RULES_OF_LOSSES,
    UPDATE,
    WITH_GRAD,
    WITH_STATS,
    flags,
)
from ..reference import COUNT, LOG_S, LOG_SUM, NONFINITE, PARTIAL_STATS, SCALE, Z_MAX
from .autograd import attach, attach_logit_gradient, robust_weights, weights_of
from .backends import ANY, ONE_BLOCK, OPERATORS, REFERENCE, Kernels, Operators, lanes_of_a_row, serving
from .in_torch import stack_sample_stats
from .inputs import attach_sample_weight, attach_target, is_learned, needs_attaching
from .labels import bad_label, check_labels, kernels_can_report, report_of_kernels, reported_labels, translated
from .modes import graph_is_kept, refuse_export, refuse_update, transformed
from .schemas import RECORDS, Operator
from .spec import LossSpec, masked_inputs, masked_target

__all__ = [
    "ANY",
    "COUNT",
    "HARD",
    "INIT_FIRST",
    "KIND",
    "LOG_S",
    "LOG_SUM",
    "NONFINITE",
    "ONE_BLOCK",
    "OPERATORS",
    "PARTIAL_STATS",
    "PRUNE",
    "RECORDS",
    "REFERENCE",
    "RULES",
    "RULES_OF_LOSSES",
    "SCALE",
    "UPDATE",
    "WITH_GRAD",
    "WITH_STATS",
    "Z_MAX",
    "Kernels",
    "LossSpec",
    "Operator",
    "Operators",
    "attach",
    "attach_logit_gradient",
    "attach_sample_weight",
    "attach_target",
    "bad_label",
    "check_labels",
    "flags",
    "graph_is_kept",
    "is_learned",
    "kernels_can_report",
    "lanes_of_a_row",
    "masked_inputs",
    "masked_target",
    "needs_attaching",
    "refuse_export",
    "refuse_update",
    "report_of_kernels",
    "reported_labels",
    "robust_weights",
    "serving",
    "stack_sample_stats",
    "transformed",
    "translated",
    "weights_of",
]
