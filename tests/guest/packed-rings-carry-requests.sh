#!/usr/bin/env bash
# A guest whose two queues are packed rings writes and verifies, is stopped and continued under load, reboots, and goes on.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
load=(--name=load --size=32M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
start_daemon vm "$image" "$SOCKETS/vm" --queues 2
start_guest vm --qmp --reboot --cpus 2 --timeout 90 --disk "$SOCKETS/vm,packed=on,num-queues=2" \
    --set LOAD="${load[*]}" --set NONCE="$NONCE" <<'SCRIPT'
set -e
# Bit 34 of those that the driver accepted.
test "$(cut -c 35 /sys/block/vda/device/features)" = 1
if [ "$(dd if=/dev/vda bs=1M skip=63 count=1 | head -c 6)" != second ]; then
    echo "guest: fio writes and verifies"
    fio --filename=/dev/vda $LOAD --rate=6m --eta=never
    echo second | dd of=/dev/vda bs=1M seek=63 conv=fsync
    fio --name=reads --filename=/dev/vda --offset=48M --rw=randread --direct=1 --ioengine=libaio --iodepth=32 --time_based --runtime=60 >/dev/null &
    sleep 1
    reboot -f
    sleep 60
fi
echo "guest: second start"
make_data "after $NONCE" $((8 << 20)) >/tmp/after
taskset 1 dd if=/tmp/after of=/dev/vda bs=64k seek=512 oflag=direct
taskset 2 dd if=/tmp/after of=/dev/vda bs=64k seek=640 conv=fsync
dd if=/dev/vda bs=64k skip=512 count=128 iflag=direct | cmp - /tmp/after
SCRIPT
wait_for 60 guest_says "guest: fio writes" || die "the guest did not come to its load"
sleep 1.5
for turn in 1 2 3; do
    qmp stop
    wait_for 10 qmp_event STOP $turn || die "the guest was not stopped"
    qmp cont
    wait_for 10 qmp_event RESUME $turn || die "the guest was not continued"
    sleep 0.7
done
finish_guest
stop_daemon vm

check "it booted twice" same "$(grep -c '^guest: up after' "$GUEST_LOG")" 2
check "every block that fio wrote in the guest verifies on the host" \
    in_trixie fio --filename="$image" "${load[@]}" --verify_only --output="$WORK/fio.log"
check "the first vCPU's writes are on the image" data_is_on "$image" $((32 * MIB)) "after $NONCE" $((8 * MIB))
check "the second vCPU's writes are on the image" data_is_on "$image" $((40 * MIB)) "after $NONCE" $((8 * MIB))
require_counts vm reads writes flushes
require_no_count vm failed
pass_scenario
