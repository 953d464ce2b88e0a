"""The procedure of the benchmark: check, time, report.

    absgd-fast bench [--suite loss|family|step|weighted|train|all|gpu|gpu-probe] [--out FILE.json]

Every competitor's result is checked against the float64 oracle before it is timed. A competitor with a wrong result is left
out, and the report says why. If our result is wrong, nothing is reported. Then come rounds (timing.py). In each round every
competitor runs one block of calls. The report has the medians and quartiles over the rounds of the times and of the ratios of
our time to theirs. It shows the cases in which we are slower like those in which we are faster. Compare timings only within one
run.

The JSON (quartiles are {"median", "q1", "q3"} over the rounds):

    date, hardware {cpu, cores, backend, instruction_set}, versions {python, torch, absgd_fast, absgd}, compiler, threads,
    load_at_start, seconds_per_case
    results     one object per case: suite, case, rounds, tolerance; peers {name: {us: quartiles, error: distance from float64,
                and for competitors ratio: quartiles of ours / theirs, target, met}}; absent {name: why it was left out}.
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
    figures     the figures to reach: case, figure, value, least, most, met
    not_measured  the cases that were not measured because time ran out or because the benchmark was killed
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
    "loss": ("loss", "target", "memory"),
    "step": ("step", "clip", "rules"),
    "train": ("train",),
    "family": ("family",),
    "clip": ("clip",),
    "weighted": ("weighted",),
    "all": ("loss", "target", "family", "memory", "step", "clip", "rules", "weighted", "train"),
}
GPU_SUITES = {"gpu": lambda cases: cases, "gpu-probe": gpu_probe}
CPU = torch.device("cpu")
GROWTH_STEPS = 5000
# seconds: a competitor that is not ready by then is left out of a case on a GPU; imports come before (import_compilers)
BUDGET = 15.0


# ---- time ------------------------------------------------------------------------------------------------------------


def taking_part(case):
    """{name: factory} of those that take part in the case."""
    return {name: factory for name, factory in PEERS[case.suite].items() if case.peers is None or name in case.peers}


def gather(case, data, look, make_ready=ready):
    """({name: look(peer, error)} of those that are ready, {name: reason} of the others). Raises LeftOut if ours is not ready."""
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
    """Times one case. Returns a dict ready for JSON. Raises LeftOut if our result is wrong."""
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
    """The exact number of bytes in use in the C heap, which holds tensors and graphs. It needs Linux with glibc 2.33 or newer."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # struct mallinfo2

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd


def growth(peer):
    """The number of bytes that one step leaves behind in the heap."""
    after = []
    for _ in range(2):  # in the first pass, caches still grow
        for _ in range(GROWTH_STEPS):
            peer.run()
        after.append(heap())
    return (after[1] - after[0]) / GROWTH_STEPS


def _resident(field):
    """A field of /proc/self/status in bytes: VmRSS, the resident memory, or VmHWM, its highest value so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(run):
    """The largest memory in use during a call, less the memory in use before it. It includes the scratch memory of kernels."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident could be used again and would not be counted
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present value
    run()
    return _resident("VmHWM") - before


def peak(peer, **options):
    """The peak memory of forward and backward, as a multiple of the gradient's size."""
    peer.leaf.grad = None
    return peak_bytes(partial(peer.run, **options)) / (peer.leaf.numel() * peer.leaf.element_size())


def retained(peer):
    """The same as peak(), while the graph is kept for another backward."""
    return peak(peer, retain_graph=True)


MEASURES = {"growth": growth, "peak": peak, "retained": retained}


def _attempt(measure, peer):
    try:
        return measure(peer)
    except (OSError, AttributeError, RuntimeError):  # not this system; torch.compile cannot retain a graph
        return None


def weigh(case):
    """Measures the memory of one case. Returns a dict ready for JSON."""
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
    """`ready` for a machine on which anything may be missing or fail. Every error leaves out one competitor, with the reason."""
    if perf_counter() > end:
        raise LeftOut("no time was left for it")
    try:
        return ready(factory, data)
    except LeftOut:
        raise
    except Exception as error:
        raise LeftOut(_reason(error)) from error


def explore(case, seconds, everybody):
    """Measures one case of a GPU. Returns a dict ready for JSON. everybody: whether to count the competitors' launches too."""
    start = perf_counter()
    data = case.data()
    in_time = partial(tolerant, end=start + BUDGET)
    found, absent = gather(case, data, lambda peer, error: (peer, error), in_time)
    data.forget()
    times = interleave({name: peer.run for name, (peer, _) in found.items()}, seconds, data.device)
    result = _timed(case, data, times, {name: error for name, (_, error) in found.items()}, absent) | {"bytes": data.moved}
    for name, (peer, _) in found.items():
        values = result["peers"][name]
        # fewer calls if they are long, because the queue must not fill and time is short
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
    """The names of the launched kernels, or None if the profiler did not see them."""
    try:
        return kernels(device, run)
    except RuntimeError as unseen:
        print(unseen)
        return None


def _add_graphs(values, peers, device, seconds):
    """Adds the times of replays to the values of those whose call can be captured."""
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
    """Frees unused memory as far as the allocator can. An error is printed only, so it cannot lose what was measured."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the allocator cannot be emptied: {_reason(error)}", flush=True)


def _numbers_to_copy(device):
    """The number of float32 to copy: 1 GB of them, far more than a cache holds, if that leaves most of the memory free."""
    if device.type != "cuda":
        return 2**16
    return 2**28 if torch.cuda.mem_get_info(device)[0] > 2**33 else 2**24


def measure_gpu(report, cases, device, seconds, end, keep):
    """Fills report["results"] in place until the clock shows `end`, and calls keep() after each case.

    A case is in report["not_measured"] until it is among the results. Returns whether all our results were right.
    """
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
            part = 0.25 if case.suite == "gpu limit" else 1  # many cases answer one question
            result = explore(case, part * seconds, first.setdefault(case.suite, case) is case)
        except Exception as error:
            reason = str(error) if isinstance(error, LeftOut) else _reason(error)
            if "OutOfMemoryError" in reason or isinstance(
                error, ImportError
            ):  # this case alone needs so much memory, or this package
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
    """Makes the competitors of case k of a suite compile into the caches on the disk. Returns the errors as lines."""
    case, wrong, data = GPU_SUITES[suite](gpu_cases(device, tiny=tiny))[k], [], None
    for name in (name for name in COMPILING if name in taking_part(case)):
        try:
            data = data or case.data()
            PEERS[case.suite][name](data).run()
        except Exception as error:
            wrong.append(f"{case.suite}: {case.name}: {name}: {_reason(error)}")
    del data
    _empty(torch.device(device))  # other processes need the memory
    return wrong


def prepare(count, suite, device, tiny, jobs):
    """Calls compile_for for each of `count` cases, so the benchmark need not wait. A compiler uses one core: `jobs` processes."""
    one = partial(compile_for, suite=suite, device=str(device), tiny=tiny)
    if jobs == 1:
        return [wrong for k in range(count) for wrong in one(k)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [wrong for found in pool.map(one, range(count)) for wrong in found]


def gpu_environment(device):
    """The properties and the state of the GPU, on which timings depend."""
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


# ---- the report ------------------------------------------------------------------------------------------------------


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
    """The machine and the versions, on which timings depend. Call this before the first timing, which is a load itself."""
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
    """Rich table of compare's results, with a line for each competitor. Missed targets and slower cases are marked."""
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
    """The last lines: the number of targets met, the missed ones, the cases in which we are slower, and who was left out."""
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
    """Writes JSON, completely or not at all."""
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
        "--suite", choices=suites, default="all", help="the cases to time (default: all on the CPU, four minutes)"
    )
    parser.add_argument("--out", type=_file, metavar="FILE.json", help="also write the results to this file")
    parser.add_argument("--threads", type=_positive(int), default=2, help="number of CPU threads (default: 2)")
    parser.add_argument("--seconds", type=_positive(float), help="approximate time per case (default: 5; on a GPU 2.5)")
    parser.add_argument(
        "--limit", type=_positive(float), default=600.0, help="suites gpu: time of the whole run in seconds (default: 600)"
    )
    parser.add_argument("--rehearse", action="store_true", help="suites gpu: try a few tiny cases on the CPU")
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
    """Runs the command. Returns 0, or 1 if our result is wrong. Exits with 2 for bad arguments.

    begun: the time (perf_counter) from which --limit counts, by default now.
    """
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
        console = Console(highlight=False, width=140)  # a file can have any width
    try:
        report = environment() | {"seconds_per_case": arguments.seconds}
        if (report["load_at_start"] or 0) > 0.5:
            load = f"{report['load_at_start']:.1f}"
            console.print(f"the machine is busy (load {load}): the ratios may differ from those on a quiet one")
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
