#!/bin/bash
# Slurm: trains until the run is complete, on one machine or several, however often the job is
# preempted, loses a machine or reaches its time limit.
# usage: DEPTH=24 sbatch [--nodes=2] runs/slurm.sh [flags of train.py]      once
# From the environment: what runs/multinode.sh takes, which runs on each machine of the job: DEPTH,
# TAG (name of the run folder), OUT (its parent, which all machines share), IFACE (network
# interface), PORT, NPROC (default: the GPUs of a machine); and LIMIT.
# Slurm sends SIGTERM two minutes before the end. Training finishes its step, saves, and ends with
# 75; the job then requeues itself, at most LIMIT times (default 3) in a row without progress. A
# job that lost a machine is requeued by Slurm. Either way the next start resumes the run.
#SBATCH --job-name=nanochat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source runs/setup.sh "[gpu]"
export DEPTH="${DEPTH:-24}" OUT="${OUT:-out}"
export TAG="${TAG:-d$DEPTH}" NNODES="${SLURM_NNODES:-1}" NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-}}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)"
# set up just now, once for all machines
export HEAD PYTHON=python

signalled=0 child=""
# Slurm signals this script only; it forwards the signal to srun, and srun to the machines.
trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
# The number of a machine is known only on it. When one ends the others end by themselves; in the
# set-up they may wait for it.
srun --wait=120 \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash runs/multinode.sh "$@"' multinode.sh "$@" &
child=$! code=0
# the signal may have arrived before there was a child to forward it to
[ "$signalled" = 0 ] || kill -TERM "$child" 2>/dev/null || true
wait "$child" || code=$?
# a signal ends the wait, not the child: wait again
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
# srun ends with the largest code of the machines, or of a signal if that ended srun itself
if [ "$signalled" = 1 ] && [ "$code" -gt 128 ]; then code=75; fi

# a full disk that refuses this line does not end the script
echo "exit code: $code" || true
case "$code" in
    0) exit 0 ;;
    75) ;;
    # requeueing would only repeat it
    *) exit 1 ;;
esac
step="$(sed -n 's/^ *"step": \([0-9]*\).*/\1/p' "$OUT/$TAG/summary.json" 2>/dev/null || true)"
notes="$OUT/.$TAG.requeues" step="${step:-unknown}" count="${SLURM_RESTART_COUNT:-0}"
read -r last since 2>/dev/null <"$notes" || { last=none since=0; }
# progress, or a new submission (its restart count begins at 0): the starts without progress are
# counted from here
if [ "$step" != "$last" ] || [ "$count" -lt "$since" ]; then
    since="$count"
    mkdir -p "$OUT"
    echo "$step $since" >"$notes"
fi
if [ $((count - since)) -ge "${LIMIT:-3}" ]; then
    echo "slurm.sh: $((count - since)) starts did not get beyond step $step; not requeued" >&2
    exit 1
fi
# RESULT: that of the run's last start, in runs/multinode.sh
scontrol requeue "$SLURM_JOB_ID"
