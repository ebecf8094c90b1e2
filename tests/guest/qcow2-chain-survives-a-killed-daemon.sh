#!/usr/bin/env bash
# A guest writes and verifies on a qcow2 chain of three, over two queues on two iothreads, while its daemon is killed and
# started again: no request is lost, the image has no error, and QEMU reads what the guest wrote.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

[[ $BACKEND == blockport ]] || skip_scenario "qemu-storage-daemon recovers no requests"
base=$(make_image base 64)
make_data "$NONCE" $((8 * MIB)) | dd of="$base" conv=notrunc status=none
in_trixie qemu-img create -q -f qcow2 -b "$base" -F raw "$WORK/middle.qcow2"
in_trixie qemu-io -f qcow2 -c "write -P 0x5a 2M 2M" "$WORK/middle.qcow2" >/dev/null
in_trixie qemu-img create -q -f qcow2 -b "$WORK/middle.qcow2" -F qcow2 "$WORK/top.qcow2"
load=(--name=load --offset=16M --size=32M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
serve() { start_daemon vm "$WORK/top.qcow2" "$SOCKETS/vm" --queues 2 --iothreads 2; }

serve
start_guest vm --timeout 120 --cpus 2 --chardev reconnect-ms=50 --disk "$SOCKETS/vm,num-queues=2" --set LOAD="${load[*]}" <<'SCRIPT'
set -e
echo "guest: fio writes and verifies"
fio --filename=/dev/vda $LOAD --rate=5m --eta=never
SCRIPT
wait_for 60 guest_says "guest: fio writes" || die "the guest did not come to its load"
sleep 1.5
for turn in 1 2; do
    kill -KILL "${DAEMON_PIDS[vm]}" && wait "${DAEMON_PIDS[vm]}" 2>/dev/null || true
    serve
    sleep 1.2
done
check "the guest was still at work" kill -0 "$GUEST_PID"
finish_guest
stop_daemon vm
# Only what was killed may have left something behind, and that costs space alone.
in_trixie qemu-img check -q -f qcow2 "$WORK/top.qcow2" || check "QEMU finds leaks at worst" same "$?" 3
in_trixie qemu-img convert -f qcow2 -O raw "$WORK/top.qcow2" "$WORK/disk.raw"
check "every block that fio wrote in the guest verifies on the host" \
    in_trixie fio --filename="$WORK/disk.raw" "${load[@]}" --verify_only --output="$WORK/fio.log"
check "what is behind the image shows" data_is_on "$WORK/disk.raw" 0 "$NONCE" $((2 * MIB))
check "and what lies between" same "$(hash_on "$WORK/disk.raw" $((2 * MIB)) $((2 * MIB)))" \
    "$(head -c $((2 * MIB)) /dev/zero | tr '\0' 'Z' | hash_of_input)"
require_counts vm reads writes
require_no_count vm failed
pass_scenario
