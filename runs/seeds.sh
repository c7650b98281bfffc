#!/usr/bin/env bash
# The noise of one configuration: the same training with several seeds. Smaller differences between
# configurations mean nothing.
#   model     depth 12 unless --depth is given: 768 wide, context 2,048, vocabulary 32,768:
#             286M parameters (N: 110M)
#   tokens    1.16e9 of climbmix a seed
#   FLOPs     9.3e17 a seed, 2.8e18 in all
#   hardware  one H100, or eight with NPROC=8
#   time      planned at 40% of the bf16 peak, not measured: 2 hours on one, 15 minutes on eight
#   expected  a standard deviation of val_bpb far below the difference between neighbouring depths
#             of runs/miniseries.sh
# usage: bash runs/seeds.sh [flags of every train.py]
#        such as  SEEDS=5 bash runs/seeds.sh --depth=4 --data=corpus.txt
# From the environment: SEEDS (how many, default 3: seeds 42, 43, 44), OUT (out/seeds), CORE_BUNDLE
# (a folder: CORE at the end of every run), NPROC (above 1: torchrun), RETRY=1 (train failed runs
# again), TOY=1 (toy size: half a minute on a CPU). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
# Several may run at the same time.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
if [ "${TOY:-}" = 1 ]; then depth=1; else depth=12; fi
if ! [[ "${SEEDS:=3}" =~ ^[1-9][0-9]*$ ]]; then
    echo "seeds.sh: error: SEEDS=$SEEDS: give how many seeds to train" >&2
    exit 2
fi
runs=""
for ((seed = 42; seed < 42 + SEEDS; seed++)); do runs+="seed$seed: --seed=$seed"$'\n'; done
# trains, prints the table, mean and standard deviation, and last:
# RESULT runs= failed= val_bpb_mean= val_bpb_sd= val_bpb_n= ...
exec nanochat sweep seeds "${OUT:-out/seeds}" --depth=$depth "$@" <<<"$runs"
