"""The CUDA files compile for every generation without spills, in the registers and memory of tests/cuda_resources.json."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from absgd_fast import _backend

ROOT = Path(__file__).resolve().parent.parent
FILES = tuple(sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")))
ARCHITECTURES = (80, 90, 100)
# `make` builds the library for 80, and its machine code is read. The others are compiled for these tests alone: a minute each.
each_architecture = pytest.mark.parametrize(
    "architecture", [a if a == 80 else pytest.param(a, marks=pytest.mark.deep) for a in ARCHITECTURES]
)
TABLE = Path(__file__).with_name("cuda_resources.json")
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, from a CUDA toolkit"),
    pytest.mark.timeout(900),  # two cores compile for two minutes, a busy machine for five
]


def version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


def short(name: str) -> str:
    """absgd::gpu::(anonymous namespace)::foo_kernel<float, (Walk)1>(Args) -> foo_kernel<float, 1>"""
    name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    kernel = re.search(r"(\w+_kernel(?:<.*>)?)\(", name)[1]
    plain = re.sub(r"absgd::(?:gpu::)?|\(anonymous namespace\)::|__nv_|__(?=half)|\s(?=>)", "", kernel)
    return re.sub(r"\((?:Walk|SgdForm|int)\)", "", plain)


class Build(NamedTuple):
    resources: dict[str, list[int]]  # kernel -> registers, bytes of static shared memory, bytes spilled
    ptx: dict[str, str]  # kernel -> its text
    cubins: list[Path]


def entries(ptx: str) -> dict[str, str]:
    """kernel -> its text, up to the next kernel."""
    _, *parts = re.split(r"\.entry (\w+)\(", ptx)
    return {short(name): body for name, body in zip(parts[::2], parts[1::2])}


def compiled(file: str, architecture: int, folder: Path) -> Build:
    cubin, kept = folder / f"{file}.cubin", folder / f"{file}.kept"
    kept.mkdir()
    command = [NVCC, "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "--keep", "--keep-dir", kept, "-cubin"]
    done = subprocess.run([*command, ROOT / "csrc" / "cuda" / f"{file}.cu", "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resources = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        shared = re.search(r"(\d+) bytes smem", part)
        resources[short(part.split("'")[1])] = [
            int(re.search(r"Used (\d+) registers", part)[1]),
            int(shared[1]) if shared else 0,
            spilled,
        ]
    return Build(resources, entries((kept / f"{file}.ptx").read_text()), [cubin])


def from_library(architecture: int, folder: Path) -> Build | None:
    """The same, read from the library that is installed; None if it is older than the sources, or made by another compiler or for
    another architecture."""
    library = Path(_backend.__file__).with_name("_ops_cuda.so")
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    made = json.loads(library.with_name("_build_info.json").read_text())["cuda"] if library.exists() else None
    if not made or disassembler() is None or not version().startswith(made["nvcc"]) or architecture not in made["architectures"]:
        return None
    if library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return None
    subprocess.run([disassembler(), "-xelf", "all", "-xptx", "all", library], cwd=folder, capture_output=True, check=True)
    resources, cubins = {}, sorted(folder.glob(f"*.sm_{architecture}.cubin"))
    for cubin in cubins:
        text = subprocess.run([disassembler(), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
            registers, stack, shared, local = map(int, numbers)
            resources[short(name)] = [registers, shared, stack + local]
    ptx = entries("\n".join(path.read_text() for path in folder.glob(f"*.sm_{architecture}.ptx")))
    return Build(resources, ptx, cubins) if ptx and resources.keys() == ptx.keys() else None


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """architecture -> what all files come to there, made once."""

    @cache
    def build(architecture):
        folder = tmp_path_factory.mktemp("cubin")
        if found := from_library(architecture, folder):
            return found
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(lambda file: compiled(file, architecture, folder), FILES))
        resources, ptx = ({name: x for part in parts for name, x in part[i].items()} for i in (0, 1))
        return Build(resources, ptx, [cubin for part in parts for cubin in part.cubins])

    return build


@each_architecture
def test_nothing_spills(build, architecture):
    assert not {name: row for name, row in build(architecture).resources.items() if row[2]}


@each_architecture
def test_resources_are_those_of_the_table(build, architecture):
    """So that a change which doubles the registers of a kernel is seen. After a change that is meant:
    ABSGD_WRITE_RESOURCES=1 pytest tests/test_cuda_build.py"""
    found = {name: row[:2] for name, row in sorted(build(architecture).resources.items())}
    for name, (registers, shared) in found.items():
        print(f"{name:64} {registers:3} registers {shared:5} B")
    table = json.loads(TABLE.read_text())
    if os.environ.get("ABSGD_WRITE_RESOURCES"):
        table |= {"nvcc": version(), f"sm_{architecture}": found}
        lines = ",\n".join(
            f' "{a}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {row}" for n, row in kernels.items()) + "\n }"
            for a, kernels in table.items()
            if a != "nvcc"
        )
        TABLE.write_text(f'{{\n "nvcc": "{table["nvcc"]}",\n{lines}\n}}\n')
    assert table.keys() == {"nvcc", *(f"sm_{a}" for a in ARCHITECTURES)}
    wanted = table[f"sm_{architecture}"]
    assert found.keys() == wanted.keys()
    if table["nvcc"] == version():  # another compiler counts otherwise
        assert found == wanted


@each_architecture
def test_accesses_are_16_bytes_wide(build, architecture):
    """Of the kernels that walk over adjacent classes, over parameters or over their per-sample gradients."""
    wide = [rf"\b{access}[.\w]*\.(v4\.[buf]32|v2\.[buf]64)" for access in ("ld", "st")]
    seen = set()
    for kernel, body in build(architecture).ptx.items():
        adjacent = re.match(r"logit_loss_(fwd|bwd|with_grad)_kernel<.*, [01], (true|false)>|(weighted_)?step_kernel", kernel)
        if adjacent:
            seen.add(kernel)
            assert re.search(wide[0], body), kernel
            if "_fwd_" not in kernel:
                assert re.search(wide[1], body), kernel
    sizes = 2 * (6 * 4 + 5 * 3) + 2 * (11 * 2)  # of tables: float32 and bfloat16 have three or four for a form, the others two
    assert len(seen) == 4 * 2 * 3 * 2 + sizes + 4 * 2


def disassembler():
    """cuobjdump, of the CUDA toolkit or from Triton's wheel; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return bundled if bundled and bundled.exists() else None


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """kernel -> its instructions."""
    text = subprocess.run([disassembler(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = (part.split("\n", 1) for part in re.split(r"Function : ", text)[1:])
    return {short(name): re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", body) for name, body in parts}


def loads_together(instructions: list[str], least: int = 4) -> int:
    """At how many places so many loads from memory are under way at once: nothing between them uses what one of them brings."""
    pending, loads, places, counted = {}, 0, 0, False
    for instruction in instructions:
        operation, _, rest = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        read = operands[1:] if not operation.startswith(("ST", "BRA", "EXIT", "RED")) else operands
        used = set(map(int, re.findall(r"\bR(\d+)", " ".join(read))))
        if operation.startswith(("D", "STG.E.64", "STG.E.128")):  # pairs of registers
            used |= {register + 1 for register in used}
        if waited := [pending[register] for register in used if register in pending]:
            pending = {register: load for register, load in pending.items() if load > max(waited)}
            counted = counted and len(set(pending.values())) >= least
        if operation.startswith("LDG") and (target := re.match(r"R(\d+)", operands[0])):
            width = 4 if ".128" in operation else 2 if ".64" in operation else 1
            pending |= {int(target[1]) + j: loads for j in range(width)}
            loads += 1
            if len(set(pending.values())) >= least and not counted:
                places, counted = places + 1, True
    return places


# The loops over losses, over sums of blocks and over gradients that each kernel has. Where they had one serial load a turn,
# robust_fwd, robust_sums and rectified came out with 0 and robust_apply with 1.
LOOPS = {
    "robust_fwd": 2,
    "robust_sums": 2,
    "robust_apply": 2,
    "robust_target": 5,
    "target_loss": 4,
    "robust_weights_dot": 3,
    "robust_weights_bwd": 1,
    "rectified": 2,
    "scale": 1,
    "bounded_loss": 2,
    "weighted_step": 2,
    "logit_loss_fwd": 2,
    "logit_loss_with_grad": 2,
}


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, from a CUDA toolkit or Triton's wheel")
@each_architecture
def test_loads_do_not_wait_for_each_other(build, architecture):
    """Four at once in every loop over losses: one after the other they cost 800 cycles a turn (cuda/weights.cuh kAtOnce)."""
    seen = set()
    for cubin in build(architecture).cubins:
        for kernel, instructions in machine_code(cubin).items():
            name = kernel.partition("_kernel")[0]
            if name in LOOPS:
                seen.add(name)
                assert loads_together(instructions) >= LOOPS[name], kernel
    assert seen == LOOPS.keys()


def test_serial_loads_are_seen():
    serial = ["LDG.E R4, desc[UR4][R2.64]", "FADD R5, R5, R4", "IADD3 R2, R2, 0x4, RZ"] * 8
    together = [f"LDG.E R{r}, desc[UR4][R2.64]" for r in range(4, 8)] + [f"FADD R9, R9, R{r}" for r in range(4, 8)]
    assert loads_together(serial) == 0 and loads_together(together) == 1 and loads_together(together * 3) == 3


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, from a CUDA toolkit or Triton's wheel")
@each_architecture
def test_a_row_does_not_wait_for_its_label(build, architecture):
    """The 16-byte loads of a row come before the comparison of its label with the number of classes, which stops the kernel
    until the label is there. (In the machine code of one kernel, where they are told apart by the fence of the report.)"""
    kernel = "logit_loss_fwd_kernel<bfloat16, float, 1, false>"
    code = next(code[kernel] for code in map(machine_code, build(architecture).cubins) if kernel in code)
    first = next(i for i, text in enumerate(code) if "LDG.E.128" in text)
    report = next(i for i, text in enumerate(code) if "MEMBAR" in text and "SYS" in text)
    assert first < report


@each_architecture
def test_float_kernels_compute_in_float(build, architecture):
    """No double arithmetic in the loops over float32, bfloat16 and float16 (state and numbers are double, once per launch)."""
    for kernel, body in build(architecture).ptx.items():
        if "double" not in kernel and kernel.startswith("logit_loss_bwd_"):
            # of log s' in two parts, once a row
            assert re.findall(r"\b(?:add|mul|fma|sub|div)[.\w]*\.f64", body) in ([], ["sub.f64"]), kernel
