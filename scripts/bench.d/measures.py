"""What blockport must reach, as ratios to rivals in the same run. It judges samples and changes none."""

import dataclasses
import fnmatch
import statistics


@dataclasses.dataclass(frozen=True)
class Measure:
    """blockport's value over that of the best of some rivals."""

    row: str
    # "iops" or "cpu_ns_per_request".
    value: str
    rivals: str
    # "at least" or "at most".
    sense: str
    bound: float


MEASURES = [
    Measure("null-read-32", "iops", "qsd-*", "at least", 8.0),
    Measure("ext4-read-32", "iops", "fio-io_uring", "at least", 0.95),
    Measure("ext4-write-32", "iops", "fio-io_uring", "at least", 0.95),
    Measure("ext4-read-128", "iops", "fio-io_uring", "at least", 0.97),
    Measure("ext4-write-128", "iops", "fio-io_uring", "at least", 0.97),
    Measure("ext4-read-32", "cpu_ns_per_request", "qsd-*", "at most", 0.55),
    Measure("ext4-read-128", "cpu_ns_per_request", "qsd-*", "at most", 0.55),
    Measure("tmpfs-read-32", "iops", "qsd-*", "at least", 3.0),
]


def clean(samples):
    """The samples that count: clean ones, if half of them or more are, else all."""
    good = [sample for sample in samples if sample["clean"]]
    return good if good and 2 * len(good) >= len(samples) else samples


def of(samples, row, target):
    return [sample for sample in samples if sample["row"] == row and sample["target"] == target]


def median(samples, value):
    values = [sample[value] for sample in samples if sample[value] is not None]
    return statistics.median(values) if values else None


def ratios(samples, row, target, rival, value):
    """The ratio in each round in which both count."""
    ours = {sample["round"]: sample[value] for sample in clean(of(samples, row, target))}
    theirs = {sample["round"]: sample[value] for sample in clean(of(samples, row, rival))}
    return [ours[number] / theirs[number] for number in ours if theirs.get(number) and ours[number] is not None]


def judge(samples):
    """One verdict for each measure that this run has samples for."""
    verdicts = []
    for measure in MEASURES:
        rival = best_rival(samples, measure)
        found = ratios(samples, measure.row, "blockport", rival, measure.value) if rival else []
        if not found:
            continue
        middle = statistics.median(found)
        at_least = measure.sense == "at least"
        met = middle >= measure.bound if at_least else middle <= measure.bound
        near = max(found) >= measure.bound if at_least else min(found) <= measure.bound
        verdict = "met" if met else "missed, within the spread" if near else "missed"
        verdicts.append({**dataclasses.asdict(measure), "rival": rival, "ratio": middle, "ratio_min": min(found),
                         "ratio_max": max(found), "rounds": len(found), "verdict": verdict})
    return verdicts


def best_rival(samples, measure):
    """The rival with the most IOPS, or for CPU time the one that the others must be measured by: the thriftiest."""
    names = {s["target"] for s in samples if s["row"] == measure.row and fnmatch.fnmatch(s["target"], measure.rivals)}
    medians = {name: median(clean(of(samples, measure.row, name)), measure.value) for name in names}
    medians = {name: value for name, value in medians.items() if value is not None}
    if not medians:
        return None
    pick = max if measure.value == "iops" else min
    return pick(medians, key=medians.get)
