"""Builds CUDA sources for the CPU: kernels run on the fibers of runtime.cpp, inside the process that loads the library.

    library = build(sources, out, kind)     # kind: see KINDS
    simt = Simt(library)                    # ctypes; the library may also register operators (torch.ops.load_library)
    simt.configure("random", seed=3)
    ...                                     # launch
    assert simt.failures() == []

A library of the kind "address" or "bounds" needs environment(kind) in a process of its own. tests/test_simt.py shows which kind
of bug is caught by which kind of build. None of them sees: what weak memory does while blocks run at the same time, a wait
on plain loads (it hangs), lifetimes and the order of streams, device pointers on the host, __launch_bounds__, occupancy, the
rounding of approximate instructions. The race build does not look into memcpy, remembers three unordered reads of an address,
and reports two threads that write the same value, as the language does.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "simt"  # object files, by what they were compiled from
KEPT = 4  # object files of one source and kind that stay there
RUNTIME = [HERE / name for name in ("runtime.cpp", "report.cpp", "cuda_api.cpp")]

# Flags for the kernels. Everywhere: -fsanitize=alignment, because a misaligned 16-byte access is an error on a GPU and
# would end this process with SIGSEGV at -O2.
KINDS = {
    "plain": ["-O2", "-fsanitize=alignment"],
    # These two need environment(kind). "bounds" compiles in a third of the time: it calls its checks instead of inlining
    # them, and does not look for undefined behaviour.
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "bounds": ["-O1", "-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0"],
    "race": ["-O1", "-fsanitize=alignment,thread"],  # its hooks are in race.cpp; libtsan is not linked
}
LINK = {"address": ["-fsanitize=address,undefined"], "bounds": ["-fsanitize=address"]}
# like nvcc, no assumptions from types; lines and inlined frames for the reports; every library has its own runtime
COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class BuildError(RuntimeError):
    pass


def _cached(command, source, target, name, run):
    """Compiles `source` into `target`, or copies what an earlier call made of the same text with the same flags."""
    text = run([*command, "-E", source], source, None).stdout
    version = _output(command[0], "--version")
    key = hashlib.sha256("\0".join([version, *map(str, command), text]).encode(errors="surrogateescape")).hexdigest()[:32]
    made = CACHE / f"{name}-{key}.o"
    try:
        shutil.copyfile(made, target)
        os.utime(made)
        return
    except FileNotFoundError:
        run([*command, "-c", source, "-o", target], source, None)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        os.replace(shutil.copyfile(target, Path(folder) / "new.o"), made)  # at once: another process may be reading
    for old in sorted(CACHE.glob(f"{name}-*.o"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
        old.unlink(missing_ok=True)


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except OSError:  # no such program
        return ""


@functools.cache
def compiler():
    """GCC: $CXX, g++ or c++; None if there is none. (Clang links its sanitizers in another way.)"""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        macros = _output(name, "-dM", "-E", "-x", "c++", os.devnull)
        if "__GNUC__" in macros and "__clang__" not in macros:
            return name
    return None


@functools.cache
def cuda_headers():
    """Folders that have cuda_runtime.h, cuda_fp16.h, cuda_bf16.h: those of nvcc, of Triton's and of NVIDIA's wheels.

    The wheels that come with torch lack what these files include, such as crt/host_defines.h.
    """
    found = []
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        found += re.findall(r'"?-I"?([^"\s]+)', " ".join(line for line in dry.splitlines() if " INCLUDES=" in line))
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        found.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    if spec := importlib.util.find_spec("nvidia"):
        found += [p.parent for root in spec.submodule_search_locations for p in Path(root).glob("*/include/cuda_runtime.h")]
    names = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")
    return [folder for folder in map(Path, found) if all((folder / name).exists() for name in names)]


def why_not():
    """Why nothing can be built here, or None."""
    if compiler() is None:
        return "needs g++"
    return None if cuda_headers() else "needs CUDA's headers: nvcc, or Triton's wheel"


def build(sources, out, kind, include_dirs=(), extra_flags=(), extra_sources=(), headers=None):
    """Compiles kernel files and the runtime into the shared library `out`, in parallel, and returns its path.

    sources: .cu files, with simt_host.h included first and the flags of `kind`. extra_sources: C++ files without either,
    for operators say; they see the same CUDA headers, `headers` or else cuda_headers()[0]. extra_flags go to every
    compilation and to the end of the link.
    """
    out, extra_flags = Path(out), list(extra_flags)
    folder = out.with_suffix(".objects")
    folder.mkdir(parents=True, exist_ok=True)
    # include_dirs last: a math.h there shall not hide the system's
    include = ["-isystem", headers or cuda_headers()[0]]
    for directory in (*include_dirs, HERE / "include"):
        include += ["-idirafter", directory]
    common = [compiler(), *COMMON, *include]
    kernel = [*common, *KINDS[kind], "-x", "c++", "-include", HERE / "simt_host.h"]
    runtime = RUNTIME + [HERE / "race.cpp"] * (kind == "race")
    jobs = [(kernel, s, kind) for s in sources] + [([*common, "-O2"], s, "host") for s in [*extra_sources, *runtime]]

    def run(command, source, target):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="surrogateescape")
        if done.returncode:
            raise BuildError(f"{kind}: {source or target}\n{done.stderr[-4000:]}")
        return done

    def compile_one(number):
        command, source, made_for = jobs[number]
        target = folder / f"{number}.{Path(source).stem}.o"
        _cached([*command, *extra_flags], source, target, f"{made_for}-{Path(source).stem}", run)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, range(len(jobs))))
    # -Bsymbolic: the names of CUDA's runtime and of libtsan mean ours, whatever else the process has loaded
    run([compiler(), "-shared", "-Wl,-Bsymbolic", *LINK.get(kind, []), *objects, *extra_flags, "-ldl", "-o", out], None, out)
    return out


def environment(kind):
    """What a process that loads such a library needs in its environment."""
    if kind not in LINK:
        return {}
    preload = [_output(compiler(), f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Simt:
    """The controls of a library made by build(), which may be loaded already."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_failure.restype = ctypes.c_char_p
        self.library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64]
        for count in ("simt_launches", "simt_blocks", "simt_parameter_bytes"):
            getattr(self.library, count).restype = ctypes.c_uint64
        self.library.simt_capture.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def configure(self, order="forward", seed=0):
        """order: forward, reverse, random, of threads and of blocks. seed: of that, and of the fill of shared memory
        (seed % 3: NaN, 3e38, -3e38)."""
        self.library.simt_configure(ORDERS[order], seed)

    def strict(self, strict=True):
        """Whether shuffles and votes order no memory, which is CUDA's letter; by default they do, like __syncwarp."""
        self.library.simt_strict(strict)

    def failures(self):
        """Reports since clear(): the kernel, block, thread and line of each."""
        return [self.library.simt_failure(i).decode() for i in range(self.library.simt_failures())]

    def clear(self):
        self.library.simt_clear()

    @contextmanager
    def captured(self, stream):
        """While this stream (its handle, a number) is captured, with the rules of cudaStreamCaptureModeGlobal."""
        self.library.simt_capture(stream, True)
        try:
            yield
        finally:
            self.library.simt_capture(stream, False)

    @property
    def launches(self):
        return self.library.simt_launches()

    @property
    def blocks(self):
        return self.library.simt_blocks()

    @property
    def longest(self):
        """Accesses to memory of the thread that made most of them, in the block of the last launch that ran last and in those
        before it: their difference is the work that no other block shares. Of a library of the kind "race"."""
        self.library.simt_longest.restype = ctypes.c_uint64
        return self.library.simt_longest(0), self.library.simt_longest(1)

    @property
    def parameter_bytes(self):
        """Of the parameters of all launches."""
        return self.library.simt_parameter_bytes()
