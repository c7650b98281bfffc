#!/usr/bin/env bash
# A model of your own text: prose, poems, code or settings, from scratch or from the weights of
# another run.
#   model     4 layers, 256 wide, context 512, a vocabulary by the size of the text: 3.1M parameters
#             without the tables of the vocabulary; with INIT_FROM the size of that run
#   tokens    as many as MINUTES allow (default 10), 2,048 a step
#   FLOPs     2.9e7 a token with a vocabulary of 4,096
#   hardware  2 CPU cores or a GPU
#   time      MINUTES of training, and one or two for reading, compilation and evaluation on 2 cores
#   expected  below the compressors gzip and xz on the same text, which the run prints: with
#             MINUTES=3 1.03 bits per byte of stories, gzip 2.40, xz 1.99 (one run). A loss on
#             held-out text that rises while that of training falls: the text is too small for so
#             many epochs, so give fewer MINUTES or a --dropout.
# usage: bash runs/own_text.sh TEXT [flags of train.py]
#        such as  bash runs/own_text.sh ~/poems
#                 INIT_FROM=out/tinystories/4m bash runs/own_text.sh ~/poems --dropout=0.1
#                 bash runs/own_text.sh "$HOME/project/**/*.py"
# TEXT: a folder, of which the .txt, .jsonl and .parquet files are read, or, as of a folder of code,
# where there are none, all files with text; a pattern in quotes; or a file. What is left out of a
# folder is printed.
# From the environment: INIT_FROM (a run folder: its weights, shape, tokenizer), MINUTES, VAL_DATA
# (a file; default: a held-out part of TEXT), PROMPT (of the samples; default: a new document), OUT
# (out/own_text, of TOY out/toy-own_text: the run is OUT/scratch or OUT/tuned), TOY=1 (toy size: a
# minute), PLAN=1 (only print the commands), PYTHON (this python is used as it is, and nothing
# installed). Paths are relative to the repository's root.
# Restartable: an interrupted run is resumed; a complete one is shown again. Ctrl-C saves and ends
# with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
data="${1:-${DATA:-}}" out="${OUT:-out/${TOY:+toy-}own_text}"
if [ -z "$data" ] || [[ "$data" = --* ]]; then
    refuse "TEXT is missing: give a folder of text, such as  bash runs/own_text.sh ~/poems"
fi
[ $# = 0 ] || shift
check_flags "$@"
minutes=10 batch=2048 every=100 max_tokens=200 eval_tokens=200000 compile=(--compile)
depth=4 aspect=64 head_dim=64 context=512
if [ "${TOY:-}" = 1 ]; then
    minutes=0.05 batch=512 every=50 max_tokens=20 eval_tokens=2000 compile=(--no-compile)
    depth=1 aspect=32 head_dim=16 context=64
fi
if [ -n "${INIT_FROM:-}" ]; then
    shape=(--init-from="$INIT_FROM") tag=tuned
else
    shape=(--depth="$depth" --aspect-ratio="$aspect" --head-dim="$head_dim"
           --max-seq-len="$context") tag=scratch
fi
train=(--data="$data" --val-data="${VAL_DATA:-}" "${shape[@]}" --total-batch-size="$batch"
       --target-minutes="${MINUTES:-$minutes}" --eval-every="$every"
       --eval-tokens="$eval_tokens" --sample-every="$every"
       --out-dir="$out" --model-tag="$tag" "${compile[@]}")
run="$out/$tag"

step -m nanochat data inspect "$data"
step train.py "${train[@]}" --resume "$@"
step -m nanochat sample "$run" --prompt "${PROMPT:-}" --num-samples 3 --max-tokens "$max_tokens"
# what was read, what it came to, samples by step, all on one page
step -m nanochat report "$run"
# the model itself, to play with in a browser
remove "$run/play.html"
step -m nanochat export "$run" "$run/play.html" --format html
# RESULT status= val_bpb= tokens= ...
step -m nanochat report "$run" --result
