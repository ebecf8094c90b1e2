"""The programs that are compared, and how each is started. To add one, add it to TARGETS; nothing here runs them.

Every target serves the same bytes through one queue. Daemons get the settings that are best for them, each setting as
a target of its own; blockport gets its defaults.
"""

import dataclasses
import shutil
import subprocess
from typing import Callable

NULL_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Target:
    """A program in one setting."""

    name: str
    # The media of the rows that it can do.
    media: tuple
    # (bin_dir, row, file, socket) → argv. For fio the socket is None.
    argv: Callable
    # "daemon" is driven by `blockport bench`, "fio" measures itself.
    kind: str = "daemon"


def qemu_grammar(program, medium, file, socket, aio="io_uring", iothread=True):
    """qemu-storage-daemon's command line, which blockport understands too."""
    if medium == "null":
        # Reads leave the buffers as they are, as with every other null disk here.
        node = f"driver=null-co,node-name=n0,size={NULL_BYTES},read-zeroes=off"
    else:
        node = f"driver=file,node-name=n0,filename={file},aio={aio},cache.direct=on"
    export = f"type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={socket},writable=on,num-queues=1"
    if not iothread:
        return [program, "--blockdev", node, "--export", export]
    return [program, "--object", "iothread,id=t0", "--blockdev", node, "--export", export + ",iothread=t0"]


def blockport(bin_dir, row, file, socket):
    program = str(bin_dir / "blockport")
    if row.medium == "null":
        return qemu_grammar(program, row.medium, file, socket)
    return [program, "serve", str(file), "--socket", str(socket)]


def qemu(aio, iothread):
    def argv(_bin_dir, row, file, socket):
        return qemu_grammar("qemu-storage-daemon", row.medium, file, socket, aio, iothread)

    return argv


def reference(bin_dir, row, file, socket):
    argv = [str(bin_dir / "blockport-reference"), "--socket", str(socket)]
    if row.medium == "null":
        return argv + ["--null", str(NULL_BYTES)]
    return argv + ["--file", str(file)] + (["--direct"] if row.medium == "ext4" else [])


def fio(engine, direct):
    def argv(_bin_dir, row, file, _socket):
        # Otherwise fio keeps a map of the blocks it has done, which nobody else here does.
        common = ["--norandommap", "--randrepeat=0", "--bs=4k", "--numjobs=1", "--time_based"]
        return ["fio", "--name=bench", f"--filename={file}", f"--rw={row.rw}", f"--iodepth={row.depth}",
                f"--ioengine={engine}", f"--direct={int(direct)}", *common]

    return argv


FILES = ("ext4", "tmpfs")
TARGETS = [
    Target("blockport", ("null", *FILES), blockport),
    # The null driver has no aio setting: these two are enough there.
    Target("qsd-io_uring-iothread", ("null", *FILES), qemu("io_uring", True)),
    Target("qsd-io_uring-main", ("null", *FILES), qemu("io_uring", False)),
    Target("qsd-native-iothread", FILES, qemu("native", True)),
    Target("qsd-native-main", FILES, qemu("native", False)),
    Target("qsd-threads-iothread", FILES, qemu("threads", True)),
    Target("qsd-threads-main", FILES, qemu("threads", False)),
    Target("reference", ("null", *FILES), reference),
    Target("fio-io_uring", ("ext4",), fio("io_uring", True), kind="fio"),
    Target("fio-psync", ("tmpfs",), fio("psync", False), kind="fio"),
]
NAMES = [target.name for target in TARGETS]


def missing(bin_dir, wanted):
    """Which of `wanted` cannot run here: name → what to do about it."""
    absent = {}
    for target in wanted:
        program = target.name.split("-")[0]
        if program == "qsd" and not shutil.which("qemu-storage-daemon"):
            absent[target.name] = "no qemu-storage-daemon: apt-get install qemu-utils"
        elif program == "fio" and not shutil.which("fio"):
            absent[target.name] = "no fio: apt-get install fio"
        elif program == "reference" and not (bin_dir / "blockport-reference").exists():
            absent[target.name] = "not built: cargo build --release --workspace"
        elif program == "blockport" and not serves(bin_dir / "blockport"):
            absent[target.name] = "not built, or without serve: cargo build --release --workspace"
    return absent


def serves(program):
    """Whether this blockport has the command that is to be measured."""
    if not program.exists():
        return False
    return subprocess.run([program, "serve", "--help"], capture_output=True, check=False).returncode == 0
