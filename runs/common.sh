# Sourced by the scripts beside it: goes to the repository's root, finds the Python to run with, and
# defines what several scripts need.
# usage: source "$(dirname "$0")/common.sh" [EXTRAS]
# EXTRAS: extras of pyproject.toml, such as [serve], that setup.sh installs.
# From the environment: PYTHON (this python is used as it is, and nothing installed), PLAN=1 (the
# commands given to step and in_background are printed and not run).
if [ -n "${PYTHON:-}" ] || [ "${PLAN:-}" = 1 ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${1:-}"
fi
PYTHON="${PYTHON:-python}"
# Without it bash goes on to the next command where Ctrl-C meets one that has just ended.
trap 'exit 75' INT

# Wrong usage, with the reason and the remedy.
refuse() { echo "${0##*/}: error: $1" >&2; exit 2; }

# Something that should have worked did not.
fail() { echo "${0##*/}: error: $1" >&2; exit 1; }

# Flags of train.py that the commands after it could not follow: check_flags "$@"
check_flags() {
    local flag
    for flag in "$@"; do
        case "$flag" in
            --out-dir* | --model-tag*) refuse "$flag: set OUT=FOLDER instead" ;;
            --data* | --val-data*) refuse "$flag: set DATA=TEXT or VAL_DATA=TEXT instead" ;;
            --dry-run | --no-save) refuse "$flag: leaves nothing to sample; use train.py instead" ;;
        esac
    done
}

# SEEDS: how many, 3 unless it is given.
check_seeds() {
    [[ "${SEEDS:=3}" =~ ^[1-9][0-9]*$ ]] || refuse "SEEDS=$SEEDS: give how many seeds to train"
}

# Runs a command of Python's: step train.py ..., step -m nanochat APP ...
step() {
    if [ "${PLAN:-}" = 1 ]; then
        printf 'python%s\n' "$(printf ' %q' "$@")"
    else
        "$PYTHON" "$@"
    fi
}

# The same in the background, as $background: in_background LOG COMMAND, where LOG is a file for its
# output, or - for the screen. It ends with the script.
background=""
in_background() {
    local log="$1"
    shift
    if [ "${PLAN:-}" = 1 ]; then
        step "$@"
        return
    fi
    trap 'exit 75' TERM
    trap end_background EXIT
    if [ "$log" = - ]; then "$PYTHON" "$@" & else "$PYTHON" "$@" >"$log" 2>&1 & fi
    background=$!
}

# Asks it to end, and waits until it has. Sets $code, its exit code.
code=0
end_background() {
    if [ -n "$background" ]; then
        kill -TERM "$background" 2>/dev/null || true
        wait_for_background
    fi
}

wait_for_background() {
    code=0
    wait "$background" || code=$?
    background=""
}

# Waits until a command succeeds, or what runs in the background has ended.
until_true() {
    if [ -n "$background" ]; then
        until "$@" || ! kill -0 "$background" 2>/dev/null; do sleep 0.1; done
    fi
}

# Removes what an earlier start has made, as an export writes only what is new.
remove() {
    [ "${PLAN:-}" = 1 ] || rm -rf "$1"
}

# A number that the records of a run have: metric WHICH RUN NAME, where WHICH is first, last, lowest
# or a step. Ends with 1, and says which, if it is null there or was never measured.
metric() {
    local of='[0-9]*' all value
    if [ "${PLAN:-}" = 1 ]; then
        return
    fi
    case "$1" in first | last | lowest) ;; *) of="$1" ;; esac
    all="$(sed -n "/^{\"step\": $of,/s|.*\"$3\": \([^,}]*\).*|\1|p" "$2/metrics.jsonl")"
    case "$1" in
        first) value="${all%%$'\n'*}" ;;
        lowest)
            value="$(sort -g <<<"${all//null/inf}")"
            value="${value%%$'\n'*}" ;;
        *) value="${all##*$'\n'}" ;;
    esac
    if ! [[ "$value" =~ ^-?[0-9] ]]; then
        fail "$3 of $2 ($1) is ${value:-missing}, so there is no result; see $2/metrics.jsonl"
    fi
    echo "$value"
}

# Whether `nanochat evaluate` has results of a step of a run: evaluated RUN STEP.
evaluated() {
    [ "${PLAN:-}" != 1 ] && [ -e "$1/evaluations/step_$(printf %06d "$2").json" ]
}

# The last line of a script: result NAME=VALUE ...
result() {
    [ "${PLAN:-}" = 1 ] || echo "RESULT $*"
}
