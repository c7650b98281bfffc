#!/usr/bin/env bash
# What a slow network between machines costs: two ranks on one host, and one rank on each of two
# hosts, which are network namespaces of this machine with a cable of 1 Gbit/s and 20 ms (there and
# back) between them. Further runs without the limit of rate, without the delay, and without both:
# what raises the speed most when it is left out is what bounds it. Without both, what is lost is
# the work of the cable, a process that carries the packets and takes a part of a core.
#   model     depth 4, 256 wide, context 512
#   tokens    five runs of 40 steps of 16,384
#   hardware  2 CPU cores, root on Linux
#   time      25 minutes; with --num-iterations=10 six, on cores with AVX2 only
#   expected  there 88% of one host's tokens a second (n = 1, RESULTS.md); 72% (n = 2) on cores
#             with AVX512-BF16, which compute five times as fast. An update moves the
#             gradients of all parameters, and then the parameters, between the hosts
# usage: bash runs/two_hosts.sh [flags of every train.py]
#        such as  bash runs/two_hosts.sh --total-batch-size=65536
# From the environment: MEGABITS (a second, default 1000), MILLISECONDS (20), DEPTH (4), DATA
# (default python, the source on this machine), OUT (out/two-hosts), TOY=1 (toy size: two minutes),
# PLAN=1 (only print the commands), PYTHON (this python is used as it is, and nothing installed).
# Paths are relative to the repository's root. Run nothing else meanwhile.
# Restartable: completed runs are skipped, others begin again.
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_flags "$@"
megabits="${MEGABITS:-1000}" milliseconds="${MILLISECONDS:-20}"
out="${OUT:-out/${TOY:+toy-}two-hosts}" steps=40
for number in "$megabits" "$milliseconds"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] ||
        refuse "MEGABITS, MILLISECONDS: $number is no number above 0"
done
export DEPTH="${DEPTH:-4}" OUT="$out" OMP_NUM_THREADS=1 PORT=29500 IFACE=cable HEAD=192.0.2.1
export PYTHON
train=(--data="${DATA:-python}" --max-seq-len=512 --total-batch-size=16384 --device-batch-size=16)
if [ "${TOY:-}" = 1 ]; then
    DEPTH=1 steps=8
    train=(--data="${DATA:-python}" --tokenizer=byte --aspect-ratio=32 --head-dim=32
           --max-seq-len=64 --total-batch-size=512 --no-compile)
fi
train+=(--num-iterations="$steps" --eval-every=-1 --sample-every=-1 --no-save
        --device-type=cpu "$@")

# A command on host 0 or 1, with the environment that it is given as words NAME=VALUE.
on_host() {
    local host="$1"
    shift
    if [ "${PLAN:-}" = 1 ]; then
        echo "ip netns exec two-hosts$host env $*"
    else
        ip netns exec "two-hosts$host" env "$@"
    fi
}

# Lays the cable, or ends with the reason why this machine cannot. cable MEGABITS MILLISECONDS
cable() {
    local said
    if [ "${PLAN:-}" = 1 ]; then
        echo "python tests/hosts.py two-hosts $*"
        return
    fi
    coproc CABLE { exec "$PYTHON" tests/hosts.py two-hosts "$@"; }
    cable_pid="$CABLE_PID" cable_end="${CABLE[1]}"
    read -r said <&"${CABLE[0]}" || true
    [ "$said" = ready ] || fail "${said:-the cable ended}"
}

# It ends with its standard input, and removes the hosts.
end_cable() {
    [ -z "$cable_pid" ] || { exec {cable_end}>&-; wait "$cable_pid" || true; }
    cable_pid=""
}
cable_pid="" cable_end="" other=""
trap '[ -z "$other" ] || kill "$other" 2>/dev/null || true; end_cable' EXIT
trap 'exit 75' TERM

# Tokens a second of the median step of a run, without the first five: speed NAME
speed() {
    sed -n 's/^{"step": \([0-9]*\),.*"train\/tok_per_sec": \([0-9.]*\).*/\1 \2/p' \
        "$out/$1/metrics.jsonl" | awk '$1 >= 5 { print $2 }' | sort -g |
        awk '{ all[NR] = $1 } END { printf "%.0f", all[int((NR + 1) / 2)] }'
}

# Trains once: measure NAME HOSTS RANKS-ON-EACH MEGABITS MILLISECONDS
measure() {
    local name="$1" hosts="$2" ranks="$3" words
    grep -qs '"status": "completed"' "$out/$name/summary.json" && return
    remove "$out/$name"
    [ "${PLAN:-}" = 1 ] || mkdir -p "$out"
    words=(NNODES="$hosts" NPROC="$ranks" TAG="$name" bash runs/multinode.sh "${train[@]}")
    cable "$4" "$5"
    if [ "$hosts" = 2 ] && [ "${PLAN:-}" = 1 ]; then
        on_host 1 NODE_RANK=1 "${words[@]}"
    elif [ "$hosts" = 2 ]; then
        on_host 1 NODE_RANK=1 "${words[@]}" >"$out/host1.log" 2>&1 &
        other=$!
    fi
    on_host 0 NODE_RANK=0 "${words[@]}"
    [ -z "$other" ] || wait "$other"
    other=""
    end_cable
}

measure one_host 1 2 0 0
measure two_hosts 2 1 "$megabits" "$milliseconds"
measure rate_only 2 1 "$megabits" 0
measure delay_only 2 1 0 "$milliseconds"
measure cable_only 2 1 0 0
[ "${PLAN:-}" != 1 ] || exit 0
numbers=""
for name in one_host two_hosts rate_only delay_only cable_only; do
    numbers+="$name=$(speed "$name") "
done
efficiency="$(awk -v two="$(speed two_hosts)" -v one="$(speed one_host)" \
    'BEGIN { printf "%.3f", two / one }')"
# RESULT one_host= two_hosts= rate_only= delay_only= cable_only= (tokens a second) efficiency=
result "${numbers}efficiency=$efficiency"
