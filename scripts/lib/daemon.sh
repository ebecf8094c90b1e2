# The daemon under test: start, stop, and what it counted.
# shellcheck shell=bash
#
#   start_daemon NAME DISK SOCKET [--queues N] [--read-only] …   as `blockport serve DISK --socket SOCKET …`
#   stop_daemon NAME                                             SIGTERM; it must end with status 0
#   count NAME COUNTER                                           after the stop: reads, writes, flushes, discards, …
#   require_counts NAME COUNTER…                                 each of these must be above 0
#   require_no_count NAME COUNTER…                               each of these must be 0
#
# At its end the daemon logs, for each export, a line of this form:
#   export NAME: 1234 reads, 567 writes, 8 flushes, 0 discards, 0 write-zeroes, 0 failed
#
# BLOCKPORT_BACKEND=qsd puts qemu-storage-daemon in its place, to tell a defect of the daemon from one of the scripts.

BACKEND=${BLOCKPORT_BACKEND:-blockport}
BLOCKPORT=${BLOCKPORT_BINARY:-$TARGET/release/blockport}
DAEMON_LOGS=${DAEMON_LOGS:-$TARGET/daemons}
declare -A DAEMON_PIDS=()

build_daemon() {
    [[ $BACKEND == blockport && -z ${BLOCKPORT_BINARY:-} ]] || return 0
    step "building blockport (release)"
    (cd "$PROJECT" && cargo build --release --locked --bin blockport) >&2 || die "the build failed"
}

start_daemon() {
    local name=$1 disk=$2 socket=$3 queues=1 writable=on
    shift 3
    if [[ $BACKEND == blockport ]]; then
        run_daemon "$name" serve "$disk" --socket "$socket" "$@"
        await_daemon "$name" daemon_is_ready "$name"
        return
    fi
    while (($#)); do
        case $1 in
            --queues) queues=$2 && shift ;;
            --read-only) writable=off ;;
            *) die "start_daemon: $BACKEND is not taught $1" ;;
        esac
        shift
    done
    run_daemon "$name" \
        --blockdev "driver=file,node-name=disk,filename=$disk,cache.direct=on,discard=unmap,read-only=$([[ $writable == on ]] && echo off || echo on)" \
        --export "type=vhost-user-blk,id=$name,node-name=disk,addr.type=unix,addr.path=$socket,num-queues=$queues,writable=$writable"
    await_daemon "$name" test -S "$socket"
}

# With any command line that blockport and qemu-storage-daemon share; the caller says which sockets to wait for:
#   start_daemon_with NAME SOCKET[,SOCKET…] ARGUMENT…
start_daemon_with() {
    local name=$1 sockets socket
    IFS=, read -r -a sockets <<<"$2"
    shift 2
    run_daemon "$name" "$@"
    for socket in "${sockets[@]}"; do await_daemon "$name" test -S "$socket"; done
}

run_daemon() {
    local name=$1 COMMAND=("$BLOCKPORT")
    shift
    mkdir -p "$DAEMON_LOGS"
    if [[ $BACKEND == qsd ]]; then
        trixie_command qemu-storage-daemon
    else
        [[ -x $BLOCKPORT ]] || die "$BLOCKPORT was not built: run cargo build --release"
    fi
    "${COMMAND[@]}" "$@" >"$DAEMON_LOGS/$name.out" 2>"$DAEMON_LOGS/$name.log" </dev/null &
    DAEMON_PIDS[$name]=$!
    at_exit "end_process $!"
}

daemon_is_ready() { grep -qw ready "$DAEMON_LOGS/$1.out"; }
daemon_has_ended() { ! kill -0 "${DAEMON_PIDS[$1]}" 2>/dev/null; }
daemon_has_ended_or() {
    daemon_has_ended "$1" || "${@:2}"
}

await_daemon() {
    local name=$1
    wait_for 10 daemon_has_ended_or "$@" || daemon_failed "$name" "was not ready within 10 s"
    ! daemon_has_ended "$name" || daemon_failed "$name" "ended at its start"
}

daemon_failed() {
    say "    $1, the end of its log ($DAEMON_LOGS/$1.log):"
    tail -n 20 "$DAEMON_LOGS/$1.out" "$DAEMON_LOGS/$1.log" | sed 's/^/      | /' >&2
    die "$BACKEND ($1) $2"
}

stop_daemon() {
    local name=$1 pid=${DAEMON_PIDS[$1]} status=0
    ! daemon_has_ended "$name" || daemon_failed "$name" "ended before it was told to"
    kill -TERM "$pid"
    wait_for 20 daemon_has_ended "$name" || daemon_failed "$name" "did not end within 20 s of SIGTERM"
    wait "$pid" || status=$?
    ((status == 0)) || daemon_failed "$name" "ended with status $status after SIGTERM"
}

# The sum over the exports of a daemon.
count() {
    sed 's/\x1b\[[0-9;]*m//g' "$DAEMON_LOGS/$1.log" |
        awk -v counter="$2" '
            match($0, /export [^ ]+: [0-9]+ reads,.*/) {
                lines++
                n = split(substr($0, RSTART), part, /[:,] */)
                for (i = 2; i <= n; i++) { split(part[i], word, " "); if (word[2] == counter) { sum += word[1]; found++ } }
            }
            END { if (lines && found == lines) print sum + 0; else exit 1 }'
}

require_counts() {
    local name=$1 counter n
    [[ $BACKEND == blockport ]] || return 0
    shift
    for counter; do
        n=$(count "$name" "$counter") || daemon_failed "$name" "left no count of $counter in its log"
        ((n > 0)) || daemon_failed "$name" "says it served no $counter"
    done
}

require_no_count() {
    local name=$1 counter n
    [[ $BACKEND == blockport ]] || return 0
    shift
    for counter; do
        n=$(count "$name" "$counter") || daemon_failed "$name" "left no count of $counter in its log"
        ((n == 0)) || daemon_failed "$name" "counts $n $counter, where there should be none"
    done
}
