#!/usr/bin/env bash
# The first hour with a language model: train it, interrupt it, see what it writes so far, resume
# it, and look at the history of losses, rates and gradients.
#   model     SIZE=1m    4 layers, 144 wide, context 128, characters: 1.1M parameters
#             SIZE=5m    4 layers, 256 wide, context 512, vocabulary 2,048:  5.2M
#             SIZE=30m   8 layers, 512 wide, context 512, vocabulary 2,048: 31.5M
#   tokens    1m 2,000 steps of 2,048 of Shakespeare: 4.1M; 5m and 30m 80M of TinyStories
#   FLOPs     1m 2.7e13, 5m 2.1e15, 30m 1.4e16
#   hardware  1m: a laptop; 5m and 30m: one GPU
#   time      1m: 3 minutes on 2 CPU cores, 2 of them training; the others not measured yet
#   expected  4.19 nats at the first step, the logarithm of the vocabulary; 1m 1.48 at the end (one
#             run). After the interruption the run is what it would have been without.
# usage: bash runs/tinyllm.sh [flags of train.py]
#        such as  SIZE=5m bash runs/tinyllm.sh --target-tokens=3e6
# From the environment: SIZE (1m), DATA (default shakespeare for 1m, tinystories for the others,
# which are downloaded; or a file), VAL_DATA (a file; default: a held-out part of DATA), OUT
# (out/tinyllm: the run is OUT/SIZE), TOY=1 (toy size: a minute), PLAN=1 (only print the commands),
# PYTHON (this python is used as it is, and nothing installed). Paths are relative to the
# repository's root.
# Restartable: an interrupted run is resumed; a complete one is shown again. Ctrl-C saves and ends
# with 75.
# Out of memory: halve --device-batch-size first, then --max-seq-len.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_flags "$@"
size="${SIZE:-1m}" out="${OUT:-out/${TOY:+toy-}tinyllm}"
data=tinystories tokenizer=bpe context=512 horizon=(--target-tokens=80e6) stop_at=500
max_tokens=200 eval_tokens=1000000
case "$size" in
    1m) depth=4 aspect=36 head_dim=36 context=128 data=shakespeare tokenizer=char
        horizon=(--num-iterations=2000 --total-batch-size=2048) ;;
    5m) depth=4 aspect=64 head_dim=64 horizon+=(--vocab-size=2048) ;;
    30m) depth=8 aspect=64 head_dim=64 horizon+=(--vocab-size=2048) ;;
    *) refuse "SIZE=$size: give 1m, 5m or 30m" ;;
esac
compile=(--compile)
if [ "${TOY:-}" = 1 ]; then
    depth=1 aspect=32 head_dim=16 context=32 max_tokens=40 eval_tokens=2000 stop_at=100
    compile=(--no-compile)
    case "$size" in
        1m) horizon=(--num-iterations=500 --total-batch-size=512) ;;
        *) horizon=(--target-tokens=150e3 --vocab-size=300) ;;
    esac
fi
train=(--data="${DATA:-$data}" --val-data="${VAL_DATA:-}" --tokenizer="$tokenizer"
       --depth="$depth" --aspect-ratio="$aspect" --head-dim="$head_dim" --max-seq-len="$context"
       "${horizon[@]}" --eval-every="$stop_at" --eval-tokens="$eval_tokens"
       --save-every="$stop_at" --sample-every="$stop_at" --out-dir="$out" --model-tag="$size"
       "${compile[@]}")
run="$out/$size"
# its checkpoint stays, to be sampled beside the last one
saved="$run/checkpoints/step_$(printf %06d "$stop_at")/manifest.json"
# the step of the interruption, of which there is one
stopped_at="$run/stopped_at"

if [ ! -e "$stopped_at" ]; then
    in_background - train.py "${train[@]}" --resume "$@"
    until_true test -e "$saved"
    # as Ctrl-C would: the step is finished and saved. A run that ends meanwhile refuses.
    if [ -z "$background" ] || kill -0 "$background" 2>/dev/null; then
        step -m nanochat jobs stop "$run" || true
    fi
    if [ -n "$background" ]; then
        wait_for_background
        case "$code" in
            75) sed -n 's/^ *"step": \([0-9]*\).*/\1/p' "$run/summary.json" >"$stopped_at" ;;
            0) echo "$run was complete before it could be interrupted" >&2 ;;
            *) exit "$code" ;;
        esac
    fi
fi
step -m nanochat sample "$run" --prompt "The" --max-tokens "$max_tokens"
step train.py "${train[@]}" --resume "$@"
step -m nanochat sample "$run" --step "$stop_at" --step -1 --prompt "The" --max-tokens "$max_tokens"
# the history: loss.png, and report.html with rates, gradient norms and samples as well
step -m nanochat report "$run"
first="$(metric first "$run" train/loss)"
loss="$(metric last "$run" val/loss)"
steps="$(metric last "$run" step)"
stopped=null
[ ! -e "$stopped_at" ] || stopped="$(cat "$stopped_at")"
# RESULT first_loss= val_loss= stopped_at= steps=
result "first_loss=$first val_loss=$loss stopped_at=$stopped steps=$steps"
