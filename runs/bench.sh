#!/usr/bin/env bash
# The standard table: how long each part of training takes on this machine. Writes
# bench/<model>.json; compare two machines or two versions with
# `nanochat bench --compare bench/d4.json`.
#   CPU    depth 4 and 6, context 512, vocabulary 4,096, 16 rows; about 10 minutes on 2 cores
#   CUDA   depth 12, 20 and 24, context 2,048, vocabulary 32,768, 16, 8 and 8 rows
# Run nothing else meanwhile. Arguments go to every `nanochat bench`, such as --repeats=15 or
# --only=step.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
mkdir -p bench
if python train.py --depth=4 --dry-run --json | grep -q '"device_type": "cuda"'; then
    shape="--max-seq-len=2048 --vocab-size=32768"
    nanochat bench --depth=12 $shape --device-batch-size=16 --out=bench/d12.json "$@"
    nanochat bench --depth=20 $shape --device-batch-size=8 --out=bench/d20.json "$@"
    nanochat bench --depth=24 $shape --device-batch-size=8 --out=bench/d24.json "$@"
else
    shape="--max-seq-len=512 --vocab-size=4096 --device-batch-size=16"
    nanochat bench --depth=4 $shape --out=bench/d4.json "$@"
    nanochat bench --depth=6 $shape --out=bench/d6.json "$@"
fi
# RESULT d4_tok_per_sec= d4_share_of_peak= ... of a whole training step
nanochat bench --result bench/*.json
