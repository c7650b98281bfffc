#!/usr/bin/env bash
# Which model is the best for a given amount of compute? Every depth at every budget of FLOPs; for
# each budget a parabola of the loss against ln N, and its minimum; then the power laws
# N_opt = a C^alpha, D_opt = b C^beta and L(C) = E + A C^-gamma with 95% intervals.
#   model     depths 4 6 8 10 12 14, 256 to 896 wide, context 2,048, vocabulary 32,768:
#             N (matrices and head) 12M to 164M
#   tokens    of climbmix, as many as the budget allows: 42M (depth 14 at 5e16) to 4.7e9 (depth 4
#             at 4e17)
#   FLOPs     24 runs: six at each of 5e16, 1e17, 2e17 and 4e17, 4.5e18 in all
#   hardware  one H100, or eight with NPROC=8
#   time      planned at 40% of the bf16 peak, not measured: 3.1 hours on one, 24 minutes on eight
#   expected  minima inside the range of depths at every budget, alpha and beta near 0.5 and their
#             sum near 1
# usage: bash runs/scaling_laws.sh [--predict=DEPTH or FLOPs] [flags of every train.py]
# --predict names a model beyond those that are run. The loss it should have is written to
# OUT/predictions/ before it is trained, never after, and its error is shown against the interval.
# A depth is trained at the budget whose best model it is, a budget (above 1,000) at its best depth.
# From the environment: BUDGETS, DEPTHS, OUT (out/scaling_laws), PREDICT, CORE_BUNDLE, NPROC (above
# 1: torchrun), RETRY=1 (train failed runs again), TOY=1 (depths 1 to 4 at three budgets and toy
# size: a minute on a CPU). Paths are relative to the repository's root.
# Restartable: completed runs are skipped, interrupted ones resumed. Ctrl-C saves and ends with 75.
# Several may run at the same time: each trains the next run that no other holds. A budget whose
# minimum is not inside the range of depths is left out, with a message.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
case "${1:-}" in
    --predict=*) PREDICT="${1#*=}"; shift ;;
    --predict)
        if [[ $# -lt 2 || "$2" = -* ]]; then
            remedy="give a depth, such as 10, or a budget in FLOPs"
            echo "scaling_laws.sh: error: --predict: $remedy" >&2
            exit 2
        fi
        PREDICT="$2"; shift 2 ;;
esac
export PREDICT="${PREDICT:-}"
budgets="5e16 1e17 2e17 4e17" depths="4 6 8 10 12 14"
if [ "${TOY:-}" = 1 ]; then budgets="2e9 4e9 8e9" depths="1 2 3 4"; fi
runs=""
for budget in ${BUDGETS:-$budgets}; do
    for depth in ${DEPTHS:-$depths}; do
        runs+="$budget/d$depth: --target-flops=$budget --depth=$depth"$'\n'
    done
done
# trains, prints tables and laws, writes results.json and scaling_laws.png, and last:
# RESULT runs= failed= alpha= beta= ratio= E= gamma= ...
exec nanochat sweep scaling_laws "${OUT:-out/scaling_laws}" "$@" <<<"$runs"
