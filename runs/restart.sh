#!/usr/bin/env bash
# Trains until the run is complete: restarts the command from its newest checkpoint after a crash, a
# kill, or a stop that you did not ask for.
# usage: runs/restart.sh COMMAND ...
#   runs/restart.sh python train.py --depth=4 --model-tag=d4
#   runs/restart.sh torchrun --standalone --nproc_per_node=8 -- train.py --depth=24
# Ends when the run is complete (exit code 0), when the flags or the data are wrong (2), when you
# press Ctrl-C, or after ATTEMPTS failures in a row (default 5) that came within SHORT seconds
# (default 60) of their start: a failure that early would only repeat itself.
set -uo pipefail
attempts="${ATTEMPTS:-5}"
failures=0 asked=0 child="" code=0 ended=75
# Forwards a signal to whatever is running, training or the pause. Training saves before it ends.
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' INT TERM
# Whoever reads the screen, such as tee, may be gone: that does not end this script.
trap '' PIPE

# Runs a command in the background, because bash handles a signal only after a foreground command
# has ended. Sets $code to its exit code.
run() {
    "$@" &
    child=$!
    # the signal may have arrived before there was a child to forward it to
    [ "$asked" = 0 ] || kill -TERM "$child" 2>/dev/null
    wait "$child"; code=$?
    # a signal ends the wait, not the child: wait again
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
    # the child may have ended between the wait and the check above; 127: its code is already known
    wait "$child" 2>/dev/null; again=$?
    [ "$again" = 127 ] || code=$again
    child=""
}

while [ "$asked" = 0 ]; do
    began=$SECONDS
    run "$@" --resume
    ended=$code
    case "$ended" in 0 | 2) exit "$ended" ;; esac
    [ "$asked" = 0 ] || break
    # a run that trained for a while has made progress, so the count starts again
    if [ $((SECONDS - began)) -lt "${SHORT:-60}" ]; then
        failures=$((failures + 1))
    else
        failures=0
    fi
    if [ "$failures" -ge "$attempts" ]; then
        echo "restart.sh: giving up after $failures failures in a row, each within" \
             "${SHORT:-60} s of its start; the last exit code is $ended" >&2
        exit "$ended"
    fi
    pause=$((failures * ${PAUSE:-2}))
    echo "restart.sh: exit code $ended; starting again in $pause s" >&2
    run sleep "$pause"
done
exit "$ended"
