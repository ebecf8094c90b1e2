"""The programs that are compared, and how each is started. To add one, add it to TARGETS; nothing here runs them.

Every target serves the same bytes. Daemons get the settings that are best for them, each setting as a target of its own;
"blockport" is blockport with its defaults.
"""

import dataclasses
import functools
import shutil
import subprocess
from typing import Callable

import rows

NULL_BYTES = 1 << 30
POLL_MAX_NS_DEFAULT = 32768
# Around the default; 0 never polls.
POLL_SWEEP_NS = (0, 4000, 16000, 65536, 262144)


@dataclasses.dataclass(frozen=True)
class Target:
    """A program in one setting."""

    name: str
    # Whether a row is sensible for it.
    fits: Callable
    # (bin_dir, row, file, socket) → argv. Only daemons get a socket.
    argv: Callable
    # "daemon" is driven by `blockport bench`, "fio" measures itself, "floor" is `blockport bench --floor`.
    kind: str = "daemon"
    # Whether the client uses packed virtqueues.
    packed: bool = False


def plain(row):
    """Rows on which rivals run. A sweep compares blockport with itself, and so does a machine that is too busy."""
    return not row.sweep and row.cpus != "busy"


def is_file(row):
    return row.medium in ("ext4", "tmpfs")


def iothreads(count, poll_max_ns=None):
    poll = "" if poll_max_ns is None else f",poll-max-ns={poll_max_ns}"
    return [word for number in range(count) for word in ("--object", f"iothread,id=t{number}{poll}")]


def blockport(threads=lambda _row: 1, poll_max_ns=None, engine=None):
    """As `serve` does it, unless it has no word for it."""
    def argv(bin_dir, row, file, socket):
        program, count = str(bin_dir / "blockport"), threads(row)
        if row.medium == "null":
            # Reads leave the buffers as they are, as with every other null disk here.
            node = f"driver=null-co,node-name=n0,size={NULL_BYTES},read-zeroes=off"
            on = "".join(f",iothreads.{number}=t{number}" for number in range(count))
            return [program, *iothreads(count, poll_max_ns), "--blockdev", node,
                    "--export", export(row, socket) + on]
        words = [program, "serve", str(file), "--socket", str(socket), "--queues", str(row.queues),
                 "--iothreads", str(count)]
        words += ["--poll-max-ns", str(poll_max_ns)] if poll_max_ns is not None else []
        return words + (["--aio-engine", engine] if engine else [])

    return argv


def export(row, socket):
    return (f"type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={socket},writable=on,"
            f"num-queues={row.queues}")


def qemu(aio, iothread):
    def argv(_bin_dir, row, file, socket):
        if row.medium == "null":
            node = f"driver=null-co,node-name=n0,size={NULL_BYTES},read-zeroes=off"
        else:
            driver = "host_device" if row.medium == "loop" else "file"
            node = f"driver={driver},node-name=n0,filename={file},aio={aio},cache.direct=on"
        threads, on = (iothreads(1), ",iothread=t0") if iothread else ([], "")
        return ["qemu-storage-daemon", *threads, "--blockdev", node, "--export", export(row, socket) + on]

    return argv


def reference(bin_dir, row, file, socket):
    argv = [str(bin_dir / "blockport-reference"), "--socket", str(socket), "--queues", str(row.queues)]
    if row.medium == "null":
        return argv + ["--null", str(NULL_BYTES)]
    return argv + ["--file", str(file)] + (["--direct"] if row.medium != "tmpfs" else [])


def fio(engine, direct):
    def argv(_bin_dir, row, file, _socket):
        # Otherwise fio keeps a map of the blocks it has done, which nobody else here does.
        common = ["--norandommap", "--randrepeat=0", "--time_based", "--group_reporting"]
        if row.rw == "randrw":
            common.append(f"--rwmixread={rows.READ_SHARE_PERCENT}")
        return ["fio", "--name=bench", f"--filename={file}", f"--rw={row.rw}", f"--bs={row.block_bytes}",
                f"--numjobs={row.queues}", f"--iodepth={row.depth}", f"--ioengine={engine}",
                f"--direct={int(direct)}", *common]

    return argv


def floor(bin_dir, _row, _file, _socket):
    return [str(bin_dir / "blockport"), "bench", "--floor", "--json"]


TARGETS = [
    Target("blockport", lambda row: True, blockport()),
    Target("blockport-packed", lambda row: plain(row) and row.rw == "randread" and row.queues == 1, blockport(),
           packed=True),
    Target("blockport-threads", lambda row: plain(row) and row.medium != "null" and row.cpus == "free",
           blockport(engine="threads")),
    # An iothread for each queue.
    Target("blockport-iothreads", lambda row: row.queues > 1, blockport(threads=lambda row: row.queues)),
    *(Target(f"blockport-poll-{ns}", functools.partial(lambda ns, row: row.sweep or (ns == 0 and row.cpus != "free"), ns),
             blockport(poll_max_ns=ns)) for ns in POLL_SWEEP_NS),
    # The null driver has no aio setting: these two are enough there.
    Target("qsd-io_uring-iothread", plain, qemu("io_uring", True)),
    Target("qsd-io_uring-main", plain, qemu("io_uring", False)),
    Target("qsd-native-iothread", lambda row: plain(row) and row.medium != "null", qemu("native", True)),
    Target("qsd-native-main", lambda row: plain(row) and row.medium != "null", qemu("native", False)),
    Target("qsd-threads-iothread", lambda row: plain(row) and row.medium != "null", qemu("threads", True)),
    Target("qsd-threads-main", lambda row: plain(row) and row.medium != "null", qemu("threads", False)),
    Target("reference", plain, reference),
    Target("fio-io_uring", lambda row: plain(row) and row.cpus == "free" and row.medium in ("ext4", "loop"),
           fio("io_uring", True), kind="fio"),
    # psync has one request in flight, and on tmpfs nobody is faster.
    Target("fio-psync", lambda row: plain(row) and row.cpus == "free" and row.medium == "tmpfs",
           fio("psync", False), kind="fio"),
    # A bare eventfd ping-pong.
    Target("floor", lambda row: plain(row) and row.depth == 1 and row.wait == "sleep" and row.queues == 1, floor,
           kind="floor"),
]
NAMES = [target.name for target in TARGETS]


def missing(bin_dir, wanted):
    """Which of `wanted` cannot run here: name → what to do about it."""
    absent = {}
    help_text = serve_help(bin_dir / "blockport")
    for target in wanted:
        program = target.name.split("-")[0]
        if program == "qsd" and not shutil.which("qemu-storage-daemon"):
            absent[target.name] = "no qemu-storage-daemon: apt-get install qemu-utils"
        elif program == "fio" and not shutil.which("fio"):
            absent[target.name] = "no fio: apt-get install fio"
        elif program == "reference" and not (bin_dir / "blockport-reference").exists():
            absent[target.name] = "not built: cargo build --release --workspace"
        elif program in ("blockport", "floor") and not help_text:
            absent[target.name] = "not built: cargo build --release --workspace"
        elif target.name == "blockport-threads" and "--aio-engine" not in help_text:
            absent[target.name] = "this blockport has one engine only"
    return absent


def serve_help(program):
    """What `blockport serve --help` prints; empty if there is no such program."""
    if not program.exists():
        return ""
    return subprocess.run([program, "serve", "--help"], capture_output=True, text=True, check=False).stdout
