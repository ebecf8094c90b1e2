#!/usr/bin/env bash
# A guest uses the disks of two daemons at once, and the data of each are on its own image.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

a=$(make_image a 32)
b=$(make_image b 48)
start_daemon a "$a" "$SOCKETS/a"
start_daemon b "$b" "$SOCKETS/b"
boot_guest vm --disk "$SOCKETS/a" --disk "$SOCKETS/b" --set NONCE="$NONCE" <<'SCRIPT'
set -e
for disk in a b; do
    make_data "$disk $NONCE" $((16 << 20)) >/tmp/$disk
done
echo "guest: writing to both at once"
dd if=/tmp/a of=/dev/vda bs=16k oflag=direct &
first=$!
dd if=/tmp/b of=/dev/vdb bs=16k oflag=direct
wait $first
for disk in a b; do
    dd if=/dev/vd$disk bs=64k count=256 iflag=direct | cmp - /tmp/$disk
done
SCRIPT
stop_daemon a
stop_daemon b

check "the first disk's data are on the first image" data_is_on "$a" 0 "a $NONCE" $((16 * MIB))
check "the second disk's data are on the second image" data_is_on "$b" 0 "b $NONCE" $((16 * MIB))
check "nothing else is on the first image" zeroes_are_on "$a" $((16 * MIB)) $((16 * MIB))
check "nothing else is on the second image" zeroes_are_on "$b" $((16 * MIB)) $((32 * MIB))
for name in a b; do
    require_counts $name reads writes
    require_no_count $name failed
done
pass_scenario
