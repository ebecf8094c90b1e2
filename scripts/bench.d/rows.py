"""The kinds of work that are measured. Nothing here runs anything."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of work."""

    name: str
    title: str
    # Where the data is: "null", "ext4" (direct I/O), "tmpfs" or "loop" (a loop device on the ext4 file, direct I/O).
    medium: str
    # As fio and `blockport bench` name it; randrw is 70 % reads.
    rw: str
    # Requests in flight on each queue.
    depth: int
    # Bytes of a request.
    block_bytes: int = 4096
    queues: int = 1
    # How the client waits, as `blockport bench --wait` names it.
    wait: str = "poll"
    # "free"; "one": daemon and client on one CPU; "busy": more busy threads beside them than there are CPUs.
    cpus: str = "free"
    # Whether the polling settings are what is compared.
    sweep: bool = False


READ_SHARE_PERCENT = 70
SEQUENTIAL_BYTES = 128 << 10
# Enough to keep a disk busy with requests of that size.
SEQUENTIAL_DEPTH = 8

MEDIA = {
    "null": "null disk",
    "tmpfs": "file on tmpfs",
    "ext4": "file on ext4, direct",
    "loop": "loop device, direct",
}
WORKS = {
    "read": ("randread", "4k random reads", 4096),
    "write": ("randwrite", "4k random writes", 4096),
    "mix": ("randrw", "4k random, 70 % reads", 4096),
    "seqread": ("read", "128k sequential reads", SEQUENTIAL_BYTES),
    "seqwrite": ("write", "128k sequential writes", SEQUENTIAL_BYTES),
}
WAITS = {"poll": "polling client", "once": "client that checks once, then sleeps", "sleep": "client that blocks on its eventfd"}
CPUS = {"free": "", "one": "all on one CPU", "busy": "more busy threads than CPUs"}


def row(medium, work, depth, queues=1, wait="poll", cpus="free", sweep=False):
    """A row whose name and title say what it is."""
    rw, what, block_bytes = WORKS[work]
    tags = [medium, work, str(depth)]
    tags += [wait] if wait != "poll" else []
    tags += [f"{queues}q"] if queues > 1 else []
    tags += [{"one": "1cpu", "busy": "busy"}[cpus]] if cpus != "free" else []
    tags += ["sweep"] if sweep else []
    parts = [MEDIA[medium], what, f"depth {depth}", f"{queues} queues" if queues > 1 else "", WAITS[wait], CPUS[cpus],
             "over poll-max-ns" if sweep else ""]
    title = ", ".join(part for part in parts if part)
    return Row("-".join(tags), title, medium, rw, depth, block_bytes, queues, wait, cpus, sweep)


def all_rows():
    rows = []
    for medium in MEDIA:
        rows += [row(medium, "read", depth) for depth in (1, 32, 128)]
        # A null disk treats a write as it does a read.
        rows += [row(medium, "write", depth) for depth in ((32,) if medium == "null" else (1, 32, 128))]
        rows += [row(medium, "mix", 32)]
        if medium != "null":
            rows += [row(medium, work, SEQUENTIAL_DEPTH) for work in ("seqread", "seqwrite")]
        rows += [row(medium, "read", 32, queues=2)]
        rows += [row(medium, "read", depth, wait=wait) for depth in (1, 32) for wait in ("once", "sleep")]
    rows += [row("ext4", "write", 32, wait="once")]
    for medium in ("null", "tmpfs", "ext4"):
        rows += [row(medium, "read", 1, wait="once", cpus=cpus) for cpus in ("one", "busy")]
    rows += [row(medium, "read", 1, wait="once", sweep=True) for medium in ("null", "ext4")]
    # Scaling over iothreads: a CPU for each iothread and each client thread.
    rows += [row("null", "read", 32, queues=queues) for queues in (4, 8, 16, 32) if 2 * queues <= (os.cpu_count() or 1)]
    return rows


ROWS = all_rows()
NAMES = [row.name for row in ROWS]
