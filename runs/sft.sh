#!/usr/bin/env bash
# Does fine-tuning teach a small model to answer? Base models of text are fine-tuned on exercises:
# letters to copy, to reverse and to sort. Held-out exercises are asked before and after.
#   model     depth 3, 96 wide, context 128, bytes: 0.4 million parameters
#   tokens    a seed: 200 steps of 2,048 of text, then 400 steps of 1,024 of conversations
#   FLOPs     2.0e12 a seed, 6.0e12 in all
#   hardware  2 CPU cores
#   time      15 minutes for three seeds beside other programs
#   expected  every task answered exactly in under 5% of the exercises before, in over 90% after
# usage: bash runs/sft.sh [flags of every nanochat sft]
#        such as  SEEDS=1 bash runs/sft.sh --lr-frac=0.1
# From the environment: SEEDS (how many, default 3: seeds 42, 43, 44), DATA (of the base models;
# default python, the source on this machine), TASKS (separated by commas), OUT (out/sft), TOY=1
# (toy size: a minute), PYTHON (this python is used as it is, and nothing installed). Paths are
# relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_seeds
tasks="${TASKS:-copy,reverse,sort}" out="${OUT:-out/sft}"
base=(--depth=3 --aspect-ratio=32 --head-dim=32 --max-seq-len=128 --tokenizer=byte --no-compile
      --total-batch-size=2048 --num-iterations=200 --data="${DATA:-python}" --eval-tokens=100000
      --sample-every=-1)
sft=(--num-iterations=400 --total-batch-size=1024 --eval-every=100 --sample-every=400 --no-compile)
exercises=8000 asked=100
if [ "${TOY:-}" = 1 ]; then
    base+=(--depth=1 --num-iterations=10 --eval-tokens=2000)
    sft+=(--num-iterations=10 --eval-tokens=2000)
    exercises=100 asked=5
fi

mkdir -p "$out"
file="$out/exercises-${tasks//,/-}-$exercises.jsonl"
if [ ! -e "$file" ]; then
    "$PYTHON" -m nanochat data exercises "$file" --tasks "$tasks" --n "$exercises"
fi
scores=""
for ((seed = 42; seed < 42 + SEEDS; seed++)); do
    "$PYTHON" train.py --out-dir="$out" --model-tag="base$seed" --seed="$seed" "${base[@]}" --resume
    "$PYTHON" -m nanochat sft "$out/base$seed" --data "$file" --out-dir="$out" \
        --model-tag="sft$seed" --seed="$seed" --exercises="$tasks" --exercises-per-task="$asked" \
        --resume "${sft[@]}" "$@"
    for task in ${tasks//,/ }; do
        before="$(metric first "$out/sft$seed" "exercises/$task")"
        after="$(metric last "$out/sft$seed" "exercises/$task")"
        echo "seed $seed: $task: $before before, $after after"
        scores+="$before $after"$'\n'
    done
done
summary='
    NF == 2 { n++; sum += $2 }
    NF == 2 && $1 > high { high = $1 }
    NF == 2 && (n == 1 || $2 < low) { low = $2 }
    END {
        format = "RESULT runs=%d before_max=%.4f after_min=%.4f after_mean=%.4f\n"
        printf format, runs, high, low, sum / n
    }
'
# RESULT runs= before_max= after_min= after_mean=  (shares of all exercises of a task and seed)
awk -v runs="$SEEDS" "$summary" <<<"$scores"
