#!/usr/bin/env bash
# A small llama of children's stories: trained, evaluated on held-out stories, exported for
# transformers and served.
#   model     SIZE=4m    4 layers, 256 wide, context 512, vocabulary 2,048:  4.3M parameters
#             SIZE=30m   8 layers, 512 wide, the same context and vocabulary: 27.8M
#   tokens    80M of TinyStories in 2,441 steps
#   FLOPs     4m 2.3e15, 30m 1.5e16
#   hardware  one GPU; on 2 CPU cores a part of it: --target-tokens=3e6
#   time      3e6 tokens: 7 minutes on 2 CPU cores, 5 of them training; 8e6: 8 minutes of training
#             with AVX512-BF16; 80M not measured yet
#   expected  of 2.4 MB of stories, 3e6 tokens (4.7 epochs): 1.03 bits per byte; 8e6 (12.5 epochs)
#             with --dropout=0.1: 1.06 at its best, after 5 epochs, and 1.13 at the end, when it
#             has memorised them (one run each); 80M not measured yet. A public
#             tutorial with a model of this size, context 2,048 and 80M tokens has a loss of 1.46 on
#             its test split, about 0.57 bits per byte, in 2 to 3 minutes on one consumer GPU. Bits
#             per byte can be compared; the loss only with the same tokenizer.
# usage: bash runs/tinystories.sh [flags of train.py]
#        such as  DATA=stories.txt bash runs/tinystories.sh --target-tokens=3e6
# From the environment: SIZE (4m), DATA (default tinystories, which is downloaded; or a file),
# VAL_DATA (a file; default: a held-out part of DATA), TEST (text for the evaluation at the end;
# default: that of the run, which chose nothing), OUT (out/tinystories: the run is OUT/SIZE), TOY=1
# (toy size: a minute), PLAN=1 (only print the commands), PYTHON (this python is used as it is, and
# nothing installed). Paths are relative to the repository's root.
# Restartable: an interrupted run is resumed; a complete one is exported and served again. Ctrl-C
# saves and ends with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh" "[serve,export]"
check_flags "$@"
size="${SIZE:-4m}" out="${OUT:-out/${TOY:+toy-}tinystories}"
prompt="Once upon a time" max_tokens=200
context=512 vocabulary=2048 tokens=80e6 warmup=0.02 every=250 eval_tokens=20000000
case "$size" in
    4m) depth=4 head_dim=64 aspect=64 ;;
    30m) depth=8 head_dim=64 aspect=64 ;;
    *) refuse "SIZE=$size: give 4m or 30m" ;;
esac
compile=(--compile)
if [ "${TOY:-}" = 1 ]; then
    depth=1 head_dim=16 aspect=32 context=64 vocabulary=300 tokens=8e3 every=100
    max_tokens=20 eval_tokens=2000 compile=(--no-compile)
fi
train=(--data="${DATA:-tinystories}" --val-data="${VAL_DATA:-}" --arch=llama --depth="$depth"
       --head-dim="$head_dim" --aspect-ratio="$aspect" --max-seq-len="$context"
       --vocab-size="$vocabulary" --target-tokens="$tokens" --lr-schedule=cosine
       --warmup-ratio="$warmup" --grad-clip=1.0 --eval-every="$every" --sample-every="$every"
       --out-dir="$out" --model-tag="$size" "${compile[@]}")
run="$out/$size"

step train.py "${train[@]}" --resume "$@"
# loss, perplexity, bits per byte and time: $run/evaluations/step_N.md, .json and .csv
steps="$(metric last "$run" step)"
evaluated "$run" "$steps" || step -m nanochat evaluate "$run" --bpb --data "${TEST:-}" \
    --eval-tokens "$eval_tokens" --sample --prompt "$prompt" --max-tokens "$max_tokens"
step -m nanochat report "$run"
remove "$run/huggingface"
step -m nanochat export "$run" "$run/huggingface" --format hf

# a server and its client, on a port that is free
log="$run/serve.log" url=URL
remove "$log"
in_background "$log" -m nanochat serve "$run" --port 0
until_true grep -qs "base URL is" "$log"
if [ "${PLAN:-}" != 1 ]; then
    url="$(sed -n 's/.*base URL is \([^;]*\);.*/\1/p' "$log")"
    [ -n "$url" ] || fail "the server did not start: $(tail -n 3 "$log")"
fi
step -m nanochat client --url "$url" --max-tokens "$max_tokens" --seed 1 "$prompt"
end_background
[ "$code" = 0 ] || fail "the server ended with exit code $code: $(tail -n 3 "$log")"
# RESULT status= val_bpb= tokens= ...
step -m nanochat report "$run" --result
