#!/usr/bin/env bash
# A run on an NVIDIA GPU in four calls (docs/gpu.md). The first call needs no GPU; the other three take eleven minutes of one.
#
#     gpu.sh prepare [FOLDER]    builds what the others need into FOLDER (build/gpu): at most 44 MiB, and no path of this machine
#     gpu.sh prove [OUT]         at most 300 s: calls every operator once, runs the tests, then a short benchmark
#     gpu.sh again [OUT]         at most 110 s: runs failed tests again, then more than 2^31 elements, then memcheck
#     gpu.sh measure [OUT]       at most 250 s: runs the benchmark
#
# $PYTHON (python3) must have torch. `prepare` builds for this Python and torch and for $CUDAARCHS (90-real). The other calls run
# from FOLDER, on any machine with the same Python and torch, as `bash FOLDER/gpu.sh CALL`. Each writes CALL.json and CALL.log to
# OUT (FOLDER/results) and prints a table at the end. `prove` also writes what it compiled to caches.tar.zst (or .gz). `again`
# needs prove.json. `again` and `measure` use the caches if they are there. Every stage has a time limit, and the next stage gets
# the time that it did not use. Exit code 1 means that something failed, 2 that the call cannot run here.
#
#     --from DIR    the folder of prove.json and the caches (default: FOLDER)
#     --rehearse    tries the script on the CPU with tiny cases; `prepare` then takes the kernels of the source tree
#     --dry-run     shows the stages and runs none
set -euo pipefail

complain() { echo "gpu.sh: $1" >&2 && exit 2; }
dry=0 rehearse=0 call='' place='' from=''
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --rehearse) rehearse=1 ;;
    --from) shift && from=${1:-} ;;
    -h | --help) sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) complain "unknown option $1 (see --help)" ;;
    *) if [[ -z $call ]]; then call=$1; else place=$1; fi ;;
  esac
  shift
done
[[ $call =~ ^(prepare|prove|again|measure)$ ]] || complain "got '$call', expected prepare, prove, again or measure (see --help)"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || complain "no ${PYTHON:-python3}; set PYTHON"
folder=$root
[[ -e $root/manifest.json ]] || folder=$root/build/gpu
if [[ $call == prepare ]]; then
  [[ ! -e $root/manifest.json ]] || complain "prepare runs in the source tree, but this is a folder that prepare made"
  folder=$(realpath -m "${place:-$folder}") out=$folder
else
  [[ -e $folder/manifest.json ]] || ((dry)) || complain "no manifest.json in $folder; run \`gpu.sh prepare\` first"
  out=$(realpath -m "${place:-$folder/results}")
fi
from=$(realpath -m "${from:-$folder}")
log=$out/$call.log

# a virtual environment has its tools beside its Python; nvcc and the sanitizer are on the path or in the usual folder
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin
# Triton writes absolute paths into its cache, so the cache must be in the same place on every machine of a run
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/absgd_fast_gpu
export PATH PYTHONPATH=$folder:$folder/competitors PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCHINDUCTOR_COMPILE_THREADS=1
unset ABSGD_FAST_BACKEND ABSGD_FAST_ISA TRITON_INTERPRET

# ---- stages ------------------------------------------------------------------------------------------------------------

spare=0 limit=0 name=''

# begin NAME SECONDS: the next `run` is this stage; `limit` becomes its seconds plus the seconds that earlier stages did not use
begin() {
  name=$1 limit=$(($2 + spare))
  ((limit > 0)) || limit=1
  if ((dry)); then echo "$name: at most $2 s"; else echo "==== $name: at most $limit s" >>"$log"; fi
}

# run COMMAND...: runs it within the limit, and writes its output and exit code to the log
run() {
  local start=$SECONDS code=0
  if ((dry)); then echo "    $*" && return; fi
  timeout --kill-after=3 "$limit" "$@" >>"$log" 2>&1 </dev/null || code=$?
  spare=$((limit - SECONDS + start))
  # a command that was killed may have left half a line
  printf '\n==== %s: exit code %s after %s s\n' "$name" "$code" "$((SECONDS - start))" >>"$log"
  echo "$name: exit code $code, $((SECONDS - start)) of $limit s"
  return "$code"
}

# ---- prepare -----------------------------------------------------------------------------------------------------------

native() {
  local made generator=()
  made=$("$python" -c 'import sys, torch; print("cp%d%d-torch" % sys.version_info[:2] + torch.__version__)')
  made=$root/build/$made-$CUDAARCHS
  command -v ninja >/dev/null && generator=(-GNinja)
  cmake -S "$root" -B "$made" "${generator[@]}" -DPython_EXECUTABLE="$python"
  cmake --build "$made" --parallel
  cmake --install "$made" --prefix "$folder/absgd_fast" --strip
}

sources() {
  local built=(--exclude='_*.so' --exclude=_build_info.json --exclude=__pycache__ --exclude=results)
  tar -C "$root" "${built[@]}" -cf - absgd_fast benchmarks tests | tar -C "$folder" -xf -
  echo 'exec bash "$(dirname "${BASH_SOURCE[0]}")/benchmarks/gpu.sh" "$@"' >"$folder/gpu.sh"
}

prepare() {
  export CUDAARCHS=${CUDAARCHS:-90-real}
  if ((!dry)); then
    [[ -z $(ls -A "$folder" 2>/dev/null) || -e $folder/manifest.json ]] || complain "$folder holds something else"
    mkdir -p "$folder"
    # the next run needs the files that an earlier run left there
    find "$folder" -mindepth 1 -maxdepth 1 ! -name prove.json ! -name 'caches.tar.*' -exec rm -rf {} +
    echo '{}' >"$folder/manifest.json"
  fi
  begin sources 20 && run bash -euo pipefail -c sources || return 1
  if ((rehearse)); then
    begin kernels 20 && run cp "$root"/absgd_fast/_*.so "$root/absgd_fast/_build_info.json" "$folder/absgd_fast" || return 1
  else
    begin kernels 1500 && run bash -euo pipefail -c native || return 1
    begin competitors 90
    run "$python" -m pip install --quiet --no-deps --no-compile --only-binary :all: --target "$folder/competitors" \
      liger-kernel absgd ||
      echo "gpu.sh: the competitors' packages cannot be installed; the run goes on without them (see $log)"
  fi
  begin check 60
  if ((!dry)); then cd "$folder"; fi
  run "$python" -m benchmarks.gpu_folder "$folder" --commit "$(commit)" --archs "$CUDAARCHS"
}
commit() { git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown; }

# ---- the stages that need the GPU --------------------------------------------------------------------------------------

# tests NAME BACKENDS PARTS JOBS: runs the tests whose names contain one of the PARTS (all tests if empty) in JOBS processes, and
# writes pieces/NAME.json
tests() {
  local only=$3 how=(--backends "$2" --jobs "$4" --each 30 --limit $((limit - 3)))
  ((rehearse)) && how=(--device cpu --jobs 0) only=${only:-test_certain_rows}
  run "$python" tests/gpu_runner.py --out "$out/pieces/$1.json" --only "$only" "${how[@]}"
}

bench() { # SUITE OPTIONS...
  local tiny=()
  ((rehearse)) && tiny=(--rehearse --seconds 0.01 --threads 1)
  run "$python" -m benchmarks.run --suite "$1" --limit $((limit - 6)) "${@:2}" "${tiny[@]}"
}

# Packs the caches into one archive. If it would be too large, it holds only what Triton compiled.
pack() {
  local parts file=$out/caches.tar.zst with=(zstd -q -9 -T0)
  command -v zstd >/dev/null || file=$out/caches.tar.gz with=(gzip -6)
  mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"
  for parts in "triton inductor" triton; do
    tar -C "$cache" --exclude='tmp.pid_*' --exclude='*.lock' -cf - $parts | "${with[@]}" >"$file"
    (($(stat -c %s "$file") > 16 * 1024 * 1024)) || { cp "$file" "$folder" && return; }
  done
  rm "$file" && echo "the caches are larger than 16 MiB" && return 1
}

unpack() {
  local file
  for file in "$from"/caches.tar.*; do
    [[ -e $file ]] || continue
    mkdir -p "$cache"
    tar -C "$cache" --skip-old-files -xf "$file" || echo "gpu.sh: $file cannot be unpacked; everything is compiled anew"
  done
}

prove() {
  local device=(--device cuda --backends cuda) short=test_tour,test_losses,test_robust_loss,test_step smoke=0
  ((rehearse)) && device=(--device cpu) short=test_certain_rows
  # importing torch takes 20 s and more on a machine that has never read it from its disk
  begin smoke 70
  run "$python" tests/gpu_smoke.py "${device[@]}" --out "$out/pieces/smoke.jsonl" || smoke=$?
  if ((smoke < 2)); then # 0: all passed; 1: some failed, but the process and the device still work
    begin cuda 90 && tests cuda cuda '' 8 || true
    begin compile 45 && bench gpu --prepare || true
    begin triton 60 && tests triton triton,reference '' 14 || true
    begin probe 22 && bench gpu-probe --out "$out/pieces/bench.json" --seconds 0.4 || true
  else # a kernel that breaks its process would break every worker, so only tests without the CUDA kernels are left
    begin triton 60 && tests triton triton,reference "$short" 14 || true
  fi
  begin caches 6 && run bash -euo pipefail -c pack || true
}

again() {
  local failed='' large=test_more_than_2_to_the_31 all=cuda,triton,reference
  ((rehearse)) && large=test_certain_rows
  ((dry)) || failed=$("$python" -m benchmarks.gpu_report failed "$from/prove.json")
  begin failed 38
  if [[ -n $failed ]] || ((dry)); then
    tests failed $all "$failed" 8 || true
  else
    run echo "nothing failed in $from/prove.json" || true
  fi
  begin large 30 && tests large cuda,triton $large 1 || true
  begin memcheck 35
  # our kernels only; each tensor has its own allocation, so memcheck sees every access beyond its end
  if ((rehearse)); then
    run echo "========= ERROR SUMMARY: 0 errors" || true
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool memcheck --report-api-errors no --kernel-name kns=absgd \
      --target-processes application-only --error-exitcode 9 \
      "$python" tests/gpu_runner.py --backends cuda --only test_tour --jobs 0 || true
  fi
}

measure() { begin bench 243 && bench gpu --out "$out/pieces/bench.json" --seconds 1 || true; }

# Reads the log, writes CALL.json and prints the table. It copies prove.json into the folder, for the next call on this machine.
report() {
  local code=0
  if ((dry)); then begin report 5 && return; fi
  timeout --kill-after=1 5 "$python" -m benchmarks.gpu_report call "$call" "$out" --gpu "$gpu" || code=$?
  if [[ $call == prove && -e $out/prove.json ]]; then cp "$out/prove.json" "$folder"; fi
  return "$code"
}

# ---- one call ----------------------------------------------------------------------------------------------------------

export root folder out cache python
export -f native sources pack
if [[ $call == prepare ]]; then
  code=0
  prepare || code=1
  ((dry)) || tail -n 9 "$log" | sed '/^====/d' # the output of the last stage
  exit "$code"
fi
gpu="none: a rehearsal on the CPU"
if ((!rehearse && !dry)); then
  gpu=$(timeout 20 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) && [[ -n $gpu ]] ||
    complain "nvidia-smi shows no GPU; --rehearse tries the script on the CPU"
fi
if ((!dry)); then
  [[ $call != again || -s $from/prove.json ]] ||
    complain "no prove.json in $from, which names the tests to run again; copy it there, or give its folder with --from"
  rm -rf "$out/pieces" && mkdir -p "$out/pieces" && : >"$log"
  cd "$folder"
  unpack
  echo "gpu.sh $call: $gpu"
fi
"$call"
report
