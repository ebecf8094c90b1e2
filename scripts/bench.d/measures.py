"""What blockport must reach, as ratios to others in the same run, and the statistics that judge it. It changes nothing."""

import dataclasses
import fnmatch
import statistics


@dataclasses.dataclass(frozen=True)
class Measure:
    """A value of one target in one row: over that of the best of some others, or as it is."""

    row: str
    # A value of a sample, or one of DERIVED.
    value: str
    # A glob of targets; None: the value itself is judged.
    against: str | None
    # "at least", "at most", or "told" without a bound.
    sense: str
    bound: float | None
    target: str = "blockport"


DERIVED = {
    "requests_per_cpu_s": lambda s: s["cpu_ns_per_request"] and 1e9 / s["cpu_ns_per_request"],
    "user_share": lambda s: s["cpu_ns_per_request"] and s["cpu_user_ns_per_request"] / s["cpu_ns_per_request"],
    "cpus": lambda s: s["cpu_ns_per_request"] and s["cpu_ns_per_request"] * s["iops"] / 1e9,
}
# Of these values the lower is the better.
LOWER_IS_BETTER = ("cpu_ns_per_request", "user_share")
VALUE_NAMES = {
    "iops": "IOPS",
    "bandwidth_bytes_per_s": "bandwidth",
    "cpu_ns_per_request": "CPU per request",
    "requests_per_cpu_s": "requests per CPU second",
    "user_share": "user-space share of CPU",
}
TMPFS_4K = [f"tmpfs-{work}-{depth}" for work in ("read", "write") for depth in (32, 128)]
EXT4_4K = [f"ext4-{work}-{depth}" for work in ("read", "write") for depth in (32, 128)]
EXT4_BLOCKING = ["ext4-read-32-once", "ext4-write-32-once"]
SEQUENTIAL = [f"{medium}-{work}-8" for medium in ("tmpfs", "ext4") for work in ("seqread", "seqwrite")]

MEASURES = [
    # Serving: null, ext4 and tmpfs with a polling client.
    Measure("null-read-32", "iops", "qsd-*", "at least", 8.0),
    *(Measure(row, "iops", "fio-io_uring", "at least", 0.97) for row in EXT4_4K),
    *(Measure(row, "cpu_ns_per_request", "qsd-*", "at most", 0.55) for row in ("ext4-read-32", "ext4-read-128")),
    Measure("tmpfs-read-32", "iops", "qsd-*", "at least", 3.0),
    # Latency at depth 1.
    Measure("null-read-1-once", "iops", "qsd-*", "at least", 10.0),
    Measure("null-read-1-sleep", "iops", "floor", "at least", 0.85),
    Measure("tmpfs-read-1-sleep", "iops", "floor", "at least", 0.85),
    Measure("null-read-1-once-1cpu", "cpu_ns_per_request", "qsd-*", "at most", 0.65),
    Measure("tmpfs-read-1-once-1cpu", "cpu_ns_per_request", "qsd-*", "at most", 0.65),
    # Polling backs off where it would steal from the guest.
    *(Measure(row, "iops", "blockport-poll-0", "at least", 0.95)
      for row in ("null-read-1-once-1cpu", "null-read-1-once-busy", "ext4-read-1-once-busy")),
    # tmpfs: as thrifty as fio, and ahead of every daemon.
    *(Measure(row, "requests_per_cpu_s", "fio-psync", "at least", 0.75) for row in TMPFS_4K),
    *(Measure(row, "iops", "[qr]*", "at least", 1.0) for row in TMPFS_4K),
    # ext4: ahead with a client that sleeps, and the CPU time is the kernel's.
    *(Measure(row, "iops", "qsd-*", "at least", 1.0) for row in EXT4_BLOCKING),
    *(Measure(row, "user_share", None, "at most", 0.15) for row in EXT4_4K),
    # Large requests.
    *(Measure(row, "bandwidth_bytes_per_s", "fio-*", "at least", 0.95) for row in SEQUENTIAL),
    # As far as two CPUs can show it.
    *(Measure(row, "iops", "blockport", "told", None, target="blockport-iothreads")
      for row in ("null-read-32-2q", "tmpfs-read-32-2q")),
    Measure("null-read-32", "iops", "blockport", "told", None, target="blockport-packed"),
]

# For the short form: bounds that only a gross defect misses, on a machine that others use too. One round that meets is
# enough, and there are more rounds when none did.
GROSS = [
    Measure("null-read-32", "iops", "qsd-io_uring-iothread", "at least", 1.0),
    Measure("null-read-32", "cpu_ns_per_request", "qsd-io_uring-iothread", "at most", 0.7),
    Measure("tmpfs-read-32", "requests_per_cpu_s", "fio-psync", "at least", 0.3),
    Measure("ext4-read-32", "iops", "fio-io_uring", "at least", 0.15),
    Measure("ext4-read-32", "cpu_ns_per_request", "qsd-io_uring-iothread", "at most", 1.3),
    Measure("null-read-1-once", "iops", "qsd-io_uring-iothread", "at least", 0.4),
]


def clean(samples):
    """The samples that count: clean ones, if half of them or more are, else all."""
    good = [sample for sample in samples if sample["clean"]]
    return good if good and 2 * len(good) >= len(samples) else samples


def of(samples, row, target):
    return [sample for sample in samples if sample["row"] == row and sample["target"] == target]


def get(sample, value):
    return DERIVED[value](sample) if value in DERIVED else sample[value]


def values(samples, value):
    return [found for found in (get(sample, value) for sample in samples) if found is not None]


def median(samples, value):
    found = values(samples, value)
    return statistics.median(found) if found else None


def ratios(samples, row, target, other, value):
    """The ratio in each round in which both count."""
    ours = {sample["round"]: get(sample, value) for sample in clean(of(samples, row, target))}
    theirs = {sample["round"]: get(sample, value) for sample in clean(of(samples, row, other))}
    return [ours[number] / theirs[number] for number in ours if theirs.get(number) and ours[number] is not None]


def judge(samples, measures=None, lenient=False):
    """One verdict for each measure that there are samples for. Lenient: the best round decides, not the median."""
    verdicts = []
    for measure in MEASURES if measures is None else measures:
        rival = best_rival(samples, measure) if measure.against else None
        if measure.against is None:
            found = values(clean(of(samples, measure.row, measure.target)), measure.value)
        else:
            found = ratios(samples, measure.row, measure.target, rival, measure.value) if rival else []
        if found:
            verdicts.append({**dataclasses.asdict(measure), "rival": rival, "is": statistics.median(found),
                             "min": min(found), "max": max(found), "rounds": len(found),
                             "verdict": verdict(measure, found, lenient)})
    return verdicts


def verdict(measure, found, lenient):
    if measure.sense == "told":
        return "told"
    at_least = measure.sense == "at least"
    middle, best = statistics.median(found), max(found) if at_least else min(found)
    met, near = ((value >= measure.bound) if at_least else (value <= measure.bound) for value in (middle, best))
    if met or (lenient and near):
        return "met"
    return "missed, within the spread" if near else "missed"


def best_rival(samples, measure):
    """Of the rivals the one that is hardest to beat."""
    names = {s["target"] for s in samples
             if s["row"] == measure.row and s["target"] != measure.target and fnmatch.fnmatch(s["target"], measure.against)}
    medians = {name: median(clean(of(samples, measure.row, name)), measure.value) for name in names}
    medians = {name: value for name, value in medians.items() if value is not None}
    if not medians:
        return None
    pick = min if measure.value in LOWER_IS_BETTER else max
    return pick(medians, key=medians.get)
