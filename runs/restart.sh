#!/usr/bin/env bash
# Trains until done: starts again, from the newest checkpoint, after a crash, a kill or a stop that you did not ask for.
# usage: runs/restart.sh COMMAND ...      such as  runs/restart.sh python train.py --depth=4 --model-tag=d4
#        runs/restart.sh torchrun --nproc_per_node=8 train.py --depth=24
# Ends when the run is complete (0), when the flags or the data are wrong (2), when you press Ctrl-C, or after ATTEMPTS
# failures in a row (default 5) that came within a minute of the start: what fails at once fails again.
set -uo pipefail
attempts="${ATTEMPTS:-5}" failures=0 asked=0
trap 'asked=1' INT TERM
while true; do
    began=$SECONDS
    "$@" --resume &
    child=$!
    wait "$child"; code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal woke this script: pass it on, and wait until the run has saved
        kill -TERM "$child"
        wait "$child"; code=$?
    done
    case "$code" in 0 | 2) exit "$code" ;; esac
    [ "$asked" = 1 ] && exit "$code"
    if [ $((SECONDS - began)) -lt 60 ]; then failures=$((failures + 1)); else failures=1; fi
    if [ "$failures" -ge "$attempts" ]; then
        echo "restart.sh: $failures failures in a row within a minute of the start (exit code $code); giving up" >&2
        exit "$code"
    fi
    pause=$((failures * ${PAUSE:-2}))
    echo "restart.sh: exit code $code; starting again in $pause s" >&2
    sleep "$pause"
done
