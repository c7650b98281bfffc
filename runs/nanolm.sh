#!/usr/bin/env bash
# A small language model from the raw text: its tokenizer, its training with samples on the way, and
# direct preference optimization (DPO) afterwards.
#   model     6 layers, 256 wide, context 512; grouped queries, 4 heads to one of keys and values;
#             SwiGLU; one table for embedding and head; vocabulary 32,000: 12.4M parameters
#   tokens    312M in 9,521 steps of 64 x 512; AdamW, 200 steps of warm-up, cosine to 10%
#   FLOPs     2.6e16, and DPO on 500 pairs
#   hardware  one GPU; on 2 CPU cores a part of it:
#             VOCAB=4096 --target-tokens=10e6 --total-batch-size=4096
#   time      with VOCAB=4096 --target-tokens=4e6 --total-batch-size=4096 5 minutes of training on 2
#             cores with AMX; the whole of it not measured yet
#   expected  1.67 bits per byte of general English after 4M tokens (one run). A public notebook
#             with a model like this one has a validation loss of 2.47 after 312M tokens at 38,000
#             tokens a second on one consumer GPU. Losses can be compared only on the same text with
#             the same tokenizer.
# usage: bash runs/nanolm.sh [flags of train.py]
#        such as  DATA=corpus.txt VOCAB=4096 bash runs/nanolm.sh --target-tokens=10e6
# From the environment: DATA (default fineweb-edu, which is downloaded; or a file), VAL_DATA (a
# file; default: a held-out part of DATA), VOCAB (32000), PAIRS (a file of preferences: lines of
# prompt, chosen, rejected; default: made of DATA, where what is rejected is the text in disorder),
# OUT (out/nanolm, of TOY out/toy-nanolm), TOY=1 (toy size: a minute), PLAN=1 (only print the
# commands), PYTHON (this python is used as it is, and nothing installed). Paths are relative to the
# repository's root.
# Restartable: what is complete is skipped, what was interrupted is resumed. Ctrl-C saves and ends
# with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_flags "$@"
data="${DATA:-fineweb-edu}" out="${OUT:-out/${TOY:+toy-}nanolm}"
depth=6 aspect=42 head_dim=64 context=512 batch=32768 tokens=312e6 warmup=200 every=1000
vocabulary=32000 tokenizer_bytes=400000000 pairs=500 max_tokens=200 eval_tokens=1000000
compile=(--compile)
if [ "${TOY:-}" = 1 ]; then
    # four heads, one of keys and values
    depth=1 aspect=32 head_dim=8 context=64 batch=512 tokens=30e3 warmup=5 every=50
    vocabulary=300 tokenizer_bytes=100000 pairs=20 max_tokens=20 eval_tokens=2000
    compile=(--no-compile)
fi
vocabulary="${VOCAB:-$vocabulary}"
[[ "$vocabulary" =~ ^[1-9][0-9]*$ ]] || refuse "VOCAB=$vocabulary: give a number of tokens"
tokenizer="$out/tokenizer-$vocabulary" preferences="${PAIRS:-$out/pairs-$pairs.jsonl}"
train=(--data="$data" --val-data="${VAL_DATA:-}" --tokenizer="$tokenizer" --arch=llama
       --depth="$depth" --aspect-ratio="$aspect" --head-dim="$head_dim" --n-kv-head=1
       --tie-embeddings --max-seq-len="$context" --total-batch-size="$batch"
       --target-tokens="$tokens" --optimizer=adamw --lr-schedule=cosine --warmup-steps="$warmup"
       --final-lr-frac=0.1 --grad-clip=1.0 --eval-every="$every" --eval-tokens="$eval_tokens"
       --sample-every="$every" --out-dir="$out" --model-tag=base "${compile[@]}")
dpo=(--beta=0.1 --target-epochs=1 --sample-every=-1 --eval-tokens="$eval_tokens"
     --out-dir="$out" --model-tag=dpo "${compile[@]}")

[ -e "$tokenizer" ] || step -m nanochat tokenizer train "$data" "$tokenizer" --kind bpe \
    --vocab-size "$vocabulary" --max-bytes "$tokenizer_bytes"
# samples during training are drawn at temperature 0.8
step train.py "${train[@]}" --resume "$@"
step -m nanochat report "$out/base"
step -m nanochat sample "$out/base" --prompt "The" --temperature 0.8 --max-tokens "$max_tokens"
[ -e "$preferences" ] || step -m nanochat data pairs "$data" "$preferences" --n "$pairs"
step -m nanochat dpo "$out/base" --data "$preferences" --resume "${dpo[@]}"
step -m nanochat report "$out/dpo"
step -m nanochat sample "$out/base" "$out/dpo" --prompt "The" --temperature 0.8 \
    --max-tokens "$max_tokens"
loss="$(metric last "$out/base" val/loss)"
bpb="$(metric last "$out/base" val/bpb)"
accuracy="$(metric last "$out/dpo" val/reward_accuracy)"
after="$(metric last "$out/dpo" base/bpb)"
# RESULT val_loss= val_bpb= reward_accuracy= bpb_after_dpo=
result "val_loss=$loss val_bpb=$bpb reward_accuracy=$accuracy bpb_after_dpo=$after"
