"""The wheel as a file: its tag, its libraries and their symbols, its size."""

import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PYTHONS, ROOT
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

OF_TORCH = {"libtorch_cpu.so", "libtorch_python.so", "libc10.so"}
OF_OURS = {"absgd_fast_cpu_kernels", "absgd_fast_stream", "PyInit__host", "PyInit__eager"}
OF_THE_LINKER = {"__bss_start", "_edata", "_end", "_init", "_fini"}
SERVED = sorted(
    subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX').split('.')[1])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for python in PYTHONS
)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def libraries(unpacked):
    found = sorted((unpacked / "absgd_fast").glob("*.so"))
    assert found
    return found


def test_tag(wheel, unpacked):
    """Any Python 3 on Linux with GLIBC 2.34."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    tag = re.fullmatch(rf"absgd_fast-{version}-(py3-none-manylinux_2_34_(x86_64|aarch64))\.whl", wheel.name)
    assert tag, wheel.name
    written = (unpacked / f"absgd_fast-{version}.dist-info" / "WHEEL").read_text()
    assert re.findall("^Tag: (.*)", written, re.MULTILINE) == [tag[1]] and "Root-Is-Purelib: false" in written


def test_auditwheel(wheel):
    """The rules of manylinux: which libraries of the system, and which versions of their symbols."""
    program = Path(sys.executable).parent / "auditwheel"
    shown = subprocess.run([program, "show", wheel], capture_output=True, text=True, check=True).stdout
    assert re.search(r'This constrains the platform tag to\s+"manylinux_2_34_', shown), shown


def test_symbols(libraries):
    """The same by reading the libraries: no symbol is newer than the tag says, and no library is needed that it does not name."""
    newest = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
    system = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux-.*\.so\.\d")
    for library in libraries:
        with library.open("rb") as file:
            elf = ELFFile(file)
            needed = [tag.needed for tag in _section(elf, DynamicSection).iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
            versions = [auxiliary.name for _, each in _section(elf, GNUVerNeedSection).iter_versions() for auxiliary in each]
            paths = [tag for tag in _section(elf, DynamicSection).iter_tags() if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        assert not paths, library.name
        assert all(system.fullmatch(name) or name in OF_TORCH for name in needed), (library.name, needed)
        numbered = [re.fullmatch(r"([A-Z]+)_(\d[\d.]*)", version) for version in versions]
        assert all(numbered) and len(numbered) > 3, (library.name, versions)
        for name, number in (match.groups() for match in numbered):
            assert tuple(map(int, number.split("."))) <= newest[name], (library.name, name, number)


def _section(elf, kind):
    return next(section for section in elf.iter_sections() if isinstance(section, kind))


def test_only_what_others_call_is_exported(libraries):
    """Another library of the process must not meet our functions by their names."""
    for library in libraries:
        with library.open("rb") as file:
            symbols = ELFFile(file).get_section_by_name(".dynsym")
            own = {
                s.name for s in symbols.iter_symbols() if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] == "STB_GLOBAL"
            }
        assert own - OF_THE_LINKER <= OF_OURS, (library.name, sorted(own))


def test_stripped(libraries):
    for library in libraries:
        with library.open("rb") as file:
            elf = ELFFile(file)
            assert not [s.name for s in elf.iter_sections() if s.name in (".symtab", ".debug_info")], library.name


def test_modules_of_every_python(libraries, info):
    """_host and _eager know their Python; the operators know none."""
    names = {library.name for library in libraries}
    for module in ("_host", "_eager"):
        assert sorted(name.split(".")[1] for name in names if name.startswith(module)) == SERVED, names
    assert "_ops_cpu.so" in names and info["native"] and info["host"] and info["reason"] is None
    assert ("_ops_cuda.so" in names) == (info["cuda"] is not None)


def test_size(wheel, info):
    limit = 12 if info["cuda"] is None else 40
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size:.1f} MB")
    assert size <= limit


def test_generations_of_gpus(libraries, info):
    """Machine code for each generation, and PTX for the later ones."""
    if info["cuda"] is None:
        pytest.skip("the wheel was built with ABSGD_FAST_CUDA=0")
    assert info["cuda"]["architectures"] == [80, 86, 89, 90, 100, 120] and info["cuda"]["ptx"] == [90]
    with next(path for path in libraries if path.name == "_ops_cuda.so").open("rb") as file:
        code = sorted(embedded(ELFFile(file).get_section_by_name(".nv_fatbin").data()))
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert code == sorted(
        sources
        * [
            *(("ptx", generation) for generation in info["cuda"]["ptx"]),
            *(("elf", generation) for generation in info["cuda"]["architectures"]),
        ]
    )


def embedded(data):
    """What nvcc has put into a library: ("elf" or "ptx", generation) of each piece, by the headers in front of the pieces."""
    at = 0
    while at + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)  # of a translation unit
        if magic != 0xBA55ED50:
            at += 8  # the padding between two of them
            continue
        piece, end = at + header, at + header + size
        while piece < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, piece)
            yield {1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, piece + 28)[0]
            piece += header + size
        at = -(-end // 8) * 8


def test_files(unpacked, info):
    """What the commands and type checkers read is there as in this tree, and nothing of the machine that built the wheel."""
    package = unpacked / "absgd_fast"
    for path in package.rglob("*.py"):
        assert path.read_bytes() == (ROOT / path.relative_to(unpacked)).read_bytes(), (
            f"{path.name} is not this tree's: make wheel"
        )
    assert (package / "py.typed").exists() and (package / "selftest" / "vectors.json").exists()
    assert list(package.rglob("*.toml")) and list(package.rglob("*.jinja"))
    here = {str(ROOT), sys.prefix, str(Path.home())} - {"/"}
    for path in unpacked.rglob("*"):
        if path.is_file():
            contents = path.read_bytes()
            assert not [name for name in here if name.encode() in contents], path.name
    assert {path.name for path in unpacked.iterdir()} == {"absgd_fast", next(unpacked.glob("*.dist-info")).name}
