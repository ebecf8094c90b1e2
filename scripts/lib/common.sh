# What every script here shares: where things are, how they speak, how they clean up.
# shellcheck shell=bash
#
# Sourced first, by a script that has set `-euo pipefail`.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$PROJECT/target}
[[ $TARGET == /* ]] || TARGET=$PWD/$TARGET
# What is downloaded and built once. May be shared by several checkouts.
PROVISION=${BLOCKPORT_PROVISION:-$TARGET/provision}

# --- speaking: progress goes to stderr, so that stdout stays for results -------------------------------------------

if [[ -t 2 && -z ${NO_COLOR:-} ]]; then
    BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' PLAIN=$'\e[0m'
else
    BOLD='' RED='' GREEN='' YELLOW='' PLAIN=''
fi

say() { printf '%s\n' "$*" >&2; }
step() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*" >&2; }
warn() { printf '%swarning:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }
die() {
    printf '%serror:%s %s\n' "$RED" "$PLAIN" "$*" >&2
    exit 1
}

# The time since START (a former value of $EPOCHREALTIME), as "12.3".
seconds_since() {
    local micros=$((${EPOCHREALTIME//[.,]/} - ${1//[.,]/}))
    printf '%d.%d' $((micros / 1000000)) $((micros / 100000 % 10))
}

# The leading comment of a script is its --help.
print_help() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$1"; }

# --- cleaning up: commands run in reverse order when the script ends, however it ends -------------------------------

AT_EXIT=()
at_exit() { AT_EXIT+=("$*"); }

run_at_exit() {
    local status=$? i
    trap - EXIT ERR
    trap '' INT TERM HUP
    set +e
    for ((i = ${#AT_EXIT[@]} - 1; i >= 0; i--)); do
        eval "${AT_EXIT[i]}"
    done
    exit "$status"
}
trap run_at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Ends a child of ours: politely, then by force. Never fails.
end_process() {
    local pid=$1 i
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# Waits until a condition holds: wait_for SECONDS COMMAND…; fails when the time is up.
wait_for() {
    local deadline=$((${EPOCHREALTIME//[.,]/} + $1 * 1000000))
    shift
    until "$@"; do
        ((${EPOCHREALTIME//[.,]/} < deadline)) || return 1
        sleep 0.05
    done
}

# A directory for sockets, removed at the end. Short, because a socket's path has at most 107 bytes.
make_socket_dir() {
    SOCKETS=$(mktemp -d "${TMPDIR:-/tmp}/blockport.XXXXXX")
    at_exit "rm -rf '$SOCKETS'"
}
