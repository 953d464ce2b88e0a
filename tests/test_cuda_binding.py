"""One library of CUDA operators serves every torch (csrc/torch_stream.h): it finds torch's stream in the libtorch_cuda that the
process has loaded, whichever of the two was loaded first. Beside a torch without CUDA a stub stands for libtorch_cuda."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from absgd_fast import _backend

OWN = Path(torch.__file__).with_name("lib") / "libtorch_cuda.so"
LIBRARY = Path(_backend.__file__).with_name("_ops_cuda.so")
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"no CUDA operators: {_backend.build_info()['cuda_reason']}"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler for the stub of libtorch_cuda"),
]

STUB = """
static int calls = 0;
extern "C" int stub_calls() { return calls; }
#ifndef EMPTY
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  ++calls;
  *stream = reinterpret_cast<void*>(0x1000L + device);
  return device == 99 ? 1 : 0;
}
#endif
"""

# What runs in a process of its own; STEPS are among load_stub, load_operators and ask.
PROCESS = """
import ctypes, os, sys, torch
stub, library, steps = sys.argv[1], sys.argv[2], sys.argv[3:]

def load_stub():
    global torchs
    torchs = ctypes.CDLL(stub, mode=os.RTLD_LOCAL | os.RTLD_LAZY)  # as torch loads its own

def load_operators():
    global probe, schemas
    schemas = torch.library.Library("absgd_fast", "DEF")
    schemas.define("cuda_unbound() -> str")
    torch.ops.load_library(library)
    probe = ctypes.CDLL(library).absgd_fast_stream
    probe.restype = ctypes.c_char_p

def ask(device=3):
    stream = ctypes.c_void_p()
    failed = probe(device, ctypes.byref(stream))
    print(failed.decode() if failed else hex(stream.value), "|", torch.ops.absgd_fast.cuda_unbound() or "bound")

for step in steps:
    globals()[step]()
ask(99)
print(torchs.stub_calls() if "load_stub" in steps else None)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """stub(*defines): the path of a libtorch_cuda.so."""

    def build(*defines):
        folder = tmp_path_factory.mktemp("stub")
        (folder / "stub.cpp").write_text(STUB)
        target = folder / "libtorch_cuda.so"
        command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", *defines, folder / "stub.cpp", "-o", target]
        subprocess.run([*map(str, command)], check=True)
        return target

    return build


def run(stub, *steps):
    done = subprocess.run([sys.executable, "-c", PROCESS, stub, LIBRARY, *steps], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


stubbed = pytest.mark.skipif(OWN.exists(), reason="this torch has loaded its own libtorch_cuda, which hides a stub")
ABSENT = "no libtorch_cuda.so is loaded in this process"


@pytest.mark.skipif(not OWN.exists(), reason="this torch was built without CUDA, and has no libtorch_cuda")
def test_torchs_own_library_is_bound():
    """Without a GPU it has no stream to tell."""
    asked, failing, _ = run(OWN, "load_operators", "ask")
    assert asked.endswith(" | bound") and (torch.cuda.is_available() == asked.startswith("0x"))
    assert failing == "torch could not tell its current stream | bound"


@stubbed
@pytest.mark.parametrize(
    "steps, answers",
    [
        (["load_stub", "load_operators", "ask"], ["0x1003 | bound"]),
        (["load_operators", "load_stub", "ask"], ["0x1003 | bound"]),
        (["load_operators", "ask", "load_stub", "ask"], [f"{ABSENT} | {ABSENT}", "0x1003 | bound"]),
    ],
    ids=["torch first", "operators first", "operators asked before"],
)
def test_the_stream_is_torchs(stub, steps, answers):
    """The probe's calls go through the stub: two of them, the second of which fails there."""
    assert run(stub(), *steps) == [*answers, "torch could not tell its current stream | bound", "2"]


@stubbed
def test_a_torch_without_the_symbol(stub):
    missing = "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream, which torch 2.10 and later have"
    assert run(stub("-DEMPTY"), "load_stub", "load_operators", "ask") == [f"{missing} | {missing}"] * 2 + ["0"]


@stubbed
def test_without_libtorch_cuda(stub):
    assert run(stub(), "load_operators", "ask") == [f"{ABSENT} | {ABSENT}"] * 2 + ["None"]


def test_nothing_of_libtorch_cuda_is_linked():
    """A library that names it does not load beside a torch without CUDA."""
    data = LIBRARY.read_bytes()
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True).stdout if shutil.which("readelf") else ""
    assert "libtorch_cuda" not in needed and b"aoti_torch_get_current_cuda_stream" in data


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as _backend can tell."""
    monkeypatch.setattr(_backend.torch.version, "cuda", "13.0")
    monkeypatch.setattr(_backend.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_backend.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backend, "_load", lambda name: None)
    monkeypatch.setattr(_backend, "cuda_unbound", lambda: None)
    _backend._why_not_cuda.cache_clear()
    yield monkeypatch
    _backend._why_not_cuda.cache_clear()


@pytest.mark.parametrize(
    "versions, reason",
    [
        ("13000 13000", None),
        ("13020 13000", None),
        ("13000 13010", None),  # minor versions of one major serve each other
        ("14000 13000", None),
        ("12080 13000", "the NVIDIA driver serves CUDA 12.8, but the kernels were built with CUDA 13.0"),
    ],
)
def test_the_driver_serves_the_runtime(a_gpu, versions, reason):
    """A driver that is too old leaves the tensors to Triton, and `doctor` says why."""
    a_gpu.setattr(_backend.torch.ops.absgd_fast, "cuda_versions", lambda: versions, raising=False)
    found = _backend.why_not("cuda")
    assert found is None if reason is None else reason in found
    _backend._why_not_triton.cache_clear()
    a_gpu.setattr(_backend, "_why_not_triton", lambda: None)
    assert _backend.select(_backend.torch.device("cuda")) == ("cuda" if reason is None else "triton")


def test_an_unbound_library_is_the_reason(a_gpu):
    a_gpu.setattr(_backend, "cuda_unbound", lambda: ABSENT)
    assert _backend.why_not("cuda") == ABSENT
