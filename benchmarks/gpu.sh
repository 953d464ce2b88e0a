#!/usr/bin/env bash
# The one command for a machine with an NVIDIA GPU: builds, proves and measures, within ten minutes and without a network.
#
#     benchmarks/gpu.sh [--dry-run] [--no-build] [--rehearse] [OUT_DIR]        (OUT_DIR: benchmarks/results/gpu)
#
# Needs a python3 (or $PYTHON) with torch and CUDA, and nvcc with cmake, or nvcc alone; uses what it finds of ninja, Python.h,
# compute-sanitizer, Liger and the reference package, and says what it did without. It works in build/gpu on a copy of the
# package, so an installation in the source tree stays as it is. Every stage has its own time limit; a stage that fails is
# recorded and the next one runs. What comes out is OUT_DIR/<gpu>.json (described in gpu_report.py), the logs beside it, and the
# tables as the last lines printed. Exit code 1: a build, a test, a sanitizer or a result of ours failed; 2: there is no GPU.
#
#     --dry-run    shows the stages and runs none
#     --no-build   takes the kernels that the last run built
#     --rehearse   everything on the CPU with tiny cases, to try the script itself
set -euo pipefail

readonly LIMIT_BUILD=120 LIMIT_TESTS=175 LIMIT_SANITIZER=60 LIMIT_BENCH=215 LIMIT_ALL=585

usage() { sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "$0"; }
build=1 dry=0 rehearse=0 out=
for argument; do
  case $argument in
    --dry-run) dry=1 ;;
    --no-build) build=0 ;;
    --rehearse) rehearse=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) echo "gpu.sh: unknown option $argument (see --help)" >&2 && exit 2 ;;
    *) out=$argument ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${out:-$root/benchmarks/results/gpu}")
work=$root/build/gpu
tree=$work/tree
python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no ${PYTHON:-python3}; set PYTHON" >&2 && exit 2; }

# what torch says of this machine: the capability of the GPU as nvcc writes it, and its name
if ((rehearse)); then
  capability=90 gpu="none: a rehearsal on the CPU"
else
  found=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu.sh: {sys.executable} has no torch: {error}; set PYTHON")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA GPU; --rehearse tries the script on the CPU")
print("%d%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name())') || exit 2
  read -r capability gpu <<<"$found"
fi

# a virtual environment has its tools beside its Python; nvcc is where torch finds it, or in its usual place
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin
export PATH PYTHONPATH=$tree PYTHONUNBUFFERED=1 CUDAARCHS=$capability-real
export TRITON_CACHE_DIR=$work/cache/triton TORCHINDUCTOR_CACHE_DIR=$work/cache/inductor # what tests compile serves the benchmark
unset ABSGD_FAST_BACKEND ABSGD_FAST_ISA TRITON_INTERPRET
jobs=$(nproc)

# ---- stages: functions of what they do --------------------------------------------------------------------------------

# Headers of pybind11, from torch where the package is missing.
pybind11_or_torchs() {
  "$python" -c 'import pybind11' 2>/dev/null && return
  mkdir -p "$work/torchs"
  echo 'import os, torch; get_include = lambda: os.path.join(torch.__path__[0], "include")' >"$work/torchs/pybind11.py"
  export PYTHONPATH=$PYTHONPATH:$work/torchs
}

with_cmake() {
  local generator=()
  command -v ninja >/dev/null && generator=(-GNinja)
  cmake -S "$root" -B "$work/cmake" "${generator[@]}" -DPython_EXECUTABLE="$python"
  cmake --build "$work/cmake" --parallel "$jobs"
  cmake --install "$work/cmake" --prefix "$tree/absgd_fast"
}

# The CUDA operators alone, without the StepPlan and the CPU's kernels.
with_nvcc() {
  local torch object flags=(-O3 -std=c++17 "-arch=sm_$capability" -DTORCH_TARGET_VERSION=0x020a000000000000 -Xcompiler
    -fPIC,-fvisibility=hidden -I "$root/csrc")
  torch=$("$python" -c 'import torch; print(torch.__path__[0])')
  mkdir -p "$work/objects"
  for object in ops_cuda.cpp cuda/losses.cu cuda/weights.cu cuda/step.cu cuda/tickets.cu; do
    nvcc "${flags[@]}" -isystem "$torch/include" -c "$root/csrc/$object" -o "$work/objects/$(basename "$object").o" &
  done
  wait
  local with=(-ltorch_cpu) there=false
  [[ -e $torch/lib/libtorch_cuda.so ]] && with+=(-ltorch_cuda) there=true
  nvcc -shared -cudart static "$work"/objects/*.o -o "$tree/absgd_fast/_ops_cuda.so" -L "$torch/lib" "${with[@]}"
  "$python" - "$tree/absgd_fast/_build_info.json" "$capability" "$there" <<'PY'
import json, re, subprocess, sys
path, capability, there = sys.argv[1:]
nvcc = re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)[1]
reason = "cmake not found: the CUDA operators alone were built"
info = dict(native=True, host=False, reason=reason, compiler=f"nvcc {nvcc}", isas=[], cuda_reason=None, torch=None)
info["cuda"] = dict(nvcc=nvcc, architectures=[int(capability)], torch_cuda=there == "true")
open(path, "w").write(json.dumps(info) + "\n")
PY
}

stage_build() {
  rm -rf "$work/cmake" "$work/objects"
  pybind11_or_torchs
  if command -v cmake >/dev/null; then with_cmake; else with_nvcc; fi
}

# Every test; and meanwhile, on the other cores, what the benchmark's competitors have to compile.
stage_tests() {
  cd "$tree"
  if ((rehearse)); then
    "$python" tests/test_gpu.py --device cpu --jobs 1 --only test_certain_rows,test_groups --out "$work/tests.json"
    return
  fi
  timeout $((LIMIT_TESTS - 10)) "$python" -m benchmarks.run --suite gpu --prepare &
  local preparing=$! code=0
  "$python" tests/test_gpu.py --jobs $((jobs > 11 ? 8 : jobs > 3 ? jobs / 2 : 1)) --limit $((LIMIT_TESTS - 20)) --out "$work/tests.json" || code=$?
  wait "$preparing" || true
  return "$code"
}

# Our kernels only, each tensor in an allocation of its own, so that a step beyond its end is seen.
sanitize() {
  cd "$tree"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=absgd --target-processes application-only \
    --error-exitcode 9 "${@:2}" "$python" tests/test_gpu.py --backends cuda --only test_tour --jobs 0
}
stage_memcheck() { sanitize memcheck --report-api-errors no; }
stage_racecheck() { sanitize racecheck; }

stage_bench() {
  cd "$tree"
  local options=(--limit $(($1 - 15)))
  ((rehearse)) && options+=(--rehearse --seconds 0.02 --threads 1)
  "$python" -m benchmarks.run --suite gpu --out "$work/bench.json" "${options[@]}"
}

# What is written in Python, without what is built.
copy_sources() {
  mkdir -p "$tree"
  tar -C "$root" --exclude='_*.so' --exclude=_build_info.json --exclude=__pycache__ --exclude=results -cf - absgd_fast benchmarks tests |
    tar -C "$tree" -xf -
}

# ---- running them -----------------------------------------------------------------------------------------------------

export root work tree python capability jobs rehearse LIMIT_TESTS
for name in $(compgen -A function); do export -f "${name?}"; done

# run NAME LIMIT: the stage within its limit and within that of all; its exit code, seconds and limit into stages.txt
run() {
  local name=$1 limit=$2 start=$SECONDS code=0
  ((limit < LIMIT_ALL - start)) || limit=$((LIMIT_ALL - start))
  if ((dry)); then
    echo "$name: at most $2 s"
    declare -f "stage_$name" | sed '1,2d;$d'
    return
  fi
  timeout --kill-after 5 "$((limit > 1 ? limit : 1))" bash -c "set -euo pipefail; stage_$name $limit" >"$work/$name.log" 2>&1 || code=$?
  echo "$name $code $((SECONDS - start)) $limit" >>"$work/stages.txt"
  echo "$name: exit code $code after $((SECONDS - start)) s"
}

echo "gpu.sh: $gpu, $python, results in $out"
if ((!dry)); then
  mkdir -p "$work" "$out"
  rm -f "$work"/*.log "$work"/*.json "$work"/*.txt
  echo "$gpu" >"$work/gpu.txt"
  (cd "$root" && git describe --always --dirty --abbrev=40 2>/dev/null) >"$work/commit.txt" || true
fi
if ((build)); then
  ((dry)) || { rm -rf "$tree" && copy_sources; }
  run build $LIMIT_BUILD
elif ((!dry)); then
  copy_sources
fi
((dry)) || cp "$tree/absgd_fast/_build_info.json" "$work/build.json" || echo "gpu.sh: there are no kernels; the rest shows what runs without"
run tests $LIMIT_TESTS
if command -v compute-sanitizer >/dev/null && ((!rehearse)); then
  for tool in memcheck racecheck; do
    if ((dry)); then run $tool $LIMIT_SANITIZER; else run $tool $LIMIT_SANITIZER & fi
  done
  wait
fi
run bench $LIMIT_BENCH
if ((dry)); then exit 0; fi

cd "$tree"
cp "$work"/*.log "$out"
"$python" -m benchmarks.gpu_report "$work" "$out"
