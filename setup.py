"""Builds the kernels with CMake.

If the build fails, the package is installed in pure Python, and `absgd-fast doctor` shows the reason, which is in
`_build_info.json`. These environment variables change what is built:

ABSGD_FAST_REQUIRE_NATIVE   1 makes a failed build an error
ABSGD_FAST_CUDA             0 leaves out the operators of CUDA, even where there is nvcc; 1 makes it an error that there is none
ABSGD_FAST_EAGER            0 leaves out the eager module (csrc/eager.cpp), which serves the torch of the build alone
ABSGD_FAST_PYTHONS          interpreters, separated by spaces. The modules of Python are built for each of them, and the wheel is
                            tagged py3-none: it then serves every Python, though without these modules where one has none
ABSGD_FAST_URL              the address of the repository, which the links of the package's page on an index then begin with
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PYTHONS = os.environ.get("ABSGD_FAST_PYTHONS", "").split()
URL = os.environ.get("ABSGD_FAST_URL", "").rstrip("/")
CUDA = {"0": "OFF", "1": "ON"}.get(os.environ.get("ABSGD_FAST_CUDA", ""), "AUTO")
NO_TORCH = """
This build does not see torch 2.10 or later, and the kernels are built against its headers. Install torch first.
If it is installed, the build is isolated from it. Install the tools of the build and switch the isolation off:
    pip install torch "setuptools>=77" cmake ninja pybind11
    pip install --no-build-isolation absgd_fast
The page "Installing" of the documentation says how uv and poetry do it."""


def run_cmake(path, *arguments):
    """Runs CMake with this PATH. Raises RuntimeError with the reason if it fails."""
    done = subprocess.run(
        ["cmake", *map(str, arguments)],
        env={**os.environ, "PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        where = next((i for i, line in enumerate(lines) if "error" in line.lower()), -3)
        why = " ".join(lines[where:][:4]).split("Call Stack")[0].split("(message): ")[-1].split("(project): ")[-1].strip()
        raise RuntimeError(f"the kernels could not be built: {why}")


class CMakeBuild(build_ext):
    """Runs CMake instead of building setuptools' extensions."""

    def run(self):
        """Builds into the package's folder; a failure is recorded there, or raised as SystemExit."""
        in_place = self.inplace or self.editable_mode
        package = ROOT / "absgd_fast" if in_place else Path(self.build_lib).resolve() / "absgd_fast"
        package.mkdir(parents=True, exist_ok=True)
        for stale in [*package.glob("_*.so"), package / "_build_info.json"]:
            stale.unlink(missing_ok=True)
        try:
            self.cmake(Path(self.build_temp).resolve(), package, strip=[] if in_place else ["--strip"])
        except RuntimeError as error:
            if "torch >= 2.10 is needed" in str(error):  # in plain torch nobody would see why the package is slow
                raise SystemExit(f"absgd_fast: {error}\n{NO_TORCH}") from None
            if os.environ.get("ABSGD_FAST_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"absgd_fast: {error}") from None
            info = dict(
                native=False, host=False, reason=str(error), compiler=None, isas=[], cuda=None, cuda_reason=str(error), torch=None
            )
            (package / "_build_info.json").write_text(json.dumps(info) + "\n")
            print(f"absgd_fast: {error}\nabsgd_fast: installing without native kernels", file=sys.stderr)

    def cmake(self, build, package, strip):
        """Configures, builds and installs. Raises RuntimeError with the reason if one of these fails."""
        # pip with --no-build-isolation runs a venv's Python without the venv's scripts on PATH
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        if not shutil.which("cmake", path=path):
            raise RuntimeError("cmake not found; pip install cmake ninja")
        ninja = ["-GNinja"] if shutil.which("ninja", path=path) else []
        shutil.rmtree(build, ignore_errors=True)  # an old build directory refers to paths of a build environment that is gone
        pythons = ";".join(PYTHONS)
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DABSGD_PYTHONS={pythons}", f"-DABSGD_CUDA={CUDA}"]
        run_cmake(path, "-S", ROOT, "-B", build, *options, *ninja)
        if os.environ.get("ABSGD_FAST_EAGER") != "0":
            # It is compiled beside the rest, and the package works without it: torch's C++ classes change.
            try:
                run_cmake(path, "--build", build, "--target", "all", "_eager", "--", "-k", *(["0"] if ninja else []))
            except RuntimeError as error:
                print(f"absgd_fast: the eager module is left out: {error}", file=sys.stderr)
        run_cmake(path, "--build", build)
        run_cmake(path, "--install", build, "--prefix", package, *strip)

    def get_outputs(self):
        """No files, because CMake installs the libraries itself."""
        return []

    def get_output_mapping(self):
        """No files, because CMake installs the libraries itself."""
        return {}


class Wheel(bdist_wheel):
    """Tags a wheel that has the modules of several Pythons."""

    def get_tag(self):
        """The tag that says which Pythons, interfaces and machines the wheel serves."""
        python, abi, machine = super().get_tag()
        return ("py3", "none", machine) if PYTHONS else (python, abi, machine)


def page():
    """README.md as an index shows it, which has no other file of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not URL:
        return text
    text = re.sub(r"(!\[[^]]*\])\((?!\w+:)", rf"\1({URL}/raw/HEAD/", text)  # the pictures
    return re.sub(r"(\[[^]]*\])\((?!\w+:|#)", rf"\1({URL}/blob/HEAD/", text)


setup(
    ext_modules=[Extension("absgd_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    long_description=page(),
    long_description_content_type="text/markdown",
    project_urls={"Source": URL, "Changelog": f"{URL}/blob/HEAD/CHANGELOG.md"} if URL else {},
)
