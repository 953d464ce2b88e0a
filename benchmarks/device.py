"""The device's part of a measurement: its clock, its queue, captured graphs, and the kernels that a call launched.

On the CPU each function does the simplest thing, because a call is over when it returns. So the GPU benchmark can be tried
without a GPU.
"""

import contextlib
import warnings
from time import perf_counter_ns

import torch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_ns(device, run, calls):
    """ns per call, for `calls` calls in a row, by the device's own clock.

    If there are several calls, one more comes before the clock starts. It fills the caches, which other competitors have used.
    """
    if calls > 1:
        run()
    if device.type != "cuda":
        start = perf_counter_ns()
        for _ in range(calls):
            run()
        return (perf_counter_ns() - start) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6 / calls


@contextlib.contextmanager
def _waiting_is_an_error():
    """Inside this context, a call that makes the host wait for the GPU (.item(), torch.equal) raises and starts nothing."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype, once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _capturing(graph):
    """torch.cuda.graph, which can also be left by an error during the capture.

    In torch 2.11, capture_end() raises before it returns the pool to the allocator and before it restores the stream. From then
    on every torch.cuda.empty_cache() raises. This context repairs both.
    """
    before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # torch has already ended it
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
        torch.cuda.set_stream(before)
        raise


def captured(device, run, warm_up=3):
    """Captures `run` as a CUDA graph. Returns (replay, the result of `run` during the capture). On the CPU: (`run`, None).

    If the host waits in a call, the last warm-up raises, before the capture begins.
    """
    if device.type != "cuda":
        for _ in range(warm_up):
            run()
        return run, None
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_up - 1):
            run()
        with _waiting_is_an_error():
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    with _capturing(graph):
        result = run()
    return graph.replay, result


def _profiled(run):
    """The profiler's events during one call of `run`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return profile.events()


_seen_by_profiler = []  # not empty after the first profile of a process, which starts the tracer and may miss events


def _events(device, run):
    if not _seen_by_profiler:
        _profiled(lambda: torch.zeros(8, device=device).add_(1))
        _seen_by_profiler.append(True)
    synchronize(device)
    return _profiled(run)


def kernels(device, run):
    """The names of the kernels that one call of `run` launches, without copies and fills. None on the CPU.

    A small kernel marks the beginning and another one the end. All kernels that the profiler saw between the two belong to the
    call. Raises RuntimeError if the profiler did not see the two marks.
    """
    if device.type != "cuda":
        run()
        return None
    mark = torch.zeros(1, device=device)

    def marked():
        mark.add_(1)
        synchronize(device)
        run()
        synchronize(device)  # also with other streams
        mark.add_(1)

    for _ in range(2):
        on_gpu = [e for e in _events(device, marked) if e.device_type == torch.autograd.DeviceType.CUDA]
        launched = [e for e in on_gpu if not (getattr(e, "is_user_annotation", False) or e.name.startswith("Optimizer."))]
        names = [e.name for e in sorted(launched, key=lambda e: e.time_range.start)]
        if len(names) > 1 and names[0] == names[-1]:
            return [name for name in names[1:-1] if not any(what in name.lower() for what in ("memcpy", "memset"))]
    raise RuntimeError(f"the profiler did not see the marks around the call, but {names}")


def waits(device, run):
    """The names of the CUDA calls in which the host waited for the GPU during `run`."""
    if device.type != "cuda":
        run()
        return []

    def marked():
        with torch.profiler.record_function("absgd_fast: no waiting"):
            run()

    events = [e for e in _events(device, marked) if e.device_type == torch.autograd.DeviceType.CPU]
    inside = next(e.time_range for e in events if e.name == "absgd_fast: no waiting")
    named = [e for e in events if "Synchronize" in e.name or e.name == "cudaMemcpy"]
    return [e.name for e in named if inside.start <= e.time_range.start <= inside.end]


def copy_ns(device, numbers):
    """The times in ns of 30 copies of this many float32 numbers from device to device."""
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    return [block_ns(device, lambda: target.copy_(source), 2) for _ in range(30)]


def peak_allocated(device, run):
    """The largest memory that torch had in use during a call, less the memory in use before it. None on the CPU."""
    if device.type != "cuda":
        run()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
