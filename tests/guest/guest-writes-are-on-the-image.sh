#!/usr/bin/env bash
# What a guest writes to the bare disk, direct and through its cache, is on the image, and nothing else is.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
start_daemon vm "$image" "$SOCKETS/vm"
boot_guest vm --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
echo "guest: writing direct, then through the cache"
make_data "direct $NONCE" $((16 << 20)) >/tmp/direct
make_data "cached $NONCE" $((8 << 20)) >/tmp/cached
dd if=/tmp/direct of=/dev/vda bs=64k seek=16 oflag=direct
# An odd start and an odd size: requests of all lengths down to a sector.
dd if=/tmp/cached of=/dev/vda bs=1000k seek=33554944 oflag=seek_bytes conv=fsync
echo "guest: reading back"
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k skip=16 count=256 iflag=direct | cmp - /tmp/direct
dd if=/dev/vda bs=64k skip=33554944 count=8388608 iflag=skip_bytes,count_bytes | cmp - /tmp/cached
SCRIPT
stop_daemon vm

check "the direct writes are on the image" data_is_on "$image" $MIB "direct $NONCE" $((16 * MIB))
check "the cached writes are on the image" data_is_on "$image" $((32 * MIB + 512)) "cached $NONCE" $((8 * MIB))
check "there is nothing before them" zeroes_are_on "$image" 0 $MIB
check "there is nothing between them" zeroes_are_on "$image" $((17 * MIB)) $((15 * MIB + 512))
check "there is nothing after them" zeroes_are_on "$image" $((40 * MIB + 512)) $((24 * MIB - 512))
require_counts vm reads writes flushes
require_no_count vm failed
pass_scenario
