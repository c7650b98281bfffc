#!/usr/bin/env bash
# Kills a training run again and again, then compares it with an identical run that was never
# interrupted: every weight, loss and sample must be equal, and no checkpoint may be lost. The
# program that reads its screen is killed as well.
# usage: runs/chaos.sh [KILLS] [RANKS] [SEED]
#   default: 50 kills, 1 rank, seed 1; about 10 s a kill on two cores
# Half of the SIGKILLs come at a random moment of the run, half while a checkpoint is being written
# (its hidden folder exists).
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
kills="${1:-50}" ranks="${2:-1}" RANDOM="${3:-1}"
folder="$(mktemp -d)"
clean_up() {
    code=$?
    if [ "$code" = 0 ]; then
        rm -rf "$folder"
    else
        echo "the runs and their log are kept in $folder" >&2
    fi
    exit "$code"
}
trap clean_up EXIT
export OMP_NUM_THREADS=1
start=(python train.py)
[ "$ranks" -gt 1 ] && start=(torchrun --standalone --nproc_per_node="$ranks" -- train.py)
flags=(--data=python --tokenizer=byte --depth=2 --aspect-ratio=32 --head-dim=32 --max-seq-len=128
       --dtype=bfloat16 --dropout=0.1 --total-batch-size=2048 --device-batch-size=$((8 / ranks))
       --num-iterations=$((kills * 40)) --save-every=8 --keep-last=3
       --eval-every=40 --eval-tokens=20000 --sample-every=60 --out-dir="$folder")

train() { "${start[@]}" "${flags[@]}" "$@" >>"$folder/log" 2>&1; }

# step of the newest complete checkpoint, 0 if there is none
newest() {
    find "$folder/broken/checkpoints" -path '*/step_*/manifest.json' 2>/dev/null | sort | tail -1 |
        grep -o 'step_[0-9]*' | grep -o '[0-9]*$' || echo 0
}

saving() { compgen -G "$folder/broken/checkpoints/.step_*" >/dev/null; }

mkfifo "$folder/screen"
train --model-tag=whole
echo "uninterrupted run: $((kills * 40)) steps, ranks: $ranks"
done_kills=0 in_saves=0
while [ "$done_kills" -lt "$kills" ]; do
    before="$(newest)"
    # as with `2>&1 | tee log`; whoever reads the screen is killed as well, some time before
    tee -a "$folder/log" <"$folder/screen" >/dev/null &
    reader=$!
    # without a word from the shell when it is killed
    disown "$reader"
    # a process group of its own, so that one kill reaches torchrun and its workers
    setsid "${start[@]}" "${flags[@]}" --model-tag=broken --resume >"$folder/screen" 2>&1 &
    pid=$!
    { sleep "$((RANDOM % 6)).$((RANDOM % 10))"; kill -9 "$reader" 2>/dev/null || true; } &
    sleep 3
    if [ $((RANDOM % 2)) -eq 0 ]; then
        # let up to two saves pass, then kill in the middle of the next one
        skip=$((RANDOM % 3))
        for _ in $(seq "$((skip + 1))"); do
            until saving || ! kill -0 "$pid" 2>/dev/null; do sleep 0.002; done
            while [ "$skip" -gt 0 ] && saving; do sleep 0.002; done
            skip=$((skip - 1))
        done
        sleep "0.0$((RANDOM % 4))"
    else
        sleep "$((RANDOM % 7)).$((RANDOM % 10))"
    fi
    if ! kill -0 "$pid" 2>/dev/null; then
        wait "$pid" || {
            echo "training ended with exit code $? without being killed, after $done_kills kills"
            tail -20 "$folder/log"
            exit 1
        }
        # the run is complete
        break
    fi
    saving && in_saves=$((in_saves + 1))
    kill -9 -- "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    # torchrun's workers have sessions of their own
    pkill -9 -f -- "--out-dir=$folder --model-tag=broken" 2>/dev/null || true
    done_kills=$((done_kills + 1))
    after="$(newest)"
    if [ "$((10#$after))" -lt "$((10#$before))" ]; then
        echo "a checkpoint was lost: step $before before the kill, now the newest is step $after"
        exit 1
    fi
done
if [ "$done_kills" -lt "$kills" ]; then
    echo "the run was complete after $done_kills of $kills kills; it needs more steps per kill"
    exit 1
fi
train --model-tag=broken --resume
grep -c "is damaged" "$folder/log" >/dev/null && { echo "a checkpoint was damaged"; exit 1; }
nanochat compare --identical "$folder/whole" "$folder/broken"
echo "RESULT kills=$done_kills ranks=$ranks in_saves=$in_saves lost=0"
echo "$done_kills kills, $in_saves while a checkpoint was written or removed: none lost, all exact"
