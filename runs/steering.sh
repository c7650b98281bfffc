#!/usr/bin/env bash
# How long the commands of `nanochat jobs` take, from another shell, in each phase of a run: while
# it reads its text, compiles, trains, evaluates, is paused, and with a process that is suspended.
#   model     depth 2: 128 wide, context 256, vocabulary 257; 4,096 tokens a step
#   tokens    few: the runs are stopped, aborted and resumed
#   hardware  two CPU cores
#   time      5 minutes with AVX2 only
#   expected  abort within 1 s, every other command within a step or 5 s. The times are those of
#             whole commands, the start of Python included, which the first row shows alone.
# usage: bash runs/steering.sh [RANKS ...]
#   default: 1 2. Run nothing else meanwhile: on a busy machine Python alone starts in a second.
# From the environment: OUT (a folder for the runs; default: a temporary one, which is deleted),
# PYTHON (this python is used as it is, and nothing installed).
set -euo pipefail
source "$(dirname "$0")/common.sh"
folder="${OUT:-$(mktemp -d)}" pid=""
clean_up() {
    code=$?
    # ranks of torchrun would outlive it
    if [ -n "$pid" ]; then
        "$PYTHON" -m nanochat jobs abort "$run" >/dev/null 2>&1 || kill -KILL "$pid" || true
    fi
    if [ "$code" = 0 ] && [ -z "${OUT:-}" ]; then
        rm -rf "$folder"
    else
        echo "the runs and their logs are kept in $folder" >&2
    fi
    exit "$code"
}
trap clean_up EXIT
mkdir -p "$folder"
# what is found in a cache would not take long
export OMP_NUM_THREADS=1 NANOCHAT_BASE_DIR="$folder/base"
flags=(--data=python --tokenizer=byte --depth=2 --head-dim=64 --max-seq-len=256 --dtype=float32
       --device-type=cpu --total-batch-size=4096 --device-batch-size=4 --num-iterations=100000
       --sample-every=-1 --save-every-minutes=-1 --out-dir="$folder" --resume)

fail() { echo "steering.sh: error: $1; the end of its log:" >&2; tail -5 "$run.log" >&2; exit 1; }

# begins or resumes a run of this name, in the background
begin() {
    local start=("$PYTHON") name="$1-$ranks"
    shift
    if [ "$ranks" -gt 1 ]; then
        start=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$ranks" --)
    fi
    run="$folder/$name"
    "${start[@]}" train.py "${flags[@]}" --model-tag="$name" "$@" >>"$run.log" 2>&1 &
    pid=$!
}

# waits until the run does what begins so
until_it_does() {
    until "$PYTHON" -m nanochat jobs status "$run" --json 2>/dev/null | grep -q "doing\": \"$1"; do
        kill -0 "$pid" 2>/dev/null || fail "$run has ended before it did: $1"
        sleep 0.2
    done
}

# waits until all of the run has ended
until_it_ends() { wait "$pid" 2>/dev/null || true; pid=""; }

in_seconds() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }

row() { printf '%-24s %5s  %-9s %7s  %s\n' "$@"; }

# Runs a command of `nanochat jobs` on the run and prints its time.
n=0 over=0 worst=0 worst_abort=0
timed() {
    local phase="$1" verb="$2" began said ms limit=5000
    shift 2
    began=${EPOCHREALTIME/[.,]/}
    said="$("$PYTHON" -m nanochat jobs "$verb" "$run" "$@" 2>&1 | tail -1)" || true
    ms=$(((${EPOCHREALTIME/[.,]/} - began) / 1000))
    row "$phase" "$ranks" "$verb" "$(in_seconds "$ms")" "${said:0:90}"
    n=$((n + 1))
    if [ "$verb" = abort ]; then
        limit=1000
        [ "$ms" -le "$worst_abort" ] || worst_abort=$ms
    fi
    [ "$ms" -le "$worst" ] || worst=$ms
    [ "$ms" -le "$limit" ] || over=$((over + 1))
}

row phase ranks command seconds "what it said last"
began=${EPOCHREALTIME/[.,]/}
"$PYTHON" -m nanochat jobs list >/dev/null
start_ms=$(((${EPOCHREALTIME/[.,]/} - began) / 1000))
row none - list "$(in_seconds "$start_ms")" ""
[ $# -gt 0 ] || set -- 1 2
for ranks in "$@"; do
    # the text is large, and a vocabulary of it has to be found
    begin reading --tokenizer=bpe --no-compile
    until_it_does "reading the data"
    for verb in status save stop; do timed "reading its text" "$verb"; done
    until_it_ends
    begin reading --tokenizer=bpe --no-compile
    until_it_does "reading the data"
    timed "reading its text" abort
    until_it_ends

    export TORCHINDUCTOR_CACHE_DIR="$folder/kernels$RANDOM"
    begin compiling
    until_it_does building
    for verb in status save stop; do timed compiling "$verb"; done
    until_it_ends
    export TORCHINDUCTOR_CACHE_DIR="$folder/kernels$RANDOM"
    begin compiling
    until_it_does building
    timed compiling abort
    until_it_ends

    begin training --no-compile --eval-every=-1
    until_it_does step
    for verb in status save pause; do timed training "$verb"; done
    for verb in status save continue; do timed paused "$verb"; done
    timed training set --save-every=1000
    timed training land --minutes=60
    timed training pause
    timed paused stop
    until_it_ends
    begin training --no-compile
    until_it_does step
    timed training stop
    until_it_ends
    begin training --no-compile
    until_it_does step
    timed training abort
    until_it_ends
    for ((rank = 0; rank < ranks; rank++)); do
        begin training --no-compile
        until_it_does step
        # job.json lists the processes by rank
        stopped="$(grep -o '"pid": *[0-9]*' "$run/job.json" | grep -o '[0-9]*$' |
            sed -n "$((rank + 1))p")"
        kill -STOP "$stopped"
        timed "rank $rank is suspended" abort
        until_it_ends
    done

    begin evaluating --no-compile --eval-every=2
    until_it_does "the evaluation"
    for verb in status save pause; do timed evaluating "$verb"; done
    for verb in save continue; do timed paused "$verb"; done
    timed evaluating set --patience=5
    timed evaluating land --minutes=60
    timed evaluating stop
    until_it_ends
    begin evaluating --no-compile
    until_it_does "the evaluation"
    timed evaluating abort
    until_it_ends
done
# RESULT commands= over= worst_ms= worst_abort_ms= start_ms=
echo "RESULT commands=$n over=$over worst_ms=$worst worst_abort_ms=$worst_abort start_ms=$start_ms"
