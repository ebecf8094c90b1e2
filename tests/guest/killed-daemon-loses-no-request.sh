#!/usr/bin/env bash
# A guest writes and verifies while its daemon is killed and started again, six times: every request is served, none is lost.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

[[ $BACKEND == blockport ]] || skip_scenario "qemu-storage-daemon recovers no requests"
image=$(make_image disk 64)
load=(--name=load --size=48M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
kill_daemon() { kill -KILL "${DAEMON_PIDS[vm]}" && wait "${DAEMON_PIDS[vm]}" 2>/dev/null || true; }

for packed in off on; do
    start_daemon vm "$image" "$SOCKETS/vm"
    start_guest vm --timeout 120 --chardev reconnect-ms=50 --disk "$SOCKETS/vm,packed=$packed" --set LOAD="${load[*]}" <<'SCRIPT'
set -e
echo "guest: fio writes and verifies"
fio --filename=/dev/vda $LOAD --rate=5m --eta=never
SCRIPT
    wait_for 60 guest_says "guest: fio writes" || die "the guest did not come to its load"
    sleep 1.5
    for turn in 1 2 3; do
        kill_daemon
        start_daemon vm "$image" "$SOCKETS/vm"
        sleep 1.2
    done
    check "the guest was still at work (packed=$packed)" kill -0 "$GUEST_PID"
    finish_guest
    stop_daemon vm
    check "every block that fio wrote in the guest verifies on the host (packed=$packed)" \
        in_trixie fio --filename="$image" "${load[@]}" --verify_only --output="$WORK/fio.log"
    require_counts vm reads writes
    require_no_count vm failed
done
pass_scenario
