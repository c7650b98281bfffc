#!/usr/bin/env bash
# Four curves to compare yours with: a run that learns, one that memorises, one that does not move
# and one whose loss jumps. runs/CURVES.md shows and explains them.
#   model     depth 2, 64 wide, context 128, bytes: 0.2 million parameters
#   tokens    four runs of 400 steps of 2,048, the last one of 1,024
#   FLOPs     3.4e12 in all
#   hardware  2 CPU cores
#   time      a minute a run
#   expected  the first learns; the second gets worse on held-out text from some step on; the third
#             stays at ln(vocabulary) = 5.5 nats; the fourth jumps
# usage: bash runs/curves.sh [flags of every train.py]
# From the environment: DATA (default python, the source on this machine), OUT (out/curves), TOY=1
# (toy size), PLAN=1 (only print the commands), PYTHON (this python is used as it is, and nothing
# installed). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, others begin again.
set -euo pipefail
source "$(dirname "$0")/common.sh"
corpus=(--data="${DATA:-python}")
out="${OUT:-out/${TOY:+toy-}curves}" steps=400
[ "${TOY:-}" = 1 ] && steps=20
run=(--depth=2 --aspect-ratio=32 --head-dim=32 --max-seq-len=128 --tokenizer=byte --no-compile
     --total-batch-size=2048 --num-iterations="$steps" --eval-every=$((steps / 20))
     --eval-tokens=50000 --sample-every=-1 --out-dir="$out" --resume)
# a text that is read thirty times: this project's log
log=(--data="$out/log.txt")
if [ "${PLAN:-}" != 1 ]; then
    mkdir -p "$out"
    [ -e "$out/log.txt" ] || cp runs/LOG.md "$out/log.txt"
fi

step train.py "${run[@]}" "${corpus[@]}" --model-tag=learns "$@"
step train.py "${run[@]}" "${log[@]}" --model-tag=memorises "$@"
step train.py "${run[@]}" "${corpus[@]}" --model-tag=stands-still --matrix-lr=1e-5 \
    --embedding-lr=1e-4 --unembedding-lr=1e-5 --scalar-lr=1e-5 "$@"
fast=(--total-batch-size=1024 --optimizer=adamw --matrix-lr=0.1 --embedding-lr=1
      --unembedding-lr=0.1 --warmup-steps=0 --adam-beta2=0.999)
step train.py "${run[@]}" "${corpus[@]}" --model-tag=jumps "${fast[@]}" "$@"
numbers=""
for tag in learns memorises stands-still jumps; do
    step -m nanochat report "$out/$tag"
    lowest="$(metric lowest "$out/$tag" val/bpb)"
    last="$(metric last "$out/$tag" val/bpb)"
    numbers+=" ${tag}_lowest=$lowest ${tag}_last=$last"
done
# RESULT learns_lowest= learns_last= ... (held-out bits per byte)
result "${numbers# }"
