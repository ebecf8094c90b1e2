"""The kinds of work that are measured. Nothing here runs anything."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of work: all of it 4k, one queue."""

    name: str
    title: str
    # Where the data is: "null", "ext4" (direct I/O) or "tmpfs".
    medium: str
    # As fio and `blockport bench` name it.
    rw: str
    # Requests in flight.
    depth: int


ROWS = [
    Row("null-read-32", "null disk, random reads, depth 32", "null", "randread", 32),
    Row("ext4-read-32", "file on ext4, direct, random reads, depth 32", "ext4", "randread", 32),
    Row("ext4-read-128", "file on ext4, direct, random reads, depth 128", "ext4", "randread", 128),
    Row("ext4-write-32", "file on ext4, direct, random writes, depth 32", "ext4", "randwrite", 32),
    Row("ext4-write-128", "file on ext4, direct, random writes, depth 128", "ext4", "randwrite", 128),
    Row("tmpfs-read-32", "file on tmpfs, random reads, depth 32", "tmpfs", "randread", 32),
    Row("tmpfs-write-32", "file on tmpfs, random writes, depth 32", "tmpfs", "randwrite", 32),
]
NAMES = [row.name for row in ROWS]
