"""What is checked, timed and reported:
`absgd-fast bench [--suite loss|family|step|weighted|train|all|gpu|gpu-probe] [--out FILE.json]`.

Every competitor's result is checked against the float64 oracle before it is timed; who is wrong is left out with the
reason, and if ours is wrong nothing is reported. Then come rounds (timing.py): in each, every competitor runs one block of calls.
Reported are medians and quartiles over the rounds of the times and of the ratios, ours over theirs, and the cases we lose like
the ones we win.

Timings compare only within one run.

The JSON. Quartiles are {"median", "q1", "q3"} over the rounds.

    date, hardware {cpu, cores, backend, instruction_set}, versions {python, torch, absgd_fast, absgd}, compiler, threads,
    load_at_start, seconds_per_case
    results     one object per case: suite, case, rounds, tolerance; peers {name: {us: quartiles, error: distance from float64,
                and for competitors ratio: quartiles of ours / theirs, target, met}}; absent {name: why it was left out}.
                For suite memory: peers {name: {measure: value}}, targets, met.

Suite gpu (of all its cases gpu_cases in cases.py tells, gpu-probe is a few of them; it is measured in device.py) adds

    gpu         name, memory, multiprocessors, capability, cache, driver, cuda, nvcc, state at the start; versions of triton
                and Liger among the versions
    copy        what a copy of `numbers` float32 from device to device moved, read and written, in bytes_per_us (quartiles)
    results     also bytes: what forward and backward or the step have to move; per peer host_us (quartiles: µs in which a call
                returns), graph_us (quartiles: µs of a replay of the captured call, for what fits the cache) or graph_failed,
                launches {part: [kernels]}, share (quartiles: of the copy's bytes_per_us), peak_bytes (where a case asks for
                memory), note. us is by the device's clock, many calls in a row. wrong: why ours counts for nothing here (and peers are
                missing). seconds: what the case took in all.
    figures     what was to be reached: case, figure, value, least, most, met
    not_measured  cases for which there was no time, those that were still to come when the benchmark was killed among them
"""

import argparse
import ctypes
import datetime
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

from absgd_fast import _backend

from . import BEGUN, gpu_report
from .cases import CASES, IN_CACHE, gpu_cases, gpu_probe
from .device import captured, copy_ns, kernels, peak_allocated, synchronize
from .peers import OURS, OURS_ON_TRITON, PEERS, LeftOut, import_compilers, ready
from .timing import host_us, interleave, quartiles, ratios

SUITES = {
    "loss": ("loss", "memory"),
    "step": ("step", "rules"),
    "train": ("train",),
    "family": ("family",),
    "weighted": ("weighted",),
    "all": ("loss", "family", "memory", "step", "rules", "weighted", "train"),
}
GPU_SUITES = {"gpu": lambda cases: cases, "gpu-probe": gpu_probe}
CPU = torch.device("cpu")
GROWTH_STEPS = 5000
BUDGET = 15.0  # s: who is not ready by then is left out of a GPU's case; nothing is imported in them (import_compilers)


# ---- time ------------------------------------------------------------------------------------------------------------


def taking_part(case):
    """{name: factory}"""
    return {name: factory for name, factory in PEERS[case.suite].items() if case.peers is None or name in case.peers}


def gather(case, data, look, make_ready=ready):
    """({name: look(peer, error)} of those who are ready, {name: why not} of the others). LeftOut if ours is not."""
    found, absent = {}, {}
    for name, factory in taking_part(case).items():
        try:
            found[name] = look(*make_ready(factory, data))
        except LeftOut as reason:
            if name == OURS:
                raise LeftOut(f"{case.suite} {case.name}: {OURS}: {reason}") from reason
            absent[name] = str(reason)
    return found, absent


def compare(case, seconds):
    """One case, timed: a dict ready for JSON. Raises LeftOut if our result is wrong."""
    data = case.data()
    found, absent = gather(case, data, lambda peer, error: (peer.run, error))
    times = interleave({name: run for name, (run, _) in found.items()}, seconds)
    return _timed(case, data, times, {name: error for name, (_, error) in found.items()}, absent)


def _timed(case, data, times, errors, absent):
    ours, peers = times[OURS], {}
    for name, error in errors.items():
        peers[name] = {"us": quartiles(times[name]), "error": error}
        if name != OURS:
            ratio = ratios(ours, times[name])
            target = case.targets.get(name)
            peers[name] |= {"ratio": ratio, "target": target, "met": None if target is None else ratio["median"] <= target}
    return {
        "suite": case.suite,
        "case": case.name,
        "rounds": len(ours),
        "tolerance": data.tolerance,
        "peers": peers,
        "absent": absent,
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def heap():
    """Bytes in use in the C heap, where tensors and graphs live: exact, on Linux with glibc 2.33 or newer."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # struct mallinfo2

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd


def growth(peer):
    """Bytes that one step leaves behind in the heap."""
    after = []
    for _ in range(2):  # the first time, caches still fill
        for _ in range(GROWTH_STEPS):
            peer.run()
        after.append(heap())
    return (after[1] - after[0]) / GROWTH_STEPS


def _resident(field):
    """VmRSS or its highest value so far, VmHWM, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(run):
    """Most memory in use during a call beyond what was before; scratch of kernels included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would be used again unseen
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers the highest value to the present one
    run()
    return _resident("VmHWM") - before


def peak(peer, **options):
    """The same of forward and backward, in gradients."""
    peer.leaf.grad = None
    return peak_bytes(partial(peer.run, **options)) / (peer.leaf.numel() * peer.leaf.element_size())


def retained(peer):
    """The same while the graph is kept for another backward."""
    return peak(peer, retain_graph=True)


MEASURES = {"growth": growth, "peak": peak, "retained": retained}


def _attempt(measure, peer):
    try:
        return measure(peer)
    except (OSError, AttributeError, RuntimeError):  # not this system; torch.compile cannot retain a graph
        return None


def weigh(case):
    """One case, its memory measured: a dict ready for JSON."""
    data = case.data()
    measures = {name: MEASURES[name] for name in case.targets}
    peers, absent = gather(case, data, lambda peer, error: {name: _attempt(measure, peer) for name, measure in measures.items()})
    met = {name: None if peers[OURS][name] is None else peers[OURS][name] <= target for name, target in case.targets.items()}
    return {
        "suite": case.suite,
        "case": case.name,
        "peers": peers,
        "absent": absent,
        "targets": dict(case.targets),
        "met": met,
    }


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def _reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def tolerant(factory, data, end=float("inf")):
    """`ready` where anything may be missing or fail: it leaves one competitor out, with the reason."""
    if perf_counter() > end:
        raise LeftOut("no time was left for it")
    try:
        return ready(factory, data)
    except LeftOut:
        raise
    except Exception as error:
        raise LeftOut(_reason(error)) from error


def explore(case, seconds, everybody):
    """One case of a GPU: a dict ready for JSON. everybody: launches are counted for the competitors too."""
    start = perf_counter()
    data = case.data()
    in_time = partial(tolerant, end=start + BUDGET)
    found, absent = gather(case, data, lambda peer, error: (peer, error), in_time)
    data.forget()
    times = interleave({name: peer.run for name, (peer, _) in found.items()}, seconds, data.device)
    result = _timed(case, data, times, {name: error for name, (_, error) in found.items()}, absent) | {"bytes": data.moved}
    for name, (peer, _) in found.items():
        values = result["peers"][name]
        # few calls where they are long: the queue must not fill, nor the time pass
        values["host_us"] = quartiles(host_us(data.device, peer.run, *((20, 15) if values["us"]["median"] < 500 else (3, 5))))
        if peer.note:
            values["note"] = peer.note
        if case.memory:
            peer.forget()
            values["peak_bytes"] = peak_allocated(data.device, peer.run)
        if name in (OURS, OURS_ON_TRITON):
            values["launches"] = {part: _launched(data.device, prepare()) for part, prepare in peer.parts.items()}
        elif everybody:
            values["launches"] = {"all": _launched(data.device, peer.run)}
    if data.bytes < IN_CACHE:
        _add_graphs(result["peers"], {name: peer for name, (peer, _) in found.items()}, data.device, seconds / 2)
    return result | {"seconds": round(perf_counter() - start, 1)}


def _launched(device, run):
    """Names of kernels, or None where nobody could see them."""
    try:
        return kernels(device, run)
    except RuntimeError as unseen:
        print(unseen)
        return None


def _add_graphs(values, peers, device, seconds):
    """Times of replays, to the values of those whose call can be captured."""
    replays = {}
    for name, peer in peers.items():
        try:
            replays[name], _ = captured(device, peer.run)
        except Exception as error:  # a host that waits, an allocation, ...
            values[name]["graph_failed"] = _reason(error)
            synchronize(device)
    for name, times in interleave(replays, seconds, device).items() if replays else ():
        values[name]["graph_us"] = quartiles(times)


def _empty(device):
    """Memory that is not in use goes back, as far as the allocator can: what was measured must not be lost over it."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the allocator cannot be emptied: {_reason(error)}", flush=True)


def _numbers_to_copy(device):
    """float32: 1 GB of them, far more than a cache holds, where that leaves most of the memory free."""
    if device.type != "cuda":
        return 2**16
    return 2**28 if torch.cuda.mem_get_info(device)[0] > 2**33 else 2**24


def measure_gpu(report, cases, device, seconds, end, keep):
    """Fills report["results"] in place and keeps it after each case, until the clock shows `end`. Returns whether ours was right.

    A case is in report["not_measured"] until it is among the results."""
    numbers, first, right, copies = _numbers_to_copy(device), {}, True, []

    def copy():
        copies.extend(copy_ns(device, numbers))
        report["copy"] = {"numbers": numbers, "bytes_per_us": quartiles([8 * numbers / ns * 1e3 for ns in copies])}

    waiting = {case: f"{case.suite}: {case.name}" for case in cases}

    def note():
        report["not_measured"] = list(waiting.values())
        gpu_report.finish(report, cases)
        keep()

    if device.type == "cuda":
        import_compilers()
    copy()
    note()
    for case in cases:
        if perf_counter() + 2 * seconds > end:
            continue
        try:
            part = 0.25 if case.suite == "gpu limit" else 1  # many cases, one question
            result = explore(case, part * seconds, first.setdefault(case.suite, case) is case)
        except Exception as error:
            reason = str(error) if isinstance(error, LeftOut) else _reason(error)
            if "OutOfMemoryError" in reason or isinstance(error, ImportError):  # of what only this case needs
                waiting[case] += f": {reason}"
                note()
                _empty(device)
                continue
            result, right = {"suite": case.suite, "case": case.name, "wrong": reason}, False
        report["results"].append(result)
        del waiting[case]
        print(gpu_report.progress(result), flush=True)
        note()
        _empty(device)
    copy()
    note()
    return right


COMPILING = (OURS_ON_TRITON, "Liger", "torch.compile")


def compile_for(k, suite, device, tiny):
    """What the competitors of case k of a suite compile, into the caches on the disk. Returns what went wrong."""
    case, wrong, data = GPU_SUITES[suite](gpu_cases(device, tiny=tiny))[k], [], None
    for name in (name for name in COMPILING if name in taking_part(case)):
        try:
            data = data or case.data()
            PEERS[case.suite][name](data).run()
        except Exception as error:
            wrong.append(f"{case.suite}: {case.name}: {name}: {_reason(error)}")
    del data
    _empty(torch.device(device))  # others want the memory
    return wrong


def prepare(count, suite, device, tiny, jobs):
    """compile_for each of `count` cases, so that the benchmark need not wait. In `jobs` processes, for a compiler uses one core."""
    one = partial(compile_for, suite=suite, device=str(device), tiny=tiny)
    if jobs == 1:
        return [wrong for k in range(count) for wrong in one(k)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [wrong for found in pool.map(one, range(count)) for wrong in found]


def gpu_environment(device):
    """What a timing on this GPU depends on."""
    if device.type != "cuda":
        return {"name": "none: a rehearsal on the CPU"}
    found = torch.cuda.get_device_properties(device)
    state = "driver_version,pstate,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={state}", "--format=csv,noheader", f"--id=GPU-{found.uuid}"]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip().split(", ")
        state = dict(zip(state.split(","), seen))
    except (OSError, subprocess.SubprocessError, AttributeError):
        state = {}
    return {
        "name": found.name,
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cache": found.L2_cache_size,
        "driver": state.pop("driver_version", None),
        "cuda": torch.version.cuda,
        "nvcc": (_backend.build_info()["cuda"] or {}).get("nvcc"),
        "state": state,
    }


# ---- what is reported ------------------------------------------------------------------------------------------------


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment():
    """What a timing depends on; to be read before the first one, which is load itself."""
    here = _backend.report()
    versions = {"python": here["python"], "torch": here["torch"], "absgd_fast": here["version"], "absgd": _version("absgd")}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "backend": here["selected for CPU tensors"],
            "instruction_set": here["cpu"]["instruction set"],
        },
        "versions": versions,
        "compiler": here["build"]["compiler"],
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _with_quartiles(values, text):
    return f"{text(values['median'])} ({text(values['q1'])}–{text(values['q3'])})"


def _ratio(value):
    return f"{value:.2f}"


def _time(us):
    unit, scale = (" µs", 1) if us["median"] < 999.5 else (" ms", 1e3)
    return _with_quartiles(us, lambda value: f"{value / scale:.{3 if value < 999.5 * scale else 4}g}") + unit


def _verdict(met, lost=False):
    return {True: "[green]met[/]", False: "[bold red]missed[/]", None: "[yellow]slower[/]" if lost else ""}[met]


def _table(title, columns):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "competitor", "measure", "") else "right")
    return table


def time_table(results):
    """Rich table of compare's results: a competitor per line, missed targets and lost cases marked."""
    table = _table(
        f"{results[0]['suite']}: medians (quartiles); error against float64",
        ("case", "competitor", "time", "error", "ours / theirs", "target", ""),
    )
    for result in results:
        for name, peer in result["peers"].items():
            line = [result["case"] if name == OURS else "", name, _time(peer["us"]), f"{peer['error']:.0e}"]
            if "ratio" in peer:
                ratio, target = peer["ratio"], peer["target"]
                line += [_with_quartiles(ratio, _ratio), "" if target is None else f"≤ {target:g}"]
                line += [_verdict(peer["met"], lost=ratio["median"] > 1)]
            table.add_row(*line)
        for name in result["absent"]:
            table.add_row("", name, "left out")
        table.add_section()
    return table


UNITS = {"growth": "bytes kept per step", "peak": "peak, in gradients", "retained": "peak, graph kept"}


def memory_table(results):
    """Rich table of weigh's results."""
    table = _table("memory of forward and backward", ("case", "competitor", "measure", "value", "target", ""))
    for result in results:
        for name, values in result["peers"].items():
            for measure, value in values.items():
                line = [result["case"], name, UNITS[measure], "–" if value is None else f"{value:.2f}"]
                if name == OURS:
                    line += [f"≤ {result['targets'][measure]:g}", _verdict(result["met"][measure])]
                table.add_row(*line)
        table.add_section()
    return table


def summary(results):
    """Lines to end with: how many targets were met; which were missed, where we are slower, who was left out."""
    met, lines = 0, []
    for result in results:
        place = f"{result['suite']} {result['case']}"
        if result["suite"] == "memory":
            verdicts = {name: (verdict, False) for name, verdict in result["met"].items()}
        else:
            peers = {name: peer for name, peer in result["peers"].items() if name != OURS}
            verdicts = {name: (peer["met"], peer["ratio"]["median"] > 1) for name, peer in peers.items()}
        for name, (verdict, slower) in verdicts.items():
            met += verdict is True
            if verdict is False or slower:
                lines.append(f"{'missed' if verdict is False else 'slower'}: {place}, {name}")
        lines += [f"left out: {place}, {name}: {reason}" for name, reason in result["absent"].items()]
    missed = sum(line.startswith("missed") for line in lines)
    return [f"{met} of {met + missed} targets met", *lines]


def write(report, path):
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- the command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")  # argparse would print the usage first


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
    parser = _Parser("absgd-fast bench", description="Time the kernels against their peers.", allow_abbrev=False)
    suites = [*SUITES, *GPU_SUITES]
    parser.add_argument("--suite", choices=suites, default="all", help="what to time (default: all of a CPU, four minutes)")
    parser.add_argument("--out", type=_file, metavar="FILE.json", help="where the results go, beside the screen")
    parser.add_argument("--threads", type=_positive(int), default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=_positive(float), help="of timing per case, about (default: 5; on a GPU 2.5)")
    parser.add_argument("--limit", type=_positive(float), default=600.0, help="suites gpu: seconds in all (default: 600)")
    parser.add_argument("--rehearse", action="store_true", help="suites gpu: a few tiny cases, on the CPU")
    parser.add_argument("--prepare", action="store_true", help="suites gpu: compile what has to be, measure nothing")
    return parser


def measure(suites, seconds, console):
    """Runs the cases of some suites, printing each table when it is full; list of dicts ready for JSON."""
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
    """Runs the command; returns 0, 1 if our result is wrong, or leaves with 2 for bad arguments. begun: what --limit counts from,
    by default now."""
    begun = perf_counter() if begun is None else begun
    parser = _parser()
    arguments = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.suite in GPU_SUITES:
            return _main_gpu(arguments, parser, begun + arguments.limit)
        return _main_cpu(arguments, parser)
    finally:
        torch.set_num_threads(before)


def _main_cpu(arguments, parser):
    arguments.seconds = arguments.seconds or 5.0
    if importlib.util.find_spec("rich") is None:
        parser.error('bench needs rich: pip install "absgd_fast[test]"')
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # a file takes any width
    try:
        report = environment() | {"seconds_per_case": arguments.seconds}
        if (report["load_at_start"] or 0) > 0.5:
            load = f"{report['load_at_start']:.1f}"
            console.print(f"the machine is busy (load {load}): expect other ratios than on a quiet one")
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
    """Plain text only: a machine with a GPU may have no rich."""
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.error(f"--suite gpu needs a CUDA GPU: {_backend.why_not('cuda')}; --rehearse tries a few tiny cases on the CPU")
    device = CPU if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    here, seconds, tiny = gpu_environment(device), arguments.seconds or 2.5, arguments.rehearse
    cases = GPU_SUITES[arguments.suite](gpu_cases(device, here["name"], tiny))
    if arguments.prepare:
        jobs = 1 if tiny else min(14, os.cpu_count() or 1)
        print(*prepare(len(cases), arguments.suite, device, tiny, jobs), sep="\n")
        return 0
    report = environment() | {"seconds_per_case": seconds, "gpu": here}
    report["hardware"]["backend"] = report["hardware"]["backend"] if device == CPU else _backend.select(device)
    report["versions"] |= {"triton": _version("triton"), "liger-kernel": _version("liger-kernel")}
    report |= {"copy": None, "results": [], "figures": [], "not_measured": []}
    keep = partial(write, report, arguments.out) if arguments.out else lambda: None
    right = measure_gpu(report, cases, device, seconds, end, keep)
    print("\n".join(gpu_report.lines(report)))
    if arguments.out:
        print(f"written: {arguments.out}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
