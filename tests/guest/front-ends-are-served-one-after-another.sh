#!/usr/bin/env bash
# One daemon serves front-end after front-end: one that stops, one that is killed at work, one that finds all data.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 96)
start_daemon vm "$image" "$SOCKETS/vm"

boot_guest first --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
make_data "first $NONCE" $((16 << 20)) >/tmp/data
dd if=/tmp/data of=/dev/vda bs=64k conv=fsync
SCRIPT

start_guest second --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
make_data "second $NONCE" $((16 << 20)) >/tmp/data
dd if=/tmp/data of=/dev/vda bs=64k seek=512 conv=fsync
echo "guest: written, now under load"
fio --name=load --filename=/dev/vda --offset=64M --size=32M --rw=randrw --direct=1 --ioengine=libaio --iodepth=32 --time_based --runtime=60 --eta=never
SCRIPT
wait_for 60 guest_says "guest: written" || die "the second guest did not come to its load"
sleep 2
say "    killing the second guest under load"
kill_guest

boot_guest third --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
for turn in first second; do
    make_data "$turn $NONCE" $((16 << 20)) >/tmp/data
    dd if=/dev/vda bs=64k skip=$([ $turn = first ] && echo 0 || echo 512) count=256 iflag=direct | cmp - /tmp/data
done
make_data "third $NONCE" $((8 << 20)) >/tmp/data
dd if=/tmp/data of=/dev/vda bs=64k seek=256 conv=fsync
SCRIPT
stop_daemon vm

check "the first guest's data are on the image" data_is_on "$image" 0 "first $NONCE" $((16 * MIB))
check "the second guest's data are on the image" data_is_on "$image" $((32 * MIB)) "second $NONCE" $((16 * MIB))
check "the third guest's data are on the image" data_is_on "$image" $((16 * MIB)) "third $NONCE" $((8 * MIB))
require_counts vm reads writes flushes
require_no_count vm failed
pass_scenario
