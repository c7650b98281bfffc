#!/usr/bin/env bash
# GPT-2's level of CORE from nothing: data, tokenizer, training in fp8, CORE over all examples,
# report.
#   model     depth 24: 1,536 wide, context 2,048, vocabulary 32,768: 1.38e9 parameters (N: 730M)
#   tokens    8 a parameter of N: 5.84e9 of climbmix
#   FLOPs     2.89e19
#   hardware  eight H100, or as many as GPUS; one GPU runs the same steps without torchrun
#   time      planned at 40% of the bf16 peak, not measured: 2.61 hours on eight, 20.8 on one
#   cost      20.9 GPU-hours: $63 at $3 each on eight; 20.8 GPU-hours: $62 at $3 each on one
#   expected  CORE above 0.2565, that of GPT-2 (1.6B). Public marks for it on eight H100: 1.65 hours
#             (official), 81.8 ± 0.14 minutes (claimed). Ours is not measured yet.
# usage: bash runs/speedrun.sh [DEPTH [GPUS]] [flags of train.py]
#        such as  bash runs/speedrun.sh 24 8 --run=my-speedrun
# From the environment: OUT (out: the run is OUT/speedrun-dDEPTH), FP8=0 (bf16 instead, for GPUs
# without fp8), CORE_BUNDLE (a folder; else downloaded), TOY=1 (the same commands in the same order
# on two CPU cores in a minute or two: small numbers, text of this repository, no fp8).
# Restartable: started again, it continues where it was; only CORE at the end is measured again.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
mkdir -p "${OUT:-out}"
if [ "${TOY:-}" = 1 ]; then depth=2 gpus=1; else depth=24 gpus=8; fi
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then depth="$1"; shift; fi
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then gpus="$1"; shift; fi
refuse() { echo "speedrun.sh: error: $1" >&2; exit 2; }
[ "$gpus" -ge 1 ] || refuse "GPUS=$gpus: give 1 or more"
# not with TOY=1, which trains on CPUs
present="$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)"
if [ "${TOY:-}" != 1 ] && [ "$present" -gt 0 ] && [ "$gpus" -gt "$present" ]; then
    refuse "GPUS=$gpus: this machine has $present; give at most that many"
fi
# What the other steps rely on. Found out now, not after hours of tokenizing or training.
for flag in "$@"; do
    case "$flag" in
        --depth* | --gpu*) refuse "$flag: give numbers instead: speedrun.sh DEPTH GPUS" ;;
        --out-dir* | --model-tag*) refuse "$flag: set OUT=FOLDER instead" ;;
        --core-bundle*) refuse "$flag: set CORE_BUNDLE=FOLDER instead" ;;
        --data* | --tokenizer* | --vocab-size* | --max-seq-len*)
            refuse "$flag: fixed, as text is tokenized ahead; leave it out, or use train.py" ;;
        --dry-run | --no-save) refuse "$flag: leaves nothing to evaluate; use train.py instead" ;;
    esac
done
# CORE during training: a sample of the examples; afterwards all of them
data=climbmix max_seq_len=2048 sample=500 examples=-1
train=(--depth="$depth" --target-param-data-ratio=8)
if [ "${TOY:-}" = 1 ]; then
    data="${OUT:-out}/toy.txt" max_seq_len=64 sample=1 examples=2
    awk 'FNR == 1 && NR > 1 { print "<|endoftext|>" } { print }' \
        README.md nanochat/*.py nanochat/*/*.py > "$data"
    train=(--depth="$depth" --num-iterations=60 --aspect-ratio=32 --head-dim=32
           --total-batch-size=1024 --eval-every=30 --device-type=cpu --no-compile)
elif [ "${FP8:-1}" != 0 ]; then
    train+=(--fp8)
fi
train+=(--data="$data" --max-seq-len="$max_seq_len" --core-bundle="${CORE_BUNDLE:-}"
        --core-metric-every=1000000000 --core-metric-max-per-task="$sample"
        --out-dir="${OUT:-out}" --model-tag="speedrun-d$depth" "$@")
run="${OUT:-out}/speedrun-d$depth"
start=(python) start_module=(python -m)
if [ "$gpus" -gt 1 ]; then
    # `--` ends torchrun's own options; without it torchrun would read those of the command as well
    start=(torchrun --standalone --nproc_per_node="$gpus" --)
    start_module=(torchrun --standalone --nproc_per_node="$gpus" -m --)
fi

plan="${OUT:-out}/speedrun-d$depth.plan.json"
python train.py "${train[@]}" --resume --dry-run --json --gpus="$gpus" >"$plan"
# prints what is planned; creates the tokenizer as well
nanochat data tokenize "$data" --plan="$plan"
"${start[@]}" train.py "${train[@]}" --resume
"${start_module[@]}" nanochat evaluate "$run" --core --bpb --core-bundle="${CORE_BUNDLE:-}" \
    --max-per-task="$examples" --out="$run/evaluations"
nanochat report "$run"
# RESULT status= val_bpb= ... core= core_low= core_high=
nanochat report "$run" --result
