#!/usr/bin/env bash
# A guest uses two exports of one daemon at once, and the data of each are on its own image.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

if [[ $BACKEND == blockport ]] && ! "$BLOCKPORT" --help | grep -q -e --blockdev; then
    skip_scenario "this blockport has no --blockdev and --export"
fi
a=$(make_image a 32)
b=$(make_image b 48)
start_daemon_with both "$SOCKETS/a,$SOCKETS/b" \
    --blockdev "driver=file,node-name=a,filename=$a,cache.direct=on" \
    --blockdev "driver=file,node-name=b,filename=$b,cache.direct=on" \
    --export "type=vhost-user-blk,id=a,node-name=a,addr.type=unix,addr.path=$SOCKETS/a,writable=on" \
    --export "type=vhost-user-blk,id=b,node-name=b,addr.type=unix,addr.path=$SOCKETS/b,writable=on"
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
stop_daemon both

check "the first disk's data are on the first image" data_is_on "$a" 0 "a $NONCE" $((16 * MIB))
check "the second disk's data are on the second image" data_is_on "$b" 0 "b $NONCE" $((16 * MIB))
check "nothing else is on the first image" zeroes_are_on "$a" $((16 * MIB)) $((16 * MIB))
check "nothing else is on the second image" zeroes_are_on "$b" $((16 * MIB)) $((32 * MIB))
require_counts both reads writes
require_no_count both failed
pass_scenario
