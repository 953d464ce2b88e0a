"""Every operator once against float64, in one process: what to run first on a machine whose GPU has not seen these kernels.

    python tests/gpu_smoke.py --device cuda --out FILE.jsonl [--backends cuda,triton,reference]

Before each operator a line with the status "begun" is written out, afterwards one with its result: after a crash the last line
names the operator that was running, and without a file the imports crashed. Exit code 0: every operator passed. 1: some did not,
yet the device computes, and other tests can tell more. 3: the device cannot be used (any more), and nothing else was tried.
"""

import argparse
import faulthandler
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    tests = Path(__file__).resolve().parent
    sys.path[:0] = [str(tests), str(tests.parent)]

import gpu_cases as cases
import gpu_runner as runner
import oracle
import target_cases
import test_gpu_graphs as graphs
import test_gpu_losses as losses
import test_gpu_robust as robust
import test_gpu_steps as stepping
import test_gpu_training as training
import torch
from gpu_trainings import LOOPS, MICRO

import absgd_fast as ab
from absgd_fast import _backend, ops

FP32 = torch.float32


# ---- operators ---------------------------------------------------------------------------------------------------------


def torch_alone(where):
    """A failure here is the machine's and not ours."""
    x = torch.arange(64).view(8, 8)
    assert torch.equal((x.float().to(where.device) @ x.float().to(where.device)).cpu().long(), x @ x)


def logit_loss(where, loss, path, dtype=FP32):
    p = cases.problem(cases.PATHS[path], dtype, 3, 2.0, loss)
    losses.check_losses(where, where.fused(loss, p.logits.shape[1], dtype), p, dtype, loss, cancels=loss in cases.CANCELS)


def robust_logit_loss(where, loss, path, dtype=FP32):
    p = cases.problem(cases.PATHS[path], dtype, 3, 2.0, loss)
    criterion = where.criterion(loss, p.logits.shape[1], dtype, lam=-0.75)
    x, target = where.leaf(p.logits), p.target.to(where.device)
    cases.check_robust(criterion, oracle.ABLoss(-0.75), x, target, p, dtype, cancels=loss in cases.CANCELS)


def scale(where, in_place):
    """A gradient times one number and times one number for each row."""
    for upstream in (torch.tensor(-3.0), torch.linspace(-1, 2, 7)):
        grad = torch.linspace(-2, 5, 7 * 30).view(7, 30)
        exact = grad.double() * (upstream.double().unsqueeze(1) if upstream.dim() else upstream.double())
        got, upstream = grad.to(where.device), upstream.to(where.device)
        if in_place:
            ops.OPERATORS[where.backend].scale_(got, upstream)
        else:
            got = ops.OPERATORS[where.backend].scale(got, upstream, False)
        cases.close(got, exact.numpy(), FP32, "scaled gradient")


def steps(where, rule, by_lists):
    with patch.object(_backend, "host", (lambda: None) if by_lists else _backend.host):
        stepping.check_steps(where, rule, FP32)


CE = {
    "torch alone": torch_alone,
    "logit_loss": partial(logit_loss, loss="ce", path="lanes"),
    "robust_logit_loss, one block": partial(robust_logit_loss, loss="ce", path="one block"),
    "robust_logit_loss, statistics": partial(robust_logit_loss, loss="ce", path="a block a row"),
    "robust_logit_loss, many rows": partial(robust_logit_loss, loss="ce", path="many rows"),
}
STEPS = {"sgd": (ab.ABSGD, torch.optim.SGD, dict(lr=2**-6, momentum=0.9))} | stepping.OPTIMIZERS
OPERATORS = (
    CE
    | {
        "logit_loss, columns": partial(logit_loss, loss="ce", path="columns"),
        "robust_logit_loss, bfloat16": partial(robust_logit_loss, loss="ce", path="lanes", dtype=torch.bfloat16),
    }
    | {f"logit_loss, {loss}": partial(logit_loss, loss=loss, path="lanes") for loss in cases.LOSSES if loss != "ce"}
    | {f"robust_logit_loss, {loss}": partial(robust_logit_loss, loss=loss, path="lanes") for loss in cases.LOSSES if loss != "ce"}
    | {
        "soft targets": partial(losses.test_soft_targets, loss="weight, smoothing", dtype=FP32, path=cases.PATHS["lanes"]),
        "soft targets, class vectors": partial(losses.test_soft_targets, loss="vs", dtype=FP32, path=cases.PATHS["one block"]),
        "robust_loss": partial(robust.test_robust_loss_of_given_losses, dtype=FP32, rule=robust.ROBUST["default"]),
        "robust_loss, target": partial(robust.test_target_of_losses, batch=target_cases.normal, dtype=FP32),
        "robust_logit_loss, target, one block": partial(robust.test_target_of_logits, dtype=FP32, shape=cases.HELD),
        "robust_logit_loss, target, statistics": partial(robust.test_target_of_logits, dtype=FP32, shape=cases.BEYOND),
        "robust_weights, robust_weights_backward": partial(robust.check_weights, count=1000),
        "robust_weights, many losses": partial(robust.check_weights, count=cases.ONE_LAUNCH + 617),
        "robust_partial_stats, robust_settle, robust_apply": partial(
            robust.test_three_stages, sizes=robust.SIZES_OF_PARTS["uneven"], options={}, dtype=FP32
        ),
        "rectified": partial(robust.test_rectified_weights, dtype="fp32"),
        "scale": partial(scale, in_place=False),
        "scale_": partial(scale, in_place=True),
    }
    | {f"step_, {name}, StepPlan": partial(steps, rule=rule, by_lists=False) for name, rule in STEPS.items()}
    | {f"step_, {name}, lists": partial(steps, rule=rule, by_lists=True) for name, rule in STEPS.items()}
    | {
        "weighted_step_": lambda where: stepping.Weighted(where, [0, 1, 5, 64, 650], 37, FP32).check(weight_decay=0.01),
        "deferred, finish_": partial(training.test_deferred, way=training.SGDS["finish_"], sizes=MICRO["uneven"]),
        "deferred, robust=": partial(training.test_deferred, way=training.SGDS["robust="], sizes=MICRO["uneven"]),
        "LinearABLoss": partial(training.test_linear, loss="ce", dtype=FP32, bias=True),
        "LinearABLoss, bfloat16": partial(training.test_linear, loss="ce", dtype=torch.bfloat16, bias=False),
        "rule": partial(training.test_rules_from_losses_to_weights, rule="cvar", shape=(37, 5)),
        "graph": partial(graphs.test_graph_replay, shape=LOOPS[1], optimizer=ab.ABSGD),
        "label out of range": partial(losses.test_label_out_of_range, shape=cases.HELD, label="one too many"),
    }
)
OF_KERNELS = ("scale", "scale_")  # plain torch has no such operators


def chosen(where):
    """{name: function} of the operators to try; Triton's, which take a second each to compile, for cross-entropy only."""
    if where.backend == "triton":
        return CE
    left_out = (*OF_KERNELS, *["graph"] * where.gpu) if where.backend == "reference" else ()  # nor does it promise graphs
    return {name: function for name, function in OPERATORS.items() if name not in left_out}


UNUSABLE = 3  # 1 is also what Python says of an exception, 2 what it says of arguments that it does not know


# ---- the run -----------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser("gpu_smoke.py", description="Every operator once, in one process.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", help="with commas; default: all of the device")
    parser.add_argument("--out", type=Path, required=True, help="where the lines go, as JSON")
    options = parser.parse_args(argv)
    known = {where.backend: where for where in cases.CPU + cases.GPU if where.device.type == options.device}
    backends = options.backends.split(",") if options.backends else list(known)
    if not set(backends) <= set(known):
        parser.error(f"--backends: got {options.backends!r}, expected some of {', '.join(known)}")
    statuses, usable = [], options.device == "cpu" or torch.cuda.is_available()
    with options.out.open("w") as out:

        def write(operator, backend, status, message="", seconds=0):
            line = dict(operator=operator, backend=backend, status=status, message=message, seconds=seconds)
            print(json.dumps(line), file=out, flush=True)
            if status == "begun":
                return
            statuses.append(status)
            if status != "passed":
                print(f"{status}: {operator} ({backend}): {message}", flush=True)

        for backend in backends:
            where = known[backend]
            reason = where.why_not()
            for operator, function in chosen(where).items():
                if reason or not usable:
                    write(operator, backend, "not run", reason or "the CUDA context was lost")
                    continue
                write(operator, backend, "begun")
                result = runner.attempt(operator, function, {"where": where})
                usable = result["usable"]
                write(operator, backend, *(result[key] for key in ("status", "message", "seconds")))
    print(f"{statuses.count('passed')} of {len(statuses)} operators passed")
    if not usable:
        return UNUSABLE
    return 0 if statuses and set(statuses) == {"passed"} else 1


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
