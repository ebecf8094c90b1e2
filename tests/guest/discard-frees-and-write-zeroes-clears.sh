#!/usr/bin/env bash
# A guest's discard frees the image's storage, its write-zeroes leaves zeroes, and their neighbours stay.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
start_daemon vm "$image" "$SOCKETS/vm"
boot_guest vm --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
make_data "$NONCE" $((32 << 20)) >/tmp/data
dd if=/tmp/data of=/dev/vda bs=256k oflag=direct
echo "guest: discarding 8 MiB, zeroing 8 MiB"
cat /sys/block/vda/queue/discard_max_bytes /sys/block/vda/queue/write_zeroes_max_bytes
blkdiscard -o $((4 << 20)) -l $((8 << 20)) /dev/vda
blkdiscard -z -o $((20 << 20)) -l $((8 << 20)) /dev/vda
SCRIPT
stop_daemon vm

make_data "$NONCE" $((32 * MIB)) >"$WORK/expected.raw"
for area in 0:4 12:8 28:4; do
    offset=$((${area%:*} * MIB)) bytes=$((${area#*:} * MIB))
    check "the data at ${area%:*} MiB are untouched" same "$(hash_on "$image" $offset $bytes)" "$(hash_on "$WORK/expected.raw" $offset $bytes)"
done
check "the discarded 8 MiB read as zeroes" zeroes_are_on "$image" $((4 * MIB)) $((8 * MIB))
check "the zeroed 8 MiB read as zeroes" zeroes_are_on "$image" $((20 * MIB)) $((8 * MIB))
say "    the image takes $(($(allocated "$image") / MIB)) MiB of storage"
check "the discarded storage was freed" test "$(allocated "$image")" -le $((24 * MIB + MIB / 2))
require_counts vm writes discards write-zeroes
require_no_count vm failed
pass_scenario
