#!/usr/bin/env bash
# Does nobody regret a horizon? A run is landed at eight points of its way, as `nanochat jobs land`
# does: the warm-down begins at once and takes 15% more steps. Each result is compared with a run
# that was planned for exactly that length.
#   model     depth 4: 256 wide, context 512, 7.3M parameters with a vocabulary of 4,096
#   tokens    2,000 steps of 8,192: 16M, of each text; 5.75 times as many with the runs that are
#             compared: of two texts 190M in 34 runs
#   FLOPs     4.8e14 of the run that is landed, 5.5e15 in all of two texts
#   hardware  one GPU or a CPU; JOBS trainings side by side where there are cores for them
#   time      not measured at this size
#   expected  no landed run more than 0.5% bits per byte worse than its planned one; at 64 wide and
#             800 steps 0.1 to 3.7% better (runs/RESULTS.md)
# usage: bash runs/landing.sh [flags of every train.py]
#        such as  JOBS=6 DATA="python corpus.txt" bash runs/landing.sh --no-compile
# From the environment: DEPTH, STEPS (of the run that is landed), STOPS (percent of it), DATA (texts
# as --data takes them, separated by blanks; default: python), OUT (out/landing), JOBS, NPROC (above
# 1: torchrun), RETRY=1 (train failed runs again), TOY=1 (depth 1, two stops, toy size: a minute on
# a CPU), PYTHON (this python is used as it is, and nothing installed). Paths are relative to the
# repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
# of the runs only what they are at their end is of interest
flags=(--eval-every=1000000000 --sample-every=-1 --core-metric-every=-1)
depth=4 steps=2000 stops="10 20 30 40 50 60 70 85"
if [ "${TOY:-}" = 1 ]; then
    depth=1 steps=200 stops="20 80"
else
    flags+=(--max-seq-len=512 --total-batch-size=8192)
fi
steps="${STEPS:-$steps}" stops="${STOPS:-$stops}" out="${OUT:-out/landing}" jobs="${JOBS:-1}"
for number in "$steps" "$jobs" $stops; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || refuse "STEPS, STOPS, JOBS: $number is no number above 0"
done
for stop in $stops; do
    # the run is saved every 5%
    [ $((stop % 5)) = 0 ] || refuse "STOPS: $stop: give multiples of 5"
    # 15% of a stop are then whole steps
    [ $((steps * stop % 2000)) = 0 ] || refuse "STEPS=$steps: give a multiple of 400"
    [ "$stop" -lt 87 ] || refuse "STOPS: at $stop% the run ends before 15% more"
done

# The run that is landed, and those of the lengths that come out; then the forks that land.
set -f
n=0 first="" planned="" landed=""
for data in ${DATA:-python}; do
    # the end of the path up to a dot, without what is better not in the name of a folder
    text="${data##*/}"
    text="${text%%.*}"
    text="${text//[^[:alnum:]_-]/}"
    n=$((n + 1))
    [[ "$text" = [[:alnum:]]* ]] || text="text$n"
    first+="$text/base: --data=$data --num-iterations=$steps --save-every=$((steps / 20))"$'\n'
    for stop in $stops; do
        step=$((steps * stop / 100))
        line="$text/planned-$step: --data=$data --num-iterations=$((step * 115 / 100))"
        # the longest first, so that none of them is waited for at the end
        planned="$line"$'\n'"$planned"
        landed+="$text/landed-$step: --data=$data"$'\n'
    done
done

# Trains the runs of these lines, in sweeps that share the folder. Each waits for all runs, so the
# output of one is enough.
sweeps=()
trap '[ ${#sweeps[@]} = 0 ] || kill -TERM "${sweeps[@]}" 2>/dev/null || true' INT TERM
exec 3>/dev/null
train() {
    local lines="$1" code=0 to=1 job sweep
    shift
    sweeps=()
    for ((job = 0; job < jobs; job++)); do
        "$PYTHON" -m nanochat sweep landing "$out" --depth="${DEPTH:-$depth}" \
            "${flags[@]}" "$@" <<<"$lines" >&"$to" &
        sweeps+=($!)
        to=3
    done
    for sweep in "${sweeps[@]}"; do
        wait "$sweep" || code=$?
        # a signal ends the wait, not the sweep
        while kill -0 "$sweep" 2>/dev/null; do wait "$sweep" || code=$?; done
    done
    [ "$code" = 0 ] || exit "$code"
}

train "$first$planned" "$@"
for run in $(sed 's/:.*//' <<<"$landed"); do
    if [ ! -e "$out/$run/config.json" ]; then
        "$PYTHON" -m nanochat jobs fork "$out/${run%/*}/base" --out-dir="$out/${run%/*}" \
            --tag="${run##*/}" --step="${run##*-}" --land
    fi
done
# prints the table, and last:
# RESULT runs= completed= failed= pairs= within= worst= mean= and for every pair its difference
train "$first$planned$landed" "$@"
