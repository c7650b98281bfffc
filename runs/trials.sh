#!/usr/bin/env bash
# Does `nanochat sweep try` tell a change from chance? Trials without a change (A/A: the second run
# of a pair has another seed and nothing else), and trials of a planted gain: 5% more steps, which
# at this size are worth about 1% of the bits per byte.
#   model     depth 2: 64 wide, context 64, bytes: 0.15 million parameters
#   tokens    200 steps of 1,024 bytes a run; at most 48 runs: 10M
#   FLOPs     1.6e11 a run, 7.6e12 in all
#   hardware  2 CPU cores
#   time      13 minutes beside other programs; half of it are the 120 trials
#   expected  at most 5% of the A/A trials say keep; at least 80% of the trials of the planted gain,
#             after at most 60% of the runs that they could have trained. On stories, one run: 0%;
#             all, after 38%
# All trials draw their 8 seeds from one pool of 16, without replacement, and a run that an earlier
# trial has trained is used again. So the trials of a kind are not independent of each other, and
# costs are counted in pairs, as if each trial had trained its own. The bound on the error does not
# rest on these trials but on the test (nanochat/apps/sweep/sequential.py), which
# tests/test_sweep_try.py simulates with new numbers.
# usage: bash runs/trials.sh [flags of every train.py]
#        such as  TRIALS=20 bash runs/trials.sh --data=corpus.txt
# From the environment: TRIALS (of each kind, default 60), POOL (seeds, default 16), STEPS (of each
# run, default 200), OUT (out/trials, for a toy out/toy-trials), RETRY=1 (train failed runs again),
# TOY=1 (toy size: a minute), PYTHON (this python is used as it is, and nothing installed). Paths
# are relative to the repository's root.
# Restartable: completed runs are used again, interrupted ones resumed. Ctrl-C ends with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
trials=60 pool=16 pairs=8 steps=200
# of the runs only what they are at their end is of interest
flags=(--no-save --eval-every=1000000000 --sample-every=-1 --core-metric-every=-1)
if [ "${TOY:-}" = 1 ]; then
    trials=2 pool=3 pairs=3 steps=20 flags+=(--depth=1)
else
    flags+=(--depth=2 --aspect-ratio=32 --head-dim=32 --max-seq-len=64 --tokenizer=byte --no-compile
            --total-batch-size=1024 --data=python --eval-tokens=65536)
fi
trials="${TRIALS:-$trials}" pool="${POOL:-$pool}" steps="${STEPS:-$steps}"
out="${OUT:-out/${TOY:+toy-}trials}"
for number in "$trials" "$pool" "$steps"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || refuse "TRIALS, POOL, STEPS: $number is no number above 0"
done
[ "$pool" -ge "$pairs" ] || refuse "POOL=$pool: a trial needs $pairs seeds; give at least as many"
[ $((steps % 20)) = 0 ] || refuse "STEPS=$steps: give a multiple of 20, of which 5% are whole steps"

# what comes later on a command line wins
flags+=("$@")

# The same draws every time, so that a second start finds its runs.
draw='
import random, sys
kind, trials, pool, pairs = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(kind)
for _ in range(trials):
    print(*rng.sample(range(42, 42 + pool), pairs), sep=",")
'

# One trial: try_it LOG FLAGS
try_it() {
    local log="$1"
    shift
    in_background "$log" -m nanochat sweep try "$out" --num-iterations="$steps" "${flags[@]}" "$@"
    wait_for_background
    if [ "$code" != 0 ]; then
        tail -n 3 "$log" >&2
        exit "$code"
    fi
}

# All trials of a kind: try_all KIND FLAGS. Sets $kept, $cost and $gain: the share that says keep,
# the mean share of the pairs, and the mean of the gains.
try_all() {
    local kind="$1" n=0 seeds lines="" line
    shift
    for seeds in $("$PYTHON" -c "$draw" "$kind" "$trials" "$pool" "$pairs"); do
        n=$((n + 1))
        try_it "$out/$kind.log" --seeds="$seeds" "$@"
        line="$(tail -n 1 "$out/$kind.log")"
        echo "$kind $n of $trials: ${line#RESULT }"
        lines+="$line"$'\n'
    done
    read -r kept cost gain <<<"$(awk "$summary" <<<"$lines")"
}
summary='
    NF { n++; split($3, gain, "="); split($5, cost, "="); gains += gain[2]; costs += cost[2] }
    $2 == "verdict=\"keep\"" { kept++ }
    END { printf "%.4f %.4f %.5f", kept / n, costs / n, gains / n }
'

mkdir -p "$out"
try_it "$out/noise.log" --measure-noise --seeds="$(seq -s, 42 $((41 + pool)))"
tail -n 2 "$out/noise.log"
try_all aa --aa
aa="aa_keep=$kept aa_cost=$cost"
try_all planted --change="--num-iterations=$((steps * 21 / 20))"
# RESULT trials= aa_keep= aa_cost= planted_found= planted_cost= planted_gain=  (all are shares)
result "trials=$trials $aa planted_found=$kept planted_cost=$cost planted_gain=$gain"
