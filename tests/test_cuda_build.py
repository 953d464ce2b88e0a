"""The CUDA files compile for every generation without spilling, in the registers and shared memory of tests/cuda_resources.json."""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("losses", "weights", "step", "weighted")
ARCHITECTURES = (80, 90, 100)
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


def compiled(file: str, architecture: int, folder: Path) -> dict:
    """kernel -> [registers, bytes of static shared memory, bytes spilled], and the PTX beside it."""
    ptx = folder / f"{file}-{architecture}.ptx"
    source = [NVCC, "-std=c++17", f"-arch=sm_{architecture}", ROOT / "csrc" / "cuda" / f"{file}.cu"]
    subprocess.run([*source, "-ptx", "-o", ptx], check=True)
    done = subprocess.run([*source, "-Xptxas", "-v", "-cubin", "-o", ptx.with_suffix(".cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        shared = re.search(r"(\d+) bytes smem", part)
        out[short(part.split("'")[1])] = [
            int(re.search(r"Used (\d+) registers", part)[1]),
            int(shared[1]) if shared else 0,
            spilled,
        ]
    return out


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")
    jobs = [(file, architecture) for architecture in ARCHITECTURES for file in FILES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(*job, folder), jobs))
    out = {f"sm_{a}": {} for a in ARCHITECTURES}
    for (_, architecture), kernels in zip(jobs, results):
        out[f"sm_{architecture}"] |= kernels
    return folder, out


def test_nothing_spills(builds):
    spilled = {(a, name): row for a, kernels in builds[1].items() for name, row in kernels.items() if row[2]}
    assert not spilled


def test_resources_are_those_of_the_table(builds):
    """So that a change which doubles the registers of a kernel is seen. After a change that is meant:
    ABSGD_WRITE_RESOURCES=1 pytest tests/test_cuda_build.py"""
    found = {a: {name: row[:2] for name, row in sorted(kernels.items())} for a, kernels in builds[1].items()}
    for name in sorted({n for kernels in found.values() for n in kernels}):
        print(f"{name:64}", *(f"{a} {kernels[name][0]:3} registers {kernels[name][1]:5} B" for a, kernels in found.items()))
    if os.environ.get("ABSGD_WRITE_RESOURCES"):
        lines = ",\n".join(
            f' "{a}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {row}" for n, row in kernels.items()) + "\n }"
            for a, kernels in found.items()
        )
        TABLE.write_text(f'{{\n "nvcc": "{version()}",\n{lines}\n}}\n')
    table = json.loads(TABLE.read_text())
    assert {a: kernels.keys() for a, kernels in found.items()} == {a: table[a].keys() for a in found}
    if table["nvcc"] == version():  # another compiler counts otherwise
        assert found == {a: table[a] for a in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_16_bytes_wide(builds, architecture):
    """Of the kernels that walk over adjacent classes, over parameters or over their per-sample gradients."""
    text = "".join((builds[0] / f"{file}-{architecture}.ptx").read_text() for file in ("losses", "step", "weighted"))
    wide = [rf"\b{access}[.\w]*\.(v4\.[buf]32|v2\.[buf]64)" for access in ("ld", "st")]
    seen = set()
    for name, body in re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", text, re.S):
        kernel = short(name)
        adjacent = re.match(r"(robust_)?logit_loss_(fwd|bwd)_kernel<.*, [01], (true|false)>|(weighted_)?step_kernel", kernel)
        if adjacent:
            seen.add(kernel)
            assert re.search(wide[0], body), kernel
            if "_fwd_" not in kernel:
                assert re.search(wide[1], body), kernel
    sizes = 2 * (6 * 4 + 5 * 3) + 2 * (11 * 2)  # of tables: float32 and bfloat16 have three or four for a form, the others two
    assert len(seen) == 4 * 2 * 3 * 2 + sizes + 4 * 2


def test_float_kernels_compute_in_float(builds):
    """No double arithmetic in the loops over float32, bfloat16 and float16 (state and numbers are double, once per launch)."""
    text = (builds[0] / "losses-90.ptx").read_text()
    for name, body in re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", text, re.S):
        kernel = short(name)
        if "double" not in kernel and "_bwd_" in kernel:
            assert not re.search(r"\b(add|mul|fma|sub|div)[.\w]*\.f64", body), kernel
