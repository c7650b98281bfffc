#!/usr/bin/env bash
# Trains one run on several machines. Started on each of them with the same flags, it starts
# torchrun there; the processes meet at the first machine.
# usage: NNODES=2 NODE_RANK=0 HEAD=node0 bash runs/multinode.sh [flags of train.py]
#        NODE_RANK is 0 on the machine HEAD, 1 on the next. runs/slurm.sh does all this on Slurm.
#        To start again by itself after any failure: runs/restart.sh bash runs/multinode.sh ...
# From the environment:
#   NNODES     machines (default 2)
#   NODE_RANK  which of them this is. Empty: torchrun numbers them by host name (its c10d
#              rendezvous; give IFACE as well), so that any may have rank 0; then they have to
#              share OUT
#   HEAD       host name or address of the first machine, which all others can reach
#   PORT       of HEAD, where they meet (29500). Ports above 1024 have to be open between machines
#   NPROC      processes on each machine (default: its GPUs, or 1)
#   IFACE      network interface of the traffic between machines, such as eth0 or ib0, for gloo and
#              NCCL (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are obeyed as well). Without it they
#              choose: gloo what the host's own name leads to, which may be 127.0.1.1
#   DEPTH, OUT, TAG  of the run: --depth (24), --out-dir (out), --model-tag (dDEPTH)
#   PLAN=1     only print the command. PYTHON: this python is used as it is, and nothing installed
# What the machines need: the same checkout, and local files of --data under the same names.
#   OUT        rank 0 alone writes it; with --shard every rank writes its part of a checkpoint, and
#              all have to share it. To resume, every machine reads the newest checkpoint: from a
#              folder that all share, or from a copy of OUT/TAG under the same name. Where one
#              lacks it, all refuse, and say which
#   tokens     each machine keeps its own cache ($NANOCHAT_BASE_DIR) and tokenizes every shard that
#              the run reads, once, with the cores that training leaves. If that is too slow:
#              `nanochat data tokenize` beforehand, on each or into a folder that all share
# A machine that is lost: the others end with exit code 1 and name it, at once if only its processes
# died, after 90 s if it does not answer any more. What was trained since the last save is repeated:
# started again on all machines, or on fewer, the run continues from there (with another number of
# ranks on the same batches, with losses equal to rounding).
# Ends with 0 when the run is complete, 75 when it was stopped or killed and can be resumed, 2 for
# wrong usage, 1 when it failed. torchrun ends with 1 in all these cases, so the status in the
# run's summary.json decides where this machine sees it.
set -euo pipefail
source "$(dirname "$0")/common.sh" ""
for flag in "$@"; do
    case "$flag" in
        --depth*) refuse "$flag: set DEPTH=N instead" ;;
        --out-dir* | --model-tag*) refuse "$flag: set OUT=FOLDER and TAG=NAME instead" ;;
    esac
done
nodes="${NNODES:-2}" node="${NODE_RANK:-}" port="${PORT:-29500}"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || refuse "NNODES=$nodes: give how many machines"
[ -n "${HEAD:-}" ] || refuse "HEAD: give the host name of the first machine"
if [ -n "$node" ] && { ! [[ "$node" =~ ^[0-9]+$ ]] || [ "$node" -ge "$nodes" ]; }; then
    refuse "NODE_RANK=$node: give 0 to $((nodes - 1)), as NNODES=$nodes"
fi
gpus="$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)"
processes="${NPROC:-$((gpus > 0 ? gpus : 1))}"
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || refuse "NPROC=$processes: give processes of a machine"
if [ -n "${IFACE:-}" ]; then
    # gloo runs two exchanges at a time for each name, too few to fill a network with a delay; each
    # name costs a socket for every other rank
    export GLOO_SOCKET_IFNAME="$IFACE,$IFACE,$IFACE,$IFACE" NCCL_SOCKET_IFNAME="$IFACE"
fi
depth="${DEPTH:-24}" out="${OUT:-out}"
tag="${TAG:-d$depth}"
summary="$out/$tag/summary.json"
run=(--depth="$depth" --out-dir="$out" --model-tag="$tag")
torchrun=(-m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes")
if [ -n "$node" ]; then
    torchrun+=(--node-rank="$node" --master-addr="$HEAD" --master-port="$port")
else
    torchrun+=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD:$port" --rdzv-id="$tag")
    # By their own names the machines may not find each other, nor HEAD itself.
    if [ -n "${IFACE:-}" ]; then
        address="$(ip -o address show dev "$IFACE" 2>/dev/null |
            awk '$3 == "inet" { split($4, part, "/"); print part[1]; exit }')"
        [ -n "$address" ] || refuse "IFACE=$IFACE: has no IPv4 address here; see ip address"
        torchrun+=(--local-addr="$address")
        if getent ahostsv4 "$HEAD" | grep -q "^$address "; then
            torchrun+=(--rdzv-conf=is_host=1)
        fi
    fi
fi

# Identifies the summary on disk: every summary is a new file.
written() { stat -c "%i %Y" "$summary" 2>/dev/null || echo none; }

before="$(written)"
in_background - "${torchrun[@]}" -- train.py "${run[@]}" --resume "$@"
[ "${PLAN:-}" != 1 ] || exit 0
wait_for_background
# without a new summary nothing was trained, or this machine does not see it
if [ "$code" != 0 ] && [ "$(written)" != "$before" ]; then
    # running: killed before another status could be written
    grep -Eq '"status": "(stopped|running)"' "$summary" && code=75
fi
# RESULT code=  (as above)
result "code=$code"; exit "$code"
