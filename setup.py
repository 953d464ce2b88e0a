"""Builds the kernels with CMake.

If the build fails, the package is installed in pure Python, and `absgd-fast doctor` shows the reason, which is in
`_build_info.json`. With ABSGD_FAST_REQUIRE_NATIVE=1 a failed build is an error. ABSGD_FAST_EAGER=0 leaves out the eager module
(csrc/eager.cpp), which serves the torch of the build alone.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
        why = " ".join(lines[where:][:4]).split("(message): ")[-1].split("(project): ")[-1]
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
            self.cmake(Path(self.build_temp).resolve(), package)
        except RuntimeError as error:
            if os.environ.get("ABSGD_FAST_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"absgd_fast: {error}") from None
            info = dict(
                native=False, host=False, reason=str(error), compiler=None, isas=[], cuda=None, cuda_reason=str(error), torch=None
            )
            (package / "_build_info.json").write_text(json.dumps(info) + "\n")
            print(f"absgd_fast: {error}\nabsgd_fast: installing without native kernels", file=sys.stderr)

    def cmake(self, build, package):
        """Configures, builds and installs. Raises RuntimeError with the reason if one of these fails."""
        # pip with --no-build-isolation runs a venv's Python without the venv's scripts on PATH
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        if not shutil.which("cmake", path=path):
            raise RuntimeError("cmake not found; pip install cmake ninja")
        ninja = ["-GNinja"] if shutil.which("ninja", path=path) else []
        shutil.rmtree(build, ignore_errors=True)  # an old build directory refers to paths of a build environment that is gone
        run_cmake(path, "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}", *ninja)
        if os.environ.get("ABSGD_FAST_EAGER") != "0":
            # It is compiled beside the rest, and the package works without it: torch's C++ classes change.
            try:
                run_cmake(path, "--build", build, "--target", "all", "_eager", "--", "-k", *(["0"] if ninja else []))
            except RuntimeError as error:
                print(f"absgd_fast: the eager module is left out: {error}", file=sys.stderr)
        run_cmake(path, "--build", build)
        run_cmake(path, "--install", build, "--prefix", package)

    def get_outputs(self):
        """No files, because CMake installs the libraries itself."""
        return []

    def get_output_mapping(self):
        """No files, because CMake installs the libraries itself."""
        return {}


setup(ext_modules=[Extension("absgd_fast._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
