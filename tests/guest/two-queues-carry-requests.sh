#!/usr/bin/env bash
# A guest with two vCPUs uses two queues at once, and both carry requests to the image.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
start_daemon vm "$image" "$SOCKETS/vm" --queues 2
boot_guest vm --cpus 2 --disk "$SOCKETS/vm,num-queues=2" --set NONCE="$NONCE" <<'SCRIPT'
set -e
test "$(ls /sys/block/vda/mq | wc -l)" = 2
make_data "cpu0 $NONCE" $((16 << 20)) >/tmp/0
make_data "cpu1 $NONCE" $((16 << 20)) >/tmp/1
echo "guest: each vCPU writes its half"
taskset 1 dd if=/tmp/0 of=/dev/vda bs=16k oflag=direct &
first=$!
taskset 2 dd if=/tmp/1 of=/dev/vda bs=16k seek=2048 oflag=direct
wait $first
grep 'virtio0-req' /proc/interrupts | tee /out/interrupts
SCRIPT
stop_daemon vm

check "the first vCPU's writes are on the image" data_is_on "$image" 0 "cpu0 $NONCE" $((16 * MIB))
check "the second vCPU's writes are on the image" data_is_on "$image" $((32 * MIB)) "cpu1 $NONCE" $((16 * MIB))
# A line for each queue: its number, a column for each vCPU, names.
used_queues=$(awk '$2 + $3 > 100' "$GUEST_OUT/interrupts" | wc -l)
check "both queues completed requests" same "$used_queues" 2
require_counts vm writes
require_no_count vm failed
pass_scenario
