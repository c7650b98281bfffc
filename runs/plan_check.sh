#!/usr/bin/env bash
# Does the model behind `train.py --dry-run --gpus=N` hold? Predicted against measured time and
# memory of a step on 1, 2 and 4 ranks of this CPU, at depths 2, 4 and 6 with 4 rows of 128 tokens a
# rank. Writes bench/plan_d<depth>.json.
#   speeds    from this machine: matrix products, gloo over loopback, and three other depths on one
#             rank
#   goal      off by at most 20%
#   time      4 minutes with --repeats=5
#   expected  memory was off by at most 13%; time by at most 15% in fp32 on cores with AVX512-BF16,
#             by 3 to 32% on cores with AVX2 only (RESULTS.md)
# Run nothing else meanwhile. Arguments go to every `nanochat bench`, such as --repeats=15.
set -euo pipefail
source "$(dirname "$0")/common.sh"
mkdir -p bench
shape="--max-seq-len=128 --vocab-size=1024 --device-batch-size=4 --device-type=cpu --no-compile"
for depth in 2 4 6; do
    step -m nanochat bench --only=plan --depth="$depth" $shape --out="bench/plan_d$depth.json" "$@"
done
# RESULT plan_d2_time_off= plan_d2_memory_off= ... , the largest share by which each was off
step -m nanochat bench --result bench/plan_d2.json bench/plan_d4.json bench/plan_d6.json
