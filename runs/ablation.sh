#!/usr/bin/env bash
# What each part is worth: variants of a baseline, one change at a time, all of them with the same
# seeds; differences paired by seed.
#   model     depth 12 unless --depth is given: 768 wide, context 2,048, vocabulary 32,768:
#             286M parameters (N: 110M)
#   variants  runs/ablation.txt: nine besides the baseline
#   tokens    1.16e9 of climbmix a run
#   FLOPs     9.3e17 a run, 9.3e18 in all and for each seed
#   hardware  one H100, or eight with NPROC=8
#   time      planned at 40% of the bf16 peak, not measured: 6.5 hours on one, 50 minutes on eight
#   expected  adamw and llama worse than the baseline; what the others cost is the question
# usage: bash runs/ablation.sh [flags of every train.py]
#        such as  SEEDS=3 bash runs/ablation.sh --depth=4 --data=corpus.txt
# From the environment: VARIANTS (a file of lines NAME: FLAGS, or /dev/stdin for a heredoc; default
# runs/ablation.txt), SEEDS (how many, default 1: seed 42; two or more give standard errors), OUT
# (out/ablation), CORE_BUNDLE, NPROC (above 1: torchrun), RETRY=1 (train failed runs again), TOY=1
# (toy size: a minute on a CPU). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
# Several may run at the same time.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
if [ "${TOY:-}" = 1 ]; then depth=1; else depth=12; fi
refuse() { echo "ablation.sh: error: $1" >&2; exit 2; }
[[ "${SEEDS:=1}" =~ ^[1-9][0-9]*$ ]] || refuse "SEEDS=$SEEDS: give how many seeds to train"
file="${VARIANTS:-runs/ablation.txt}"
if [ ! -r "$file" ] || [ -d "$file" ]; then
    refuse "VARIANTS=$file: cannot be read; give lines NAME: FLAGS"
fi
variants="baseline:"$'\n'"$(cat "$file")"
runs=""
while IFS= read -r line; do
    case "$line" in
        "#"* | "") continue ;;
        *:*) ;;
        *) refuse "'$line': write NAME: FLAGS" ;;
    esac
    for ((seed = 42; seed < 42 + SEEDS; seed++)); do
        runs+="${line%%:*}/seed$seed: ${line#*:} --seed=$seed"$'\n'
    done
done <<<"$variants"
# trains, prints the tables, and last:
# RESULT runs= failed= baseline= and for every variant its difference to the baseline
exec nanochat sweep ablation "${OUT:-out/ablation}" --depth=$depth "$@" <<<"$runs"
