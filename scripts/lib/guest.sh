# Guests: a small Linux that boots in QEMU, runs one script against vhost-user disks and reports back.
# shellcheck shell=bash
#
#   start_guest NAME [options] <<'SCRIPT'    boots; the script (busybox sh, set -e if it wants) runs in the guest
#       --disk SOCKET[,PROPERTY=VALUE…]      a vhost-user-blk-pci disk; repeat for /dev/vda, /dev/vdb, …
#       --chardev PROPERTY=VALUE             a property of every disk's socket, such as reconnect-ms=50
#       --set NAME=VALUE                     a variable for the script
#       --file PATH                          a host's file, in the guest's / under its base name
#       --cpus N  --memory MIB  --timeout S  --qmp  --reboot  --quiet
#       --incoming URI                       does not boot: goes on with a guest that another QEMU migrates to URI; all else
#                                            must be as it is there, the script too
#   finish_guest                             waits for its end; its status is the script's. What the script left in
#                                            /out is then in $GUEST_OUT; the console's text is $GUEST_LOG.
#   boot_guest NAME …                        both.
#   qmp COMMAND [ARGUMENTS]                  for a guest started with --qmp

GUEST=$PROVISION/guest
GUESTS=${GUESTS:-$TARGET/guests} # where each guest leaves its console log and results

# --- the guest's kernel and first file system ----------------------------------------------------------------------

provide_guest() {
    provide_trixie
    local inputs lib=${BASH_SOURCE[0]%/*}
    inputs=$(cat "$TRIXIE/complete" "$lib/guest-init" "$lib/data.sh" "$lib/guest.sh" | sha256sum)
    [[ -f $GUEST/complete && $(<"$GUEST/complete") == "$inputs" ]] && return
    local lock
    exec {lock}>"$PROVISION/lock"
    flock "$lock"
    [[ -f $GUEST/complete && $(<"$GUEST/complete") == "$inputs" ]] || make_guest "$inputs"
    exec {lock}>&-
}

make_guest() {
    local inputs=$1 new=$PROVISION/guest.new fs=$PROVISION/guest.new/fs lib=${BASH_SOURCE[0]%/*} program file
    step "packing the guest: kernel, busybox, fio"
    rm -rf "$new"
    mkdir -p "$fs"/{dev,proc,sys,tmp,mnt,lib/modules,usr/bin,usr/sbin,usr/lib64} "$fs/usr/lib/x86_64-linux-gnu" "$fs/etc"
    ln -s usr/bin "$fs/bin"
    ln -s usr/sbin "$fs/sbin"
    ln -s usr/lib64 "$fs/lib64"
    cp "$TRIXIE"/boot/vmlinuz-* "$new/vmlinuz"
    cp "$TRIXIE/usr/bin/busybox" "$fs/usr/bin/"
    for program in $(in_trixie busybox --list); do
        [[ -e $fs/usr/bin/$program ]] || ln -s busybox "$fs/usr/bin/$program"
    done
    for program in bin/fio sbin/mke2fs sbin/blkdiscard; do
        cp "$TRIXIE/usr/$program" "$fs/usr/$program"
        trixie_command "${program#*/}"
        # Each library at its own place: some find others by a path built in.
        for file in $("${COMMAND[@]:0:${#COMMAND[@]}-1}" --list "$TRIXIE/usr/$program" | grep -o "$TRIXIE/[^ ]*"); do
            file=usr/${file#"$TRIXIE"/*/}
            mkdir -p "$fs/${file%/*}"
            cp -L "$TRIXIE/$file" "$fs/$file"
        done
    done
    cp -L "$TRIXIE/usr/lib64/ld-linux-x86-64.so.2" "$fs/usr/lib64/"
    cp "$TRIXIE/etc/mke2fs.conf" "$fs/etc/"
    # The one driver that the kernel has not built in.
    find "$TRIXIE/usr/lib/modules" -name 'virtio_blk.ko*' -exec cp {} "$fs/lib/modules/" \;
    [[ ! -f $fs/lib/modules/virtio_blk.ko.xz ]] || in_trixie busybox unxz "$fs/lib/modules/virtio_blk.ko.xz"
    [[ -f $fs/lib/modules/virtio_blk.ko ]] || die "the guest kernel has no module virtio_blk"
    cp "$lib/data.sh" "$fs/lib/"
    install -m 755 "$lib/guest-init" "$fs/init"
    pack_files "$fs" "$new/initramfs"
    rm -rf "$fs"
    printf '%s' "$inputs" >"$new/complete"
    rm -rf "$GUEST"
    mv "$new" "$GUEST"
}

# A directory as an archive that the kernel unpacks; several may follow each other in one file.
pack_files() {
    (cd "$1" && find . | in_trixie busybox cpio -o -H newc 2>/dev/null) >"$2"
}

# --- KVM or emulation ----------------------------------------------------------------------------------------------

# Sets ACCEL. KVM is used only after a kernel has really booted with it on this machine; BLOCKPORT_ACCEL overrides.
choose_accel() {
    ACCEL=${BLOCKPORT_ACCEL:-}
    [[ -z $ACCEL ]] || return 0
    local answer=$PROVISION/accel machine
    machine="$(uname -nr) $(cat /proc/sys/kernel/random/boot_id)"
    if [[ -f $answer && $(head -n 1 "$answer") == "$machine" ]]; then
        ACCEL=$(tail -n 1 "$answer")
        return
    fi
    ACCEL=tcg
    if [[ -r /dev/kvm && -w /dev/kvm ]]; then
        say "    trying whether a kernel boots with KVM here (10 s at most)"
        ACCEL=kvm
        boot_guest kvm-trial --timeout 10 --quiet <<<'true' 2>/dev/null || ACCEL=tcg
    fi
    [[ $ACCEL == kvm ]] && say "    it does: guests run with KVM" || say "    no KVM: guests run emulated"
    printf '%s\n' "$machine" "$ACCEL" >"$answer"
}

# --- running one ---------------------------------------------------------------------------------------------------

start_guest() {
    local name=$1 cpus=1 memory=256 timeout=90 reboot=no quiet=no with_qmp=no chardev='' incoming='' disks=() sets=() files=() disk properties set file i
    shift
    while (($#)); do
        case $1 in
            --disk) disks+=("$2") && shift ;;
            --chardev) chardev=,$2 && shift ;;
            --set) sets+=("$2") && shift ;;
            --file) files+=("$2") && shift ;;
            --cpus) cpus=$2 && shift ;;
            --memory) memory=$2 && shift ;;
            --timeout) timeout=$2 && shift ;;
            --qmp) with_qmp=yes ;;
            --incoming) incoming=$2 && shift ;;
            --reboot) reboot=yes ;;
            --quiet) quiet=yes ;;
            *) die "start_guest: unknown option $1" ;;
        esac
        shift
    done
    [[ -n ${ACCEL:-} ]] || choose_accel

    GUEST_DIR=$GUESTS/$name GUEST_OUT=$GUESTS/$name/out GUEST_LOG=$GUESTS/$name/console.log
    GUEST_QUIET=$quiet GUEST_STARTED=$EPOCHREALTIME GUEST_TIMEOUT=$timeout
    rm -rf "$GUEST_DIR"
    mkdir -p "$GUEST_OUT" "$GUEST_DIR/fs"
    {
        for set in "${sets[@]}"; do
            printf 'export %s=%q\n' "${set%%=*}" "${set#*=}"
        done
        cat
    } >"$GUEST_DIR/fs/run.sh"
    for file in "${files[@]}"; do cp "$file" "$GUEST_DIR/fs/"; done
    pack_files "$GUEST_DIR/fs" "$GUEST_DIR/run.cpio"
    cat "$GUEST/initramfs" "$GUEST_DIR/run.cpio" >"$GUEST_DIR/initramfs"
    rm -rf "$GUEST_DIR/fs" "$GUEST_DIR/run.cpio"

    local args=(-nodefaults -no-user-config -nographic -machine q35 -smp "$cpus" -m "$memory"
        -object "memory-backend-memfd,id=memory,size=${memory}M,share=on" -machine memory-backend=memory
        -kernel "$GUEST/vmlinuz" -initrd "$GUEST_DIR/initramfs"
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr disks=${#disks[@]}"
        -serial "file:$GUEST_LOG" -serial "file:$GUEST_DIR/report.tar")
    case $ACCEL in
        kvm) args+=(-accel kvm -cpu host) ;;
        *) args+=(-accel 'tcg,thread=multi' -cpu max) ;;
    esac
    [[ $reboot == yes ]] || args+=(-no-reboot)
    [[ -z $incoming ]] || args+=(-incoming "$incoming")
    for i in "${!disks[@]}"; do
        disk=${disks[i]}
        properties=${disk#"${disk%%,*}"}
        # QEMU's own choice is a queue for each vCPU, and it refuses a back-end that has fewer.
        [[ $properties == *num-queues=* ]] || properties+=,num-queues=1
        args+=(-chardev "socket,id=disk$i,path=${disk%%,*}$chardev"
            -device "vhost-user-blk-pci,chardev=disk$i$properties")
    done
    if [[ $with_qmp == yes ]]; then
        mkfifo "$GUEST_DIR/qmp.in" "$GUEST_DIR/qmp.out"
        args+=(-chardev "pipe,id=qmp,path=$GUEST_DIR/qmp" -mon "chardev=qmp,mode=control")
    fi
    : >"$GUEST_LOG"
    local COMMAND
    trixie_command qemu-system-x86_64
    printf '%q ' "${COMMAND[@]}" "${args[@]}" >"$GUEST_DIR/command"
    "${COMMAND[@]}" "${args[@]}" >"$GUEST_DIR/qemu.log" 2>&1 </dev/null &
    GUEST_PID=$!
    at_exit "end_process $GUEST_PID"
    GUEST_CONSOLE_PID=''
    if [[ $quiet == no ]]; then
        # Progress: what the guest says, as it says it.
        tail -n +1 -s 0.1 -f --pid="$GUEST_PID" "$GUEST_LOG" 2>/dev/null | sed -u -n 's/\r$//; s/^guest: /    guest: /p' >&2 &
        GUEST_CONSOLE_PID=$!
    fi
    if [[ $with_qmp == yes ]]; then
        cat "$GUEST_DIR/qmp.out" >"$GUEST_DIR/qmp.log" 2>/dev/null &
        at_exit "kill $! 2>/dev/null"
        qmp qmp_capabilities
    fi
}

finish_guest() {
    local status=0 deadline=$((${GUEST_STARTED%[.,]*} + GUEST_TIMEOUT))
    while kill -0 "$GUEST_PID" 2>/dev/null; do
        if ((${EPOCHREALTIME%[.,]*} >= deadline)); then
            end_process "$GUEST_PID"
            guest_failed "did not end within $GUEST_TIMEOUT s"
            return 124
        fi
        sleep 0.1
    done
    wait "$GUEST_PID" || status=$?
    [[ -z $GUEST_CONSOLE_PID ]] || wait "$GUEST_CONSOLE_PID" 2>/dev/null || true
    rm -f "$GUEST_DIR/initramfs"
    if ((status)); then
        guest_failed "QEMU ended with status $status"
        return 125
    fi
    if ! tar -x -f "$GUEST_DIR/report.tar" -C "$GUEST_OUT" 2>>"$GUEST_DIR/qemu.log" || [[ ! -s $GUEST_OUT/status ]]; then
        guest_failed "ended without a report"
        return 126
    fi
    status=$(<"$GUEST_OUT/status")
    ((status == 0)) || guest_failed "script ended with status $status"
    return "$status"
}

guest_failed() {
    [[ $GUEST_QUIET == no ]] || return 0
    say "    guest: $*; the end of its console ($GUEST_LOG):"
    tail -n 20 "$GUEST_LOG" | sed 's/\r$//; s/^/      | /' >&2
    [[ ! -s $GUEST_DIR/qemu.log ]] || sed 's/^/      | qemu: /' "$GUEST_DIR/qemu.log" | tail -n 10 >&2
}

boot_guest() {
    start_guest "$@"
    finish_guest
}

# Ends the guest as a power failure would: QEMU itself is killed.
kill_guest() {
    kill -KILL "$GUEST_PID"
    wait "$GUEST_PID" 2>/dev/null || true
    rm -f "$GUEST_DIR/initramfs"
}

# guest_says TEXT: whether the guest has printed a line that begins so.
guest_says() { grep -q "^$1" "$GUEST_LOG"; }

# The monitor. Answers and events are collected in qmp.log.
qmp() {
    printf '{"execute": "%s"%s}\n' "$1" "${2:+, \"arguments\": $2}" >"$GUEST_DIR/qmp.in"
}
# qmp_event NAME COUNT: whether that event has come that often.
qmp_event() { (($(grep -c "\"event\": \"$1\"" "$GUEST_DIR/qmp.log" || true) >= $2)); }
