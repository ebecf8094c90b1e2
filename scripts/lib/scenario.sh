# What a test scenario (tests/guest/*.sh, scripts/foreign-clients) stands on: one directory, checks, test data.
# shellcheck shell=bash
#
# A scenario passes when it ends with status 0. It prints `SKIP name: reason` and ends with 77 if it cannot run here.
# It judges by what the host finds on the image after everything was shut down, and by the daemon's counters.

. "${BASH_SOURCE[0]%/*}/common.sh"
. "${BASH_SOURCE[0]%/*}/trixie.sh"
. "${BASH_SOURCE[0]%/*}/guest.sh"
. "${BASH_SOURCE[0]%/*}/daemon.sh"
. "${BASH_SOURCE[0]%/*}/data.sh"

MIB=$((1024 * 1024))

# begin_scenario NAME: an empty $WORK for images and logs, $SOCKETS for sockets, $NONCE for data.
begin_scenario() {
    SCENARIO=$1
    WORK=$TARGET/test-work/$SCENARIO
    rm -rf "$WORK"
    mkdir -p "$WORK"
    GUESTS=$WORK/guests DAEMON_LOGS=$WORK/daemons
    NONCE=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    BUSYBOX=$TRIXIE/usr/bin/busybox
    make_socket_dir
    # Images are large; what is left for a look after a failure is worth it.
    at_exit "drop_images"
    provide_guest
    # A command that fails without a word gets one.
    set -E
    trap 'scenario_stumbled "$BASH_COMMAND" "${BASH_SOURCE[0]##*/}:$LINENO"' ERR
}

scenario_stumbled() {
    trap - ERR
    [[ $1 != exit* ]] || return 0
    say "${RED}failed:${PLAIN} $2: $1"
}

drop_images() { [[ ${SCENARIO_FAILED:-yes} == yes ]] || rm -f "$WORK"/*.raw; }

pass_scenario() { SCENARIO_FAILED=no; }

skip_scenario() {
    echo "SKIP $SCENARIO: $*"
    SCENARIO_FAILED=no
    exit 77
}

# check WHAT COMMAND…: the command must succeed.
check() {
    if "${@:2}"; then
        say "    ok: $1"
    else
        die "not so: $1"
    fi
}

same() { [[ $1 == "$2" ]] || { say "    $1 is not $2"; return 1; }; }

# make_image NAME MIB: an image without any block allocated; prints its path.
make_image() {
    truncate -s "$2M" "$WORK/$1.raw"
    echo "$WORK/$1.raw"
}

# hash_on IMAGE OFFSET BYTES (offset and length in multiples of 512)
hash_on() {
    dd if="$1" bs=64k iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none | hash_of_input
}
hash_of_input() { sha256sum | cut -d ' ' -f 1; }
hash_of_data() { make_data "$1" "$2" | hash_of_input; }
hash_of_zeroes() { head -c "$1" /dev/zero | hash_of_input; }

# data_is_on IMAGE OFFSET NONCE BYTES
data_is_on() { same "$(hash_on "$1" "$2" "$4")" "$(hash_of_data "$3" "$4")"; }
# zeroes_are_on IMAGE OFFSET BYTES
zeroes_are_on() { same "$(hash_on "$1" "$2" "$3")" "$(hash_of_zeroes "$3")"; }
# Bytes of the host's storage that an image takes.
allocated() { echo $(($(stat -c '%b * %B' "$1"))); }
