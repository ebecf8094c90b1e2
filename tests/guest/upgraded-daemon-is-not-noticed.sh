#!/usr/bin/env bash
# A guest writes and verifies while its daemon is upgraded in place, twice: the front-end keeps its connection, which would
# not come back, every request is served, none is lost.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

[[ $BACKEND == blockport ]] || skip_scenario "qemu-storage-daemon cannot be taken over"
image=$(make_image disk 64)
load=(--name=load --size=48M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
control=$SOCKETS/control

# The next daemon takes over; the one before it must end well by itself.
upgrade_daemon() {
    local from=$1 to=$2 status=0
    start_daemon "$to" "$image" "$SOCKETS/vm" --control "$control" --take-over "$control"
    wait "${DAEMON_PIDS[$from]}" || status=$?
    unset "DAEMON_PIDS[$from]"
    check "$from ends with status 0 when $to serves" test "$status" = 0
}

start_daemon first "$image" "$SOCKETS/vm" --control "$control"
start_guest vm --timeout 120 --disk "$SOCKETS/vm" --set LOAD="${load[*]}" <<'SCRIPT'
set -e
echo "guest: fio writes and verifies"
fio --filename=/dev/vda $LOAD --rate=5m --eta=never
SCRIPT
wait_for 60 guest_says "guest: fio writes" || die "the guest did not come to its load"
sleep 1.5
upgrade_daemon first second
sleep 1.5
upgrade_daemon second third
check "the guest was still at work" kill -0 "$GUEST_PID"
finish_guest
stop_daemon third
check "every block that fio wrote in the guest verifies on the host" \
    in_trixie fio --filename="$image" "${load[@]}" --verify_only --output="$WORK/fio.log"
require_counts third reads writes
require_no_count third failed
pass_scenario
