#!/usr/bin/env bash
# A read-only disk is read by the guest, refuses its writes, and does not change by a bit.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 32)
make_data "$NONCE" $((32 * MIB)) >"$image"
before=$(sha256sum <"$image")
start_daemon vm "$image" "$SOCKETS/vm" --read-only
boot_guest vm --disk "$SOCKETS/vm" <<'SCRIPT'
set -e
test "$(cat /sys/block/vda/ro)" = 1
sha256sum </dev/vda | cut -d ' ' -f 1 >/out/hash
echo "guest: trying to write"
for try in "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct" "blkdiscard -f /dev/vda" "blkdiscard -z -f /dev/vda" "blockdev --setrw /dev/vda"; do
    if $try && dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct; then
        echo "guest: NOT refused: $try"
        exit 1
    fi
done
SCRIPT
stop_daemon vm

check "the guest read what the host had written" same "$(<"$GUEST_OUT/hash")" "$(hash_on "$image" 0 $((32 * MIB)))"
check "the image is bit-identical" same "$(sha256sum <"$image")" "$before"
require_counts vm reads
require_no_count vm writes discards write-zeroes
pass_scenario
