"""What somebody does with the installed wheel, in a bare environment. tests/wheel/test_environments.py runs it there.

    python smoke.py CHECKPOINT        # prints one JSON line with what was found

It needs torch and absgd_fast alone: no pytest, no numpy. It fails at once where something opens a connection, or a file of the
package for writing.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings

PREFIX = os.path.realpath(sys.prefix)


def watch(event, arguments):
    """Stops at what the package must not do, wherever it is called from."""
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"offline: {event} {arguments}")
    if event == "open" and isinstance(arguments[0], str) and any(mode in (arguments[1] or "") for mode in "wax+"):
        folder = os.path.join(PREFIX, "lib")
        assert not os.path.realpath(arguments[0]).startswith(folder), f"{arguments[0]} is opened for writing"


def main(checkpoint):
    sys.dont_write_bytecode = True  # that Python writes __pycache__ is not the package's doing
    sys.addaudithook(watch)
    warnings.filterwarnings("error", message=".*absgd_fast.*")  # that kernels are missing is said in a warning
    import torch

    import absgd_fast as ab
    from absgd_fast import _backend, selftest

    assert os.path.realpath(ab.__file__).startswith(PREFIX), ab.__file__
    for missing in ("numpy", "triton"):
        assert importlib.util.find_spec(missing) is None, f"{missing} is here, so nothing shows that the package works without it"
    found = _backend.report()
    assert found["backends"]["cpu"]["available"], found
    assert found["selected for CPU tensors"] == "cpu"
    outcomes = list(selftest.run())
    failures = [sentence for o in outcomes for sentence in o.sentences()]
    assert not failures, failures
    ran = {o.where.split(",")[0] for o in outcomes if o.checks}
    assert ran == {"reference", "cpu"} and all(o.checks > 90 for o in outcomes if not o.not_run), outcomes
    train(torch, ab, checkpoint)
    command_line()
    found["checks"] = sum(o.checks for o in outcomes)
    print(json.dumps(found))


def train(torch, ab, checkpoint):
    """The training loop of the README: it learns, and continues exactly after a checkpoint that torch loads with weights_only."""

    def parts():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        criterion = ab.ABLoss(lam=float("inf"))
        optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = ab.Ramp(criterion, lam=-0.5, length=4)
        return {"model": model, "criterion": criterion, "optimizer": optimizer, "schedule": schedule}

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    y = (x @ torch.randn(8, 4, generator=generator)).argmax(1)

    def epochs(training, count):
        means = []
        for _ in range(count):
            for batch in range(0, 256, 64):
                training["optimizer"].zero_grad()
                training["criterion"](training["model"](x[batch : batch + 64]), y[batch : batch + 64]).backward()
                training["optimizer"].step()
            training["schedule"].step()
            means.append(float(training["criterion"].last.mean_loss))
        return means

    training = parts()
    means = epochs(training, 6)
    assert means[-1] < 0.7 * means[0], means
    torch.save({name: part.state_dict() for name, part in training.items()}, checkpoint)
    resumed, saved = parts(), torch.load(checkpoint, weights_only=True)
    for name, part in resumed.items():
        part.load_state_dict(saved[name])
    assert epochs(resumed, 3) == epochs(training, 3)
    assert all(torch.equal(a, b) for a, b in zip(resumed["model"].parameters(), training["model"].parameters()))


def command_line():
    """`doctor` answers, and what needs the extra of the experiments says so."""
    program = [os.path.join(sys.prefix, "bin", "absgd-fast")]
    answer = subprocess.run([*program, "doctor", "--json"], capture_output=True, text=True)
    assert answer.returncode == 0 and json.loads(answer.stdout)["backends"]["cpu"]["available"], answer.stderr
    refused = subprocess.run([*program, "train", "--dataset", "digits"], capture_output=True, text=True)
    assert refused.returncode == 2 and "absgd_fast[experiments]" in refused.stderr, (refused.returncode, refused.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
