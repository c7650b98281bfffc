#!/usr/bin/env bash
# A series of models by depth, each trained at the default ratio of tokens to parameters, then
# compared: how far does the one dial carry?
#   model     depths 6 8 10 12 14 16, 384 to 1,024 wide, context 2,048, vocabulary 32,768:
#             73M to 537M parameters (N: 23M to 235M)
#   tokens    10.5 a parameter of N: 0.24e9 to 2.5e9, 6.8e9 in all, of climbmix
#   FLOPs     4.3e16 to 4.1e18, 7.6e18 in all
#   hardware  one H100, or eight with NPROC=8
#   time      planned at 40% of the bf16 peak, not measured: 5.4 hours on one, 40 minutes on eight
#   expected  val_bpb falls with every depth; runs/RESULTS.md will have figures once measured.
#             Public marks beyond its largest depth, on eight H100: CORE above 0.2565, that of
#             GPT-2, in 1.65 hours (official, depth 24) and 81.8 ± 0.14 minutes (claimed)
# usage: bash runs/miniseries.sh [DEPTH ...] [flags of every train.py]
#        such as  bash runs/miniseries.sh 2 3 4 --data=corpus.txt
# From the environment: DEPTHS, OUT (out/miniseries), CORE_BUNDLE (a folder: CORE of every model at
# its end), NPROC (above 1: torchrun), RETRY=1 (train failed runs again), TOY=1 (depths 1 2 at toy
# size: half a minute on a CPU). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
# Several may run at the same time.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
given=""
while [[ "${1:-}" =~ ^[0-9]+$ ]]; do given+=" $1"; shift; done
if [ "${TOY:-}" = 1 ]; then default="1 2"; else default="6 8 10 12 14 16"; fi
runs=""
for depth in ${given:-${DEPTHS:-$default}}; do runs+="d$depth: --depth=$depth"$'\n'; done
# trains, prints a table and `nanochat compare` of the completed runs, and last:
# RESULT runs= completed= failed= d6_val_bpb= ...
exec nanochat sweep miniseries "${OUT:-out/miniseries}" "$@" <<<"$runs"
