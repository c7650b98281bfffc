#!/usr/bin/env bash
# Trains a small language model of Python source on a CPU, offline once its packages are installed.
#   model     depth 4, 192 wide, context 512, vocabulary 4,096: 4.9 million parameters
#   data      the Python standard library and the torch package on this machine: 55 MiB, 2% of the
#             files held out
#   training  5 minutes on 2 CPU cores, 4,096 tokens a step: about 8 million tokens and 1.5e14 FLOPs
#             at 27k tokens a second
#   time      about 8 minutes with set-up and compilation
#   expected  val_bpb 0.91 on cores with AVX512-BF16 (n = 2, runs/RESULTS.md), 1.23 with AVX2 only
#             (n = 1), where a smaller model learns more: --aspect-ratio=32 --total-batch-size=2048
# usage: bash runs/quickstart.sh [flags of train.py]
# From the environment: DATA (default python; or a file), VAL_DATA (a file; default: a held-out part
# of DATA), OUT (out, of TOY out/toy: the run is OUT/quickstart), TOY=1 (toy size: a minute),
# PLAN=1 (only print the commands), PYTHON (this python is used as it is, and nothing installed).
# Paths are relative to the repository's root.
# Restartable: an interrupted run is resumed; a complete one is shown again. Ctrl-C saves and ends
# with 75.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_flags "$@"
out="${OUT:-out${TOY:+/toy}}"
depth=4 aspect=48 head_dim=64 context=512 vocab=4096 batch=4096 minutes=5 eval_tokens=20971520
max_tokens=100 compile=(--compile)
if [ "${TOY:-}" = 1 ]; then
    depth=1 aspect=32 head_dim=16 context=64 vocab=300 batch=512 minutes=0.02 eval_tokens=2000
    max_tokens=20 compile=(--no-compile)
fi
train=(--data="${DATA:-python}" --val-data="${VAL_DATA:-}" --depth="$depth"
       --aspect-ratio="$aspect" --head-dim="$head_dim" --max-seq-len="$context"
       --vocab-size="$vocab" --total-batch-size="$batch" --target-minutes="$minutes"
       --eval-tokens="$eval_tokens" --out-dir="$out" --model-tag=quickstart "${compile[@]}")
run="$out/quickstart"

step train.py "${train[@]}" --resume "$@"
step -m nanochat report "$run"
step -m nanochat sample "$run" --prompt "    def forward(self, x):" --max-tokens "$max_tokens" \
    --repetition-penalty 1.15
if [ "${PLAN:-}" != 1 ]; then
    echo "run folder:   $run"
    echo "loss plot:    $run/loss.png"
    echo "more samples: nanochat sample $run --prompt 'import '"
fi
# RESULT status= val_bpb= val_loss= tokens= total_training_time= tok_per_sec= mfu= ...
step -m nanochat report "$run" --result
