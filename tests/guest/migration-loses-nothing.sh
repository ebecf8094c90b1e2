#!/usr/bin/env bash
# A guest moves between two QEMUs, each with a daemon of its own over one image, while it writes, verifies and reads: what it
# has in memory and what is on the image stay true. A raw image with split rings, a qcow2 one with packed rings.
set -euo pipefail
. "$(dirname "$0")/../../scripts/lib/scenario.sh"
begin_scenario "$(basename "$0" .sh)"

[[ $BACKEND == blockport ]] || skip_scenario "qemu-storage-daemon's disks cannot be migrated"
load=(--name=load --size=24M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16
    --verify=crc32c --verify_state_save=0 --randseed=$((16#${NONCE:0:7})))
# Behind what fio writes: data that the guest only reads, through its page cache.
still_offset=$((24 * MIB)) still_bytes=$((4 * MIB))
still=$(hash_of_data "$NONCE" $still_bytes)

serve() { # NAME OPTIONS
    start_daemon_with "$1" "$SOCKETS/$1" \
        --blockdev "driver=$format,node-name=disk,file.driver=file,file.filename=$image,cache.direct=on,$2" \
        --export "vhost-user-blk,id=$1,node-name=disk,addr.type=unix,addr.path=$SOCKETS/$1,writable=on,hand-over=on"
}

run_guest() { # NAME [OPTION…]
    start_guest "$@" --qmp --timeout 150 --disk "$SOCKETS/$1,packed=$packed" \
        --set LOAD="${load[*]}" --set STILL="$still" --set BLOCKS=$((still_bytes / 65536)) --set SKIP=$((still_offset / 65536)) \
        <<'SCRIPT'
set -e
still() { dd if=/dev/vda bs=64k skip=$SKIP count=$BLOCKS 2>/dev/null; }
fio --filename=/dev/vda $LOAD --rate=3m --eta=never &
load=$!
echo "guest: fio writes and verifies"
until [ "$(awk '{ print $5 }' /sys/block/vda/stat)" -gt 20 ]; do sleep 0.1; done
turns=0
while kill -0 $load 2>/dev/null; do
    # Reads from the disk into fresh memory; then that memory is looked at, at the other side perhaps.
    echo 1 >/proc/sys/vm/drop_caches
    still >/dev/null
    [ "$(still | sha256sum | cut -d ' ' -f 1)" = "$STILL" ] || { echo "guest: memory is not what was read"; exit 1; }
    turns=$((turns + 1))
    echo "guest: $turns turns"
done
wait $load
echo "guest: all verifies"
SCRIPT
}

for format in raw qcow2; do
    packed=off
    image=$(make_image disk 32)
    make_data "$NONCE" $still_bytes | dd of="$image" bs=64k seek=$((still_offset / 65536)) conv=notrunc status=none
    if [[ $format == qcow2 ]]; then
        packed=on
        in_trixie qemu-img convert -O qcow2 "$image" "$WORK/disk.qcow2"
        rm "$image"
        image=$WORK/disk.qcow2
    fi
    serve source active=off
    serve destination active=off
    run_guest source
    source_pid=$GUEST_PID source_dir=$GUEST_DIR
    wait_for 100 guest_says "guest: 1 turns" || die "the guest did not come to its load"
    run_guest destination --incoming "unix:$SOCKETS/migration"
    wait_for 20 test -S "$SOCKETS/migration" || die "the destination does not listen"
    GUEST_DIR=$source_dir qmp migrate-set-capabilities '{"capabilities": [{"capability": "events", "state": true}]}'
    GUEST_DIR=$source_dir qmp migrate "{\"uri\": \"unix:$SOCKETS/migration\"}"
    migrated() { grep -qE '"status": "(completed|failed)"' "$source_dir/qmp.log"; }
    wait_for 60 migrated || die "the migration does not end"
    check "the guest has moved under load ($format)" grep -q '"status": "completed"' "$source_dir/qmp.log"
    check "it was still at work ($format)" kill -0 "$GUEST_PID"
    wait_for 10 qmp_event RESUME 1 || die "the destination did not go on"
    GUEST_DIR=$source_dir qmp quit
    wait "$source_pid"
    finish_guest
    check "it did its work at the destination ($format)" guest_says "guest: all verifies"
    stop_daemon source
    stop_daemon destination
    require_counts source reads writes
    require_counts destination reads writes
    require_no_count source failed
    require_no_count destination failed
    if [[ $format == qcow2 ]]; then
        check "the image is without errors and leaks" in_trixie qemu-img check -q "$image"
        in_trixie qemu-img convert -O raw "$image" "$WORK/disk.raw"
        rm "$image"
        image=$WORK/disk.raw
    fi
    check "every block that fio wrote verifies on the host ($format)" \
        in_trixie fio --filename="$image" "${load[@]}" --verify_only --output="$WORK/fio.log"
    check "what was only read has not changed ($format)" data_is_on "$image" $still_offset "$NONCE" $still_bytes
done
pass_scenario
