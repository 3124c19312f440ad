#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# One visit to a machine with a GPU: what is there, the tests, the benchmarks. Run from anywhere:
#
#   benchmarks/gpu_session.sh [OUT] [PEERS]     OUT: folder for JSON and logs (default benchmarks/results)
#                                               PEERS: folder with builds of FlashAttention-3 by others
#
# Needs torch with CUDA, Triton, g++, pybind11. Kernels, and Python packages that are missing, come from
# build/gpu_session.tar.xz where that is (benchmarks/gpu_pack.py makes it); else they are compiled at first use.
#
#   STAGES            what runs, in this order (default: all that are named below)
#   BUDGET            seconds for all of it (default 700); each stage has a limit of its own besides
#   SECONDS_PER_CASE  bounds each benchmark case (default 1)
#   DRY=1             no GPU: the simulator stands for it as far as it goes, and benchmarks only list their cases
#
# Logs are written as the stages run. The first failing stage does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
peers=${2:+--peers $(realpath "$2")}
seconds=${SECONDS_PER_CASE:-1}
stages=${STAGES:-build info instructions hopper memcheck decode fwd sweep bwd host triton}
budget=${BUDGET:-700}
dry=${DRY:-0}
pack=build/gpu_session.tar.xz
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0

run() { # run NAME LIMIT COMMAND...: log it, remember a failure
    local name=$1 limit=$2 start=$SECONDS left=$((budget - SECONDS))
    shift 2
    if [ $left -lt 5 ]; then
        echo "== $name: left out, no time"
        status=1
        return
    fi
    timeout --kill-after=10 $((left < limit ? left : limit)) "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit code $code after $((SECONDS - start)) s; $out/$name.log"
    tail -n 5 "$out/$name.log"
    [ $code -eq 0 ] || status=1
}

bench() { # bench NAME LIMIT ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    [ "$dry" = 0 ] || set -- "$@" --list
    run "$name" "$limit" python3 "benchmarks/bench_$name.py" --seconds "$seconds" --out "$out" "$@"
}

unpack() {
    [ -f "$pack" ] || return 0
    rm -rf build/gpu_session && mkdir -p build/gpu_session
    tar -xf "$pack" -C build/gpu_session
    # A checkout takes them without asking what they were built from: not where its sources change.
    [ "$dry" != 0 ] || { rm -rf flash_attn3/_prebuilt && mv build/gpu_session/kernels flash_attn3/_prebuilt; }
    # The machine's own packages come first.
    python3 -c "import pytest, hypothesis, tqdm" 2>/dev/null || export PYTHONPATH=$PWD:$PWD/build/gpu_session/python
}

if [ "$dry" = 0 ]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu,power.draw --format=csv
    library=libcuda.so.1
fi
unpack
for stage in $stages; do
    if [ "$dry" != 0 ] && [ -z "${library:-}" ]; then
        library=$(python3 -m tests.hopper_sim | tail -n 1)
        export FLASH_ATTN3_LIBCUDA=$library
    fi
    case $stage in
        build) run build 120 python3 setup.py -q build_ext --inplace ;;
        info) run info 30 python3 -m flash_attn3 info ;;
        instructions) run instructions 120 python3 -m pytest -q -p no:cacheprovider tests/sim/unit --hardware "$library" ;;
        hopper) run hopper 150 python3 -m pytest -q -p no:cacheprovider --durations=10 tests/gpu/test_hopper_*.py ;;
        memcheck) [ "$dry" != 0 ] || run memcheck 60 compute-sanitizer --tool memcheck python3 -m pytest -q \
            -p no:cacheprovider tests/gpu/test_hopper_fwd.py -k "nothing or strides" ;;
        triton) run triton 120 python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_triton_gpu.py ;;
        host) bench host 40 ;;
        # shellcheck disable=SC2086  # peers is two words or none
        decode | fwd | bwd) bench "$stage" 100 $peers ;;
        sweep) # shellcheck disable=SC2046  # no word or one
            run sweep 90 python3 benchmarks/sweep_fwd.py --seconds "$seconds" --out "$out" $([ "$dry" = 0 ] || echo --list) ;;
        *) echo "no stage $stage" && status=1 ;;
    esac
done
exit $status
