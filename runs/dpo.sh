#!/usr/bin/env bash
# Does preference optimization teach what is preferred, and what does it cost? Of a text, how it
# goes on is preferred to the same words in disorder; the pairs that are held out are of text that
# no model has seen.
#   model     depth 3, 96 wide, context 256, bytes: 0.4 million parameters
#   tokens    a seed: 400 steps of 2,048 of text, then one epoch of 1,200 pairs
#   FLOPs     2.2e12 of text and at most 1.7e12 of pairs a seed, 12e12 in all
#   hardware  2 CPU cores
#   time      32 minutes for three seeds beside other programs, which took most of it
#   expected  at least 95% of 200 held-out pairs have the larger reward on the chosen answer, and at
#             most 0.02 bits per byte of text are lost
# usage: bash runs/dpo.sh [flags of every nanochat dpo]
#        such as  SEEDS=1 bash runs/dpo.sh --loss=ipo
# From the environment: SEEDS (how many, default 3: seeds 42, 43, 44), DATA (text; default python,
# the source on this machine), OUT (out/dpo), TOY=1 (toy size: a minute), PYTHON (this python
# is used as it is, and nothing installed). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_seeds
data="${DATA:-python}" out="${OUT:-out/dpo}"
base=(--depth=3 --aspect-ratio=32 --head-dim=32 --max-seq-len=256 --tokenizer=byte --no-compile
      --total-batch-size=2048 --num-iterations=400 --data="$data" --eval-tokens=100000
      --sample-every=-1)
dpo=(--eval-every=25 --sample-every=-1 --no-compile)
pairs=1200 held_out=200
if [ "${TOY:-}" = 1 ]; then
    base+=(--depth=1 --num-iterations=10 --eval-tokens=2000)
    dpo+=(--num-iterations=5 --eval-tokens=2000)
    pairs=40 held_out=10
fi

mkdir -p "$out"
learned="$out/pairs-$pairs.jsonl" kept="$out/held-out-$held_out.jsonl"
[ -e "$learned" ] || "$PYTHON" -m nanochat data pairs "$data" "$learned" --n "$pairs"
[ -e "$kept" ] || "$PYTHON" -m nanochat data pairs "$data" "$kept" --n "$held_out" --held-out
scores=""
for ((seed = 42; seed < 42 + SEEDS; seed++)); do
    "$PYTHON" train.py --out-dir="$out" --model-tag="base$seed" --seed="$seed" "${base[@]}" --resume
    "$PYTHON" -m nanochat dpo "$out/base$seed" --data "$learned" --val-data "$kept" \
        --out-dir="$out" --model-tag="dpo$seed" --seed="$seed" --resume "${dpo[@]}" "$@"
    run="$out/dpo$seed"
    accuracy="$(metric last "$run" val/reward_accuracy)"
    before="$(metric first "$run" base/bpb)"
    after="$(metric last "$run" base/bpb)"
    kl="$(metric last "$run" val/kl)"
    echo "seed $seed: accuracy $accuracy, KL $kl nats an answer, bits per byte $before $after"
    scores+="$accuracy $before $after $kl"$'\n'
done
summary='
    NF == 4 { n++; sum += $1; lost = $3 - $2 }
    NF == 4 && (n == 1 || $1 < low) { low = $1 }
    NF == 4 && (n == 1 || lost > most) { most = lost }
    NF == 4 && $4 > kl { kl = $4 }
    END {
        printf "RESULT runs=%d accuracy_min=%.4f accuracy_mean=%.4f ", runs, low, sum / n
        printf "bpb_lost_max=%.4f kl_max=%.3f\n", most, kl
    }
'
# RESULT runs= accuracy_min= accuracy_mean= bpb_lost_max= kl_max=
awk -v runs="$SEEDS" "$summary" <<<"$scores"
