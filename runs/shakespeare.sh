#!/usr/bin/env bash
# One model of Shakespeare's characters at four stages of its training: what it writes at three
# temperatures, what it loses, and a page that shows both; and the mean of its last checkpoints.
#   model     SIZE=small   4 layers, 192 wide, context 512:  1.8M parameters
#             SIZE=384     6 layers, 384 wide, context 256: 10.9M
#             SIZE=768    12 layers, 768 wide, context 256: 85.7M
#   tokens    small  4,000 steps of 2,048: 8.2M, stages at 0.4, 1.2, 4.1 and 8.2 epochs
#             384    1,800 steps of 8,192: 15M, stages at 0.7, 2, 7 and 15 epochs; with STEPS=24500
#                    at 10, 30, 100 and 200
#             768    6,000 steps of 16,384: 98M, stages at 5, 15, 49 and 98 epochs
#   FLOPs     small 1.1e14, 384 1.0e15, 768 5.2e16
#   hardware  small and 384: 2 CPU cores; 768: one GPU
#   disk      20 checkpoints: small 0.3 GB, 384 1.8 GB, 768 14 GB
#   time      small at most 10 minutes of training on 2 cores with AVX512-BF16, beside other
#             programs; 384 with AMX at 6,000 tokens a second, so 40 minutes (it was paused again
#             and again); 768 not measured yet
#   expected  small 1.39 to 1.41 nats a character at the end (two runs: 1.387 with AVX512-BF16,
#             1.408 with AMX, of which ten minutes were 3,806 steps), 1.379 with the weights of the
#             last five checkpoints averaged (one run); 384 1.447 at its best, step
#             1,560, and 1.474 at the end, when it had memorised more (one run, dropout
#             0.4). Known marks on the last tenth of the text: 1.4697 for the size of 384 in 3
#             minutes on one GPU; a plateau at 1.66 to 1.70 in the lesson that these stages come
#             from; 1.88 for 4 layers, 128 wide, in 3 minutes on a CPU. Losses at different contexts
#             cannot be compared: the beginning of each row is predicted from little.
# usage: bash runs/shakespeare.sh [flags of train.py]
#        such as  SIZE=384 STEPS=5000 bash runs/shakespeare.sh --dropout=0.5
# From the environment: SIZE (small), STEPS (in place of the above; a multiple of 20), DATA (default
# shakespeare, which is downloaded; or a file), VAL_DATA (a file; default: the last tenth), OUT
# (out/shakespeare: the run is OUT/SIZE), TOY=1 (toy size: a minute), PLAN=1 (only print the
# commands), PYTHON (this python is used as it is, and nothing installed). Paths are relative to the
# repository's root.
# Restartable: an interrupted run is resumed; a complete one is shown again. Ctrl-C saves and ends
# with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_flags "$@"
for flag in "$@"; do
    case "$flag" in
        # the stages are parts of it
        --num-iterations* | --target-*) refuse "$flag: set STEPS= instead" ;;
    esac
done
size="${SIZE:-small}" out="${OUT:-out/${TOY:+toy-}shakespeare}"
max_tokens=300 eval_tokens=20000000
case "$size" in
    small) depth=4 head_dim=64 aspect=48 context=512 batch=2048 steps=4000 dropout=0.15 ;;
    384) depth=6 head_dim=64 aspect=64 context=256 batch=8192 steps=1800 dropout=0.4 ;;
    768) depth=12 head_dim=64 aspect=64 context=256 batch=16384 steps=6000 dropout=0.3 ;;
    *) refuse "SIZE=$size: give small, 384 or 768" ;;
esac
compile=(--compile)
if [ "${TOY:-}" = 1 ]; then
    depth=1 head_dim=16 aspect=32 context=32 batch=512 steps=100
    max_tokens=40 eval_tokens=2000 compile=(--no-compile)
fi
steps="${STEPS:-$steps}"
[[ "$steps" =~ ^[1-9][0-9]*$ ]] && [ $((steps % 20)) = 0 ] ||
    refuse "STEPS=$steps: give a multiple of 20, as the stages are twentieths"
part=$((steps / 20))
stages=("$part" $((3 * part)) $((10 * part)) "$steps")
train=(--data="${DATA:-shakespeare}" --val-data="${VAL_DATA:-}" --tokenizer=char
       --depth="$depth" --head-dim="$head_dim" --aspect-ratio="$aspect"
       --max-seq-len="$context" --total-batch-size="$batch"
       --num-iterations="$steps" --dropout="$dropout" --eval-every="$part" --save-every="$part"
       --eval-tokens="$eval_tokens" --sample-every=-1 --out-dir="$out" --model-tag="$size"
       "${compile[@]}")
run="$out/$size"

step train.py "${train[@]}" --resume "$@"
each=()
for stage in "${stages[@]}"; do
    each+=(--step "$stage")
    # their losses and samples are on the page of the report, too
    evaluated "$run" "$stage" || step -m nanochat evaluate "$run" --step "$stage" --bpb \
        --eval-tokens "$eval_tokens" --sample --prompt $'ROMEO:\n' --max-tokens "$max_tokens"
done
step -m nanochat sample "$run" "${each[@]}" --prompt $'ROMEO:\n' --max-tokens "$max_tokens"
step -m nanochat report "$run"
# the stages side by side, at several temperatures
step -m nanochat report "$run" --stages="$(IFS=,; echo "${stages[*]}")" --prompt $'ROMEO:\n' \
    --max-tokens "$max_tokens"
# the model itself, to play with in a browser
remove "$run/play.html"
step -m nanochat export "$run" "$run/play.html" --format html --step best
# of the last quarter of the training
remove "$run-average"
step -m nanochat average "$run" --last 5
losses=""
for stage in "${stages[@]}"; do
    loss="$(metric "$stage" "$run" val/loss)"
    losses+=" loss_$stage=$loss"
done
best="$(metric lowest "$run" val/loss)"
average="$(metric last "$run-average" val/loss)"
seconds="$(metric last "$run" total_training_time)"
# RESULT seconds= best= average= and the loss at each of four steps: loss_STEP=  (nats a character)
result "seconds=$seconds best=$best average=$average$losses"
