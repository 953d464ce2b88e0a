"""The checkers that run CUDA kernels on the CPU (simt/): right kernels pass in every build and order, and each bug of
simt/broken is caught by the builds that its row names. A checker that was never seen to fail proves nothing."""

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from simt import build as simt_build
from simt.build import Simt, build, cuda_headers, environment

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=str(simt_build.why_not()))

TESTS = Path(__file__).resolve().parent
BROKEN = TESTS / "simt" / "broken" / "kernels.cu"
RIGHT = ["sum_rows", "max_rows", "total", "tally", "last_warp", "reverse", "step", "turn", "histogram", "halve", "words"]
# seed % 3 is the fill of shared memory, so every order meets every fill
ORDERS = [(order, seed) for order in ("forward", "reverse", "random") for seed in range(3)]

WRONG = None  # a wrong result in at least one order
SHARED, GLOBAL = "race on shared memory", "race on global memory"
UNINITIALISED = "uninitialised shared memory is read"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"

# (kernel, bug) -> {build: what it says}
BUGS = {
    # barriers
    ("sum_rows", "missing_barrier"): {"plain": WRONG, "race": UNINITIALISED},
    ("sum_rows", "missing_loop_barrier"): {"plain": WRONG, "race": SHARED},
    ("sum_rows", "divergent_barrier"): {"plain": r"divergent barrier: .* __syncthreads of kernels.cu:\d+ .* that of kernels.cu"},
    ("sum_rows", "early_return"): {"plain": r"lanes 0xffffff00 of mask 0xffffffff are missing; lane 8 has returned"},
    ("sum_rows", "late_return"): {
        "plain": r"thread 0 waits at the __syncthreads .* 32 threads have returned, thread 224 the first"
    },
    ("reverse", "missing_barrier"): {"plain": WRONG, "race": UNINITIALISED},
    ("histogram", "missing_barrier"): {"plain": WRONG, "race": SHARED},
    # shared memory
    ("sum_rows", "uninitialised_shared"): {"plain": WRONG, "race": UNINITIALISED},
    ("max_rows", "uninitialised_shared"): {"plain": WRONG, "race": UNINITIALISED},
    ("sum_rows", "past_static_shared"): {"address": rf"index 32 out of bounds|{OVERFLOW}"},
    ("sum_rows", "too_much_static_shared"): {"plain": "52000 bytes of static"},
    ("reverse", "past_dynamic_shared"): {"address": OVERFLOW},
    # warps
    ("sum_rows", "lane_returned"): {"plain": r"lanes 0x2000 of mask 0xffffffff are missing; lane 13 has returned"},
    ("sum_rows", "own_lane_not_in_mask"): {"plain": r"mask 0xffff of the shuffle .* leaves out the calling lane"},
    ("sum_rows", "lanes_missing"): {
        "plain": r"lanes 0xffff0000 of mask 0xffffffff .* lane 16 waits at the __syncthreads of kernels"
    },
    ("sum_rows", "other_intrinsic"): {"plain": r"divergent warp: .* at the (vote|shuffle) of .* at the (vote|shuffle) of"},
    ("sum_rows", "reads_lane_not_in_mask"): {"plain": r"lane 8 reads lane 16, which mask 0xffff leaves out"},
    ("sum_rows", "wrong_width"): {"plain": WRONG},
    ("sum_rows", "odd_width"): {"plain": "width 24 is no power of two"},
    ("turn", "missing_syncwarp"): {"plain": WRONG, "race": SHARED},
    ("turn", "wrong_half"): {"plain": WRONG, "race": SHARED},
    ("turn", "shuffle_as_fence"): {"strict": SHARED},
    # between blocks
    ("total", "no_fence"): {"race": GLOBAL},
    ("total", "block_fence"): {"race": GLOBAL},
    ("total", "no_acquire"): {"race": GLOBAL},
    ("total", "no_barrier_before_fence"): {"race": GLOBAL},
    ("total", "counter_not_reset"): {"plain": WRONG},
    ("total", "plain_counter"): {"race": GLOBAL},
    ("total", "stale_cache"): {"race": "__ldg at .* reads what this launch has written"},
    ("total", "spin"): {"plain": "no thread gets on, this one spins"},
    ("tally", "late_fence"): {"race": GLOBAL},
    ("tally", "leader_fence"): {"race": GLOBAL},
    ("tally", "no_acquire"): {"race": GLOBAL},
    ("last_warp", "no_fence"): {"race": SHARED},
    ("last_warp", "no_acquire"): {"race": SHARED},
    ("step", "overlapping_blocks"): {"plain": WRONG, "race": GLOBAL},
    ("halve", "overlapping_blocks"): {"plain": WRONG, "race": GLOBAL},
    ("histogram", "overlapping_blocks"): {"race": GLOBAL},
    ("histogram", "plain_increment"): {"race": SHARED},
    # memory
    ("reverse", "off_by_one"): {"address": OVERFLOW},
    ("step", "off_by_one"): {"address": OVERFLOW},
    ("step", "one_short"): {"plain": WRONG},
    ("reverse", "misaligned"): {"plain": "misaligned access at kernels.cu", "race": "misaligned access"},
    ("reverse", "misaligned_shared"): {"plain": "misaligned access at kernels.cu", "race": "misaligned access"},
    # launches
    ("sum_rows", "large_block"): {"plain": r"blocks of 1056 x 1 x 1 threads"},
    ("sum_rows", "zero_grid"): {"plain": r"grid of 0 x 1 x 1 blocks"},
    ("reverse", "much_shared"): {"plain": r"232464 bytes of dynamic shared memory"},
    ("reverse", "no_opt_in"): {"plain": r"65536 bytes of dynamic shared memory, 49152 are possible until cudaFuncSetAttribute"},
    ("step", "many_parameters"): {"plain": r"35\d\d\d bytes of parameters, at most 32764"},
}

# ---- builds ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Each kind, and "portable": the fibers of other processors, with the last set of CUDA headers that is here."""
    folder = tmp_path_factory.mktemp("simt")
    portable = {"extra_flags": ["-DSIMT_UCONTEXT=1"], "headers": cuda_headers()[-1]}
    with ThreadPoolExecutor() as pool:
        jobs = {
            name: pool.submit(build, [BROKEN], folder / f"{name}.so", kind, **options)
            for name, kind, options in [(k, k, {}) for k in simt_build.KINDS] + [("portable", "plain", portable)]
        }
        return {name: job.result() for name, job in jobs.items()}


@pytest.fixture
def load(libraries):
    def load(name):
        simt = Simt(libraries["race" if name == "strict" else name])
        simt.strict(name == "strict")
        simt.clear()
        return simt

    return load


def run(simt, kernel, bug="none"):
    """0 = right, 1 = wrong, 2 = the launch failed; and the reports."""
    simt.clear()
    return simt.library.run(kernel.encode(), bug.encode()), simt.failures()


IN_A_PROCESS = """
import sys
from simt.build import Simt
simt = Simt(sys.argv[1])
for order, seed in {orders}:
    simt.configure(order, seed)
    for case in sys.argv[2:]:
        kernel, bug = case.split()
        assert simt.library.run(kernel.encode(), bug.encode()) == 0, (case, order, seed)
        assert simt.failures() == [], (case, order, seed, simt.failures())
print("all right")
"""


def run_in_a_process(library, cases, orders):
    """The sanitizer's runtime has to be there from the start, and ends the process when it finds something."""
    code = IN_A_PROCESS.format(orders=orders)
    env = os.environ | environment("address") | {"PYTHONPATH": str(TESTS)}
    return subprocess.run([sys.executable, "-c", code, library, *cases], env=env, capture_output=True, text=True, timeout=120)


# ---- right kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("order, seed", ORDERS)
@pytest.mark.parametrize("name", ["plain", "portable", "race", "strict"])
def test_right_kernels_pass(load, name, order, seed):
    simt = load(name)
    simt.configure(order, seed)
    for kernel in RIGHT:
        assert run(simt, kernel) == (0, []), kernel


@pytest.mark.parametrize("name", simt_build.LINK)
def test_right_kernels_pass_the_address_sanitizer(libraries, name):
    done = run_in_a_process(libraries[name], [f"{kernel} none" for kernel in RIGHT], ORDERS)
    assert done.stdout == "all right\n" and not done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_are_cuda(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-DONLY_RIGHT", "-c", BROKEN, "-o", tmp_path / "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bugs ------------------------------------------------------------------------------------------------------------


def test_every_bug_has_a_row(load):
    name = load("plain").library.case_name
    name.restype = simt_build.ctypes.c_char_p
    cases = [tuple(case.decode().split()) for case in iter(map(name, range(1000)).__next__, None)]
    assert set(cases) == {(kernel, "none") for kernel in RIGHT} | set(BUGS)
    assert all(BUGS.values())


@pytest.mark.parametrize(
    "kernel, bug, name, text",
    [(*case, name, text) for case, caught in BUGS.items() for name, text in caught.items() if name != "address"],
)
def test_bug_is_caught(load, kernel, bug, name, text):
    simt = load(name)
    seen = []
    for order, seed in ORDERS[::4] if bug == "spin" else ORDERS:
        simt.configure(order, seed)
        seen.append(run(simt, kernel, bug))
    if text is WRONG:
        assert 1 in [code for code, _ in seen]
    elif name == "plain" or "misaligned" in bug:  # what ends a launch is seen in every order
        assert all(code == 2 and re.search(text, reports[0]) for code, reports in seen), seen
    else:
        assert all(re.search(text, " ".join(reports)) for _, reports in seen), seen


@pytest.mark.parametrize("name", simt_build.LINK)
@pytest.mark.parametrize("kernel, bug", [case for case, caught in BUGS.items() if "address" in caught])
def test_bug_is_caught_by_the_address_sanitizer(libraries, name, kernel, bug):
    done = run_in_a_process(libraries[name], [f"{kernel} {bug}"], [("random", 1)])
    assert done.returncode != 0 and re.search(BUGS[kernel, bug]["address"], done.stderr), done.stderr
    assert re.search(r"kernels\.cu:\d+", done.stderr)
    if OVERFLOW in done.stderr:
        assert re.search(rf"simt: {kernel}_kernel<bug>, block \d+, thread \d+", done.stderr), done.stderr


# ---- the tools themselves --------------------------------------------------------------------------------------------


def test_a_maximum_needs_a_large_fill(load):
    """fmaxf swallows NaN: with that fill the uninitialised read goes unnoticed."""
    simt = load("plain")
    results = []
    for seed in range(3):
        simt.configure("forward", seed)
        results.append(run(simt, "max_rows", "uninitialised_shared")[0])
    assert results == [0, 1, 0]


@pytest.mark.parametrize("name", ["plain", "race"])
def test_a_seed_reproduces_a_run(load, name):
    simt = load(name)

    def reports(seed):
        simt.configure("random", seed)
        return run(simt, "sum_rows", "own_lane_not_in_mask")[1]

    assert reports(7) == reports(7)
    assert len({reports(seed)[0] for seed in range(8)}) > 1


def test_a_report_says_where(load):
    """The line of the primitive and those that it was inlined into."""
    simt = load("plain")
    simt.configure("forward")
    line = dict(enumerate(BROKEN.read_text().splitlines(), 1))
    _, (report,) = run(simt, "sum_rows", "lanes_missing")
    assert report.startswith("sum_rows_kernel<bug>, block 0: thread 0 waits at the shuffle of kernels.cu:")
    first, outer, other = (int(n) for n in re.findall(r"kernels\.cu:(\d+)", report)[:3])
    assert "__shfl_xor_sync" in line[first] and "block_sum" in line[outer] and "__syncthreads" in line[other]
    _, (report,) = run(simt, "sum_rows", "zero_grid")
    assert "LAUNCH" in "".join(line[int(re.search(r"kernels\.cu:(\d+)", report)[1]) - d] for d in (0, 1))


def test_a_race_says_who(load):
    simt = load("race")
    simt.configure("forward")
    line = dict(enumerate(BROKEN.read_text().splitlines(), 1))
    _, reports = run(simt, "total", "no_fence")
    says = (
        r"total_kernel<bug>, block 9, thread 0: race on global memory: reads at kernels\.cu:(\d+) "
        r"what thread 32 of block 0 wrote at kernels\.cu:(\d+)"
    )
    reads, wrote = re.match(says, reports[0]).groups()
    assert "partial[i]" in line[int(reads)] and "partial[blockIdx.x] = v" in line[int(wrote)]


def test_counts(load):
    simt = load("plain")
    run(simt, "sum_rows")
    assert (simt.launches, simt.blocks) == (1, 3)
    run(simt, "sum_rows", "zero_grid")
    assert (simt.launches, simt.blocks) == (0, 0)
    assert len(simt.failures()) == 1
    simt.clear()
    assert simt.failures() == []


def test_launches_go_on_after_a_failure(load):
    """A launch that is given up leaves no lanes, stacks or errors to the next one."""
    simt = load("plain")
    for seed in range(5):
        simt.configure("random", seed)
        assert run(simt, "sum_rows", "lanes_missing")[0] == 2
        assert run(simt, "sum_rows") == (0, [])


def test_any_host_thread_may_launch(load):
    simt = load("plain")
    simt.configure("random", 1)
    simt.clear()
    results = []
    work = [threading.Thread(target=lambda: results.append(simt.library.run(b"sum_rows", b"none"))) for _ in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [0] * 8 and simt.failures() == [] and simt.launches == 8


@pytest.mark.parametrize("name", ["plain", "race"])
def test_torch_loads_it(libraries, name):
    torch.ops.load_library(str(libraries[name]))


def test_build_errors_are_shown(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void kernel() { this is not C++; }\n")
    with pytest.raises(simt_build.BuildError, match="bad.cu:1"):
        build([source], tmp_path / "bad.so", "plain")
