#!/usr/bin/env bash
# A guest stopped and continued by its monitor under load loses no request, and the image rests while it is stopped.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
load=(--name=load --size=64M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
start_daemon vm "$image" "$SOCKETS/vm"
start_guest vm --qmp --timeout 60 --disk "$SOCKETS/vm" --set LOAD="${load[*]}" <<'SCRIPT'
set -e
echo "guest: fio writes and verifies"
fio --filename=/dev/vda $LOAD --rate=8m --eta=never
SCRIPT
wait_for 60 guest_says "guest: fio writes" || die "the guest did not come to its load"
sleep 2.5
for turn in 1 2 3; do
    qmp stop
    wait_for 10 qmp_event STOP $turn || die "the guest was not stopped"
    at_stop=$(sha256sum <"$image")
    sleep 0.5
    check "the image rests while the guest is stopped ($turn)" same "$(sha256sum <"$image")" "$at_stop"
    qmp cont
    wait_for 10 qmp_event RESUME $turn || die "the guest was not continued"
    sleep 1
done
check "the guest was still at work" kill -0 "$GUEST_PID"
finish_guest
stop_daemon vm

check "every block that fio wrote in the guest verifies on the host" \
    in_trixie fio --filename="$image" "${load[@]}" --verify_only --output="$WORK/fio.log"
require_counts vm reads writes
require_no_count vm failed
pass_scenario
