"""The procedure of the benchmark: check, time, report.

    absgd-fast bench [--suite loss|family|step|clip|weighted|linear|train|all|gpu|gpu-probe] [--out FILE.json]
    absgd-fast bench --compare OLD.json NEW.json        measures nothing: which ratios moved (changes.py)

Every competitor's result is checked against the float64 oracle before it is timed. A competitor with a wrong result is left
out, and the report says why. If our result is wrong, nothing is reported. Then come rounds (timing.py). In each round every
competitor runs one block of calls. The report has the medians and quartiles over the rounds of the times and of the ratios of
our time to theirs. It shows the cases in which we are slower like those in which we are faster. A ratio that varies too much
(verdict.py) can neither meet nor miss its target. Compare timings only within one run.

The JSON (quartiles are {"median", "q1", "q3"} over the rounds):

    date, hardware {cpu, cores, backend, instruction_set}, versions {python, torch, absgd_fast, absgd}, compiler, threads,
    load_at_start, seconds_per_case
    quiet       whether the machine was quiet before the first case (quiet.py)
    results     one object per case: suite, case, rounds, tolerance; peers {name: {us: quartiles, error: distance from float64,
                and for competitors ratio: quartiles of ours / theirs; spread of the ratio; target; met: null if there is no
                target or if the spread is above 0.1, which the report calls "too noisy"}}; absent {name: why it was left out}.
                If the case has targets of memory, every peer has peak_bytes, the largest memory of a call (null where the
                system does not tell it), and competitors have memory {ratio: of ours to theirs, target, met}.
                For suite memory: peers {name: {measure: value}}, targets, met.

The suites gpu (all cases of gpu_cases in cases.py) and gpu-probe (a few of them) measure with device.py and add:

    gpu         name, memory, multiprocessors, capability, cache, driver, cuda, nvcc, and the state at the start; `versions` also
                has triton and Liger
    copy        a copy of `numbers` float32 from device to device: bytes read and written per µs, bytes_per_us (quartiles)
    results     for each case also:
                bytes          the bytes that forward and backward, or the step, have to move
                wrong          the reason why our result does not count; then there are no peers
                seconds        the time of the whole case
                and for each peer (us is by the device's clock, for many calls in a row):
                host_us        quartiles of the time in which a call returns
                graph_us       quartiles of the time of a replay of the captured call, if the data fit into the cache;
                               or graph_failed, the reason
                launches       {part: [names of kernels]}
                share          quartiles of the bandwidth as a fraction of the copy's
                peak_bytes     if the case asks for memory
                note           a remark for the reader
    figures     the figures to reach: case, figure, value, least, most, met; of a ratio of times also its spread, as above
    not_measured  the cases that were not measured because time ran out or because the benchmark was killed
"""

import argparse
import importlib.util
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from absgd_fast import _backend

from . import BEGUN, changes, gpu_report, quiet
from .cases import CASES, gpu_cases
from .on_gpu import GPU_SUITES, gpu_environment, measure_gpu, prepare
from .one_case import compare, weigh
from .peer import LeftOut
from .record import environment, version_of, write
from .tables import changes_table, memory_table, summary, time_table
from .timing import CPU

SUITES = {
    "loss": ("loss", "target", "memory"),
    "step": ("step", "clip", "rules"),
    "train": ("train", "language model"),
    "family": ("family",),
    "clip": ("clip",),
    "weighted": ("weighted",),
    "linear": ("linear",),
    "all": ("loss", "target", "family", "memory", "step", "clip", "rules", "weighted", "linear", "train", "language model"),
}
QUIET_ON_GPU = 0.3  # seconds: a machine with a GPU is lent for minutes


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")  # argparse itself would first print the usage


def _file(text):
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file that can be written")
    return path


def _positive(kind):
    def parse(text):
        try:
            value = kind(text)
            if 0 < value < float("inf"):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {'a whole' if kind is int else 'a'} number > 0")

    return parse


def _parser():
    parser = _Parser("absgd-fast bench", description="Time the kernels against their competitors.", allow_abbrev=False)
    suites = [*SUITES, *GPU_SUITES]
    parser.add_argument(
        "--suite",
        choices=suites,
        default="all",
        help="the cases to time (default: all on the CPU, half an hour, most of it for linear)",
    )
    parser.add_argument("--out", type=_file, metavar="FILE.json", help="also write the results to this file")
    parser.add_argument("--threads", type=_positive(int), default=2, help="number of CPU threads (default: 2)")
    parser.add_argument("--seconds", type=_positive(float), help="approximate time per case (default: 5; on a GPU 2.5)")
    parser.add_argument(
        "--limit", type=_positive(float), default=600.0, help="suites gpu: time of the whole run in seconds (default: 600)"
    )
    parser.add_argument("--rehearse", action="store_true", help="suites gpu: try a few tiny cases on the CPU")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD.json", "NEW.json"),
        help="measure nothing, but say which ratios moved between two records; the exit code is 1 if ours got slower",
    )
    parser.add_argument("--prepare", action="store_true", help="suites gpu: compile everything, measure nothing")
    return parser


def measure(suites, seconds, console):
    """Runs the cases of some suites, and prints the table of each when it is complete. Returns a list of dicts ready for JSON."""
    done = []
    for suite in suites:
        look, table = (weigh, memory_table) if suite == "memory" else (lambda case: compare(case, seconds), time_table)
        results = []
        for case in (case for case in CASES if case.suite == suite):
            with console.status(f"{suite}: {case.name}"):
                results.append(look(case))
        console.print(table(results))
        done += results
    return done


def main(argv=None, begun=None):
    """Runs the command. Returns 0, or 1 if our result is wrong or got slower (--compare). Exits with 2 for bad arguments.

    begun: the time (perf_counter) from which --limit counts, by default now.
    """
    begun = perf_counter() if begun is None else begun
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return _main_compare(arguments, parser)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with warnings.catch_warnings():
            # They do, because the cases weigh random logits strongly.
            warnings.filterwarnings("ignore", message="ABLoss: the weights have collapsed")
            if arguments.suite in GPU_SUITES:
                return _main_gpu(arguments, parser, begun + arguments.limit)
            return _main_cpu(arguments, parser)
    finally:
        torch.set_num_threads(before)


def _console(parser):
    if importlib.util.find_spec("rich") is None:
        parser.error('bench needs rich: pip install "absgd_fast[test]"')
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)  # a file can have any width


def _main_compare(arguments, parser):
    others = [name for name, value in vars(arguments).items() if name != "compare" and value != parser.get_default(name)]
    if others:
        parser.error(f"--compare measures nothing, so it takes no --{others[0]}")
    console = _console(parser)
    try:
        old, new = map(changes.read, arguments.compare)
    except changes.NotARecord as refusal:
        parser.error(str(refusal))
    found = changes.changes(old, new)
    if not found:
        parser.error("the two records have no ratio in common: they are of other suites or cases")
    moved = [change for change in found if change.moved]
    if moved:
        console.print(changes_table(moved))
    console.print("\n".join(changes.lines(old, new)), markup=False)
    return 1 if changes.slower(found) else 0


def _main_cpu(arguments, parser):
    arguments.seconds = arguments.seconds or 5.0
    console = _console(parser)
    try:
        report = environment() | {"seconds_per_case": arguments.seconds}
        report["quiet"] = quiet.look()
        console.print(quiet.sentence(report["quiet"]), markup=False)
        results = measure(SUITES[arguments.suite], arguments.seconds, console)
    except LeftOut as wrong:
        print(f"{parser.prog}: {wrong}", file=sys.stderr)
        return 1
    console.print("\n".join(summary(results)), markup=False)
    if arguments.out:
        write(report | {"results": results}, arguments.out)
        console.print(f"written: {arguments.out}", soft_wrap=True, markup=False)
    return 0


def _main_gpu(arguments, parser, end):
    """Prints plain text only, because a machine with a GPU may not have rich."""
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.error(
            f"--suite gpu needs a CUDA GPU: {_backend.why_not('cuda')}; use --rehearse to try a few tiny cases on the CPU"
        )
    device = CPU if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    here, seconds, tiny = gpu_environment(device), arguments.seconds or 2.5, arguments.rehearse
    cases = GPU_SUITES[arguments.suite](gpu_cases(device, here["name"], tiny))
    if arguments.prepare:
        jobs = 1 if tiny else min(14, os.cpu_count() or 1)
        print(*prepare(len(cases), arguments.suite, device, tiny, jobs), sep="\n")
        return 0
    report = environment() | {"seconds_per_case": seconds, "gpu": here}
    report["hardware"]["backend"] = report["hardware"]["backend"] if device == CPU else _backend.select(device)
    report["versions"] |= {"triton": version_of("triton"), "liger-kernel": version_of("liger-kernel")}
    report["quiet"] = quiet.look(QUIET_ON_GPU)
    print(quiet.sentence(report["quiet"]))
    report |= {"copy": None, "results": [], "figures": [], "not_measured": []}
    keep = partial(write, report, arguments.out) if arguments.out else lambda: None
    right = measure_gpu(report, cases, device, seconds, end, keep)
    print("\n".join(gpu_report.lines(report)))
    if arguments.out:
        print(f"written: {arguments.out}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
