#!/usr/bin/env bash
# A guest reboots under load without its disk being unplugged, finds what it wrote before, and goes on writing.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

image=$(make_image disk 64)
start_daemon vm "$image" "$SOCKETS/vm"
boot_guest vm --reboot --qmp --disk "$SOCKETS/vm" --set NONCE="$NONCE" <<'SCRIPT'
set -e
make_data "before $NONCE" $((16 << 20)) >/tmp/before
if ! dd if=/dev/vda bs=64k count=256 iflag=direct | cmp - /tmp/before; then
    if [ "$(dd if=/dev/vda bs=1M skip=48 count=1 | head -c 6)" = second ]; then
        echo "guest: the data of before the reboot are gone"
        exit 1
    fi
    echo "guest: first start: writing, then rebooting under load"
    dd if=/tmp/before of=/dev/vda bs=64k oflag=direct
    echo second | dd of=/dev/vda bs=1M seek=48 conv=fsync
    fio --name=load --filename=/dev/vda --offset=48M --rw=randread --direct=1 --ioengine=libaio --iodepth=32 --time_based --runtime=60 >/dev/null &
    sleep 2
    reboot -f
    sleep 60
fi
echo "guest: second start: the data are there"
make_data "after $NONCE" $((16 << 20)) >/tmp/after
dd if=/tmp/after of=/dev/vda bs=64k seek=512 conv=fsync
SCRIPT
stop_daemon vm

# The firmware adds a reset of its own.
check "the guest was reset within one run of QEMU" grep -q '"reason": "guest-reset"' "$GUEST_DIR/qmp.log"
check "it booted twice" same "$(grep -c '^guest: up after' "$GUEST_LOG")" 2
check "what it wrote before is on the image" data_is_on "$image" 0 "before $NONCE" $((16 * MIB))
check "what it wrote after is on the image" data_is_on "$image" $((32 * MIB)) "after $NONCE" $((16 * MIB))
require_counts vm reads writes flushes
require_no_count vm failed
pass_scenario
