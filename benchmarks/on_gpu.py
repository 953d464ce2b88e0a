"""The cases of a GPU: a machine on which anything may be missing or fail, and on which time is short."""

import gc
import multiprocessing
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import perf_counter

import torch

from absgd_fast import _backend

from . import gpu_report
from .case_data import IN_CACHE
from .cases import gpu_cases, gpu_probe
from .device import captured, copy_ns, kernels, peak_allocated, synchronize
from .liger import import_compilers
from .one_case import gather, taking_part, timed
from .peer import OURS, OURS_ON_TRITON, LeftOut, ready
from .peers import PEERS
from .timing import host_us, interleave, quartiles

GPU_SUITES = {"gpu": lambda cases: cases, "gpu-probe": gpu_probe}
# seconds: a competitor that is not ready by then is left out of a case; imports come before (import_compilers)
BUDGET = 15.0
COMPILING = (OURS_ON_TRITON, "Liger", "torch.compile")


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
    result = timed(case, data, times, {name: error for name, (_, error) in found.items()}, absent) | {"bytes": data.moved}
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
