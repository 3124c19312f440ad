#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# One visit to a machine with a GPU: what is there, the tests, the benchmarks. Run from anywhere:
#
#   benchmarks/gpu_session.sh [OUT] [PEERS]     OUT: folder for JSON and logs (default benchmarks/results)
#                                               PEERS: folder with builds of FlashAttention-3 by others
#
# Needs torch with CUDA, Triton, pytest, tqdm, hypothesis. SECONDS_PER_CASE (default 2) bounds each benchmark case, and
# STAGES (default "tests host decode fwd bwd") chooses what runs. The first failing stage does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
peers=${2:+--peers $(realpath "$2")}
seconds=${SECONDS_PER_CASE:-2}
stages=${STAGES:-tests host decode fwd bwd}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0

run() { # run NAME COMMAND...: log it, remember a failure
    local name=$1 start=$SECONDS
    shift
    "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit code $code after $((SECONDS - start)) s; $out/$name.log"
    tail -n 5 "$out/$name.log"
    [ $code -eq 0 ] || status=1
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu,power.draw --format=csv
run info python3 -m flash_attn3 info
for stage in $stages; do
    case $stage in
        tests) run tests python3 -m pytest tests/gpu -q -x --durations=10 ;;
        host) run host python3 benchmarks/bench_host.py --device cuda --seconds "$seconds" --out "$out" ;;
        # shellcheck disable=SC2086  # peers is two words or none
        *) run "$stage" python3 "benchmarks/bench_$stage.py" --seconds "$seconds" --out "$out" $peers ;;
    esac
done
exit $status
