#!/usr/bin/env bash
# Trains a small language model of Python source on a CPU, offline once its packages are installed.
#   model     depth 4, 256 wide, context 512, vocabulary 4,096: 7.3 million parameters
#   data      the Python standard library and the torch package on this machine: 55 MiB, 2% of the
#             files held out
#   training  5 minutes on 2 CPU cores, 2,048 tokens a step: about 4 million tokens and 1.2e14 FLOPs
#             at 12k tokens a second
#   time      about 8 minutes with set-up and compilation
#   expected  val_bpb at most 1.15 (runs/RESULTS.md has the measured values)
# A second start does not overwrite the run: `bash runs/quickstart.sh --resume` continues it.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
RUN=out/quickstart
python train.py --model-tag=quickstart --data=python --depth=4 --max-seq-len=512 \
    --total-batch-size=2048 --target-minutes=5 "$@"
nanochat report $RUN
nanochat sample $RUN --prompt "    def forward(self, x):" --max-tokens 100 --repetition-penalty 1.15
echo "run folder:   $RUN"
echo "loss plot:    $RUN/loss.png"
echo "more samples: nanochat sample $RUN --prompt 'import '"
# RESULT status= val_bpb= tokens= total_training_time= tok_per_sec= mfu= ...
nanochat report $RUN --result
