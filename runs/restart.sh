#!/usr/bin/env bash
# Trains until done: starts again, from the newest checkpoint, after a crash, a kill or a stop that you did not ask for.
# usage: runs/restart.sh COMMAND ...      such as  runs/restart.sh python train.py --depth=4 --model-tag=d4
#        runs/restart.sh torchrun --nproc_per_node=8 train.py --depth=24
# Ends when the run is complete (0), when the flags or the data are wrong (2), when you press Ctrl-C, or after ATTEMPTS
# failures in a row (default 5) that came within a minute (SHORT=60 seconds) of the start: what fails at once fails again.
set -uo pipefail
attempts="${ATTEMPTS:-5}" failures=0 asked=0 child="" code=0 ended=75
# a signal is passed on to what runs now, training or the pause; training saves before it ends
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' INT TERM

run() { # a command in the background, so that a signal is heard at once; its exit code in $code
    "$@" &
    child=$!
    [ "$asked" = 0 ] || kill -TERM "$child" 2>/dev/null # it came before there was a child to tell
    wait "$child"; code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # the signal ended the waiting, not the child
    wait "$child" 2>/dev/null; again=$?
    [ "$again" = 127 ] || code=$again # the child ended before it was waited for again; 127: that is known already
    child=""
}

while [ "$asked" = 0 ]; do
    began=$SECONDS
    run "$@" --resume
    ended=$code
    case "$ended" in 0 | 2) exit "$ended" ;; esac
    [ "$asked" = 0 ] || break
    if [ $((SECONDS - began)) -lt "${SHORT:-60}" ]; then failures=$((failures + 1)); else failures=0; fi
    if [ "$failures" -ge "$attempts" ]; then
        echo "restart.sh: $failures failures in a row within a minute of the start (exit code $ended); giving up" >&2
        exit "$ended"
    fi
    pause=$((failures * ${PAUSE:-2}))
    echo "restart.sh: exit code $ended; starting again in $pause s" >&2
    run sleep "$pause"
done
exit "$ended"
