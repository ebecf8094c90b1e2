"""Two runs side by side: what became slower or dearer stands out. It measures nothing."""

import statistics

import measures

# How much worse a value must be to be called that, and at least so much worse than the others' drift. Shares.
WORSE = 0.05
# What is compared: the value, and the sign of better.
VALUES = [("iops", 1), ("cpu_ns_per_request", -1), ("latency_ns_p99", -1)]
NAMES = {"iops": "IOPS", "cpu_ns_per_request": "CPU ns/request", "latency_ns_p99": "p99 ns"}
OURS = "blockport"


def compare(old, new):
    """A line for each row, target of ours and value that both runs have."""
    lines = []
    for row in new.rows:
        for target in new.measured(row):
            if not target.startswith(OURS):
                continue
            for value, sign in VALUES:
                line = one(old, new, row["name"], target, value, sign)
                if line:
                    lines.append(line)
    return lines


def one(old, new, row, target, value, sign):
    before, after = (used(run, row, target, value) for run in (old, new))
    if not before or not after:
        return None
    was, now = statistics.median(before), statistics.median(after)
    if not was or not now:
        return None
    # What the others did between the two runs is the machine, not us.
    drift = drift_of(old, new, row, value)
    change = now / was
    corrected = change / drift if drift else change
    # Each median outside the other's spread.
    apart = now < min(before) and was > max(after) if sign > 0 else now > max(before) and was < min(after)
    worse = all((found < 1 - WORSE) if sign > 0 else (found > 1 + WORSE) for found in (change, corrected)) and apart
    better = all((found > 1 + WORSE) if sign > 0 else (found < 1 - WORSE) for found in (change, corrected))
    return {"row": row, "target": target, "value": value, "was": was, "now": now, "change": change, "drift": drift,
            "corrected": corrected, "mark": "REGRESSION" if worse else "better" if better else ""}


def used(run, row, target, value):
    return measures.values(measures.clean(measures.of(run.samples, row, target)), value)


def drift_of(old, new, row, value):
    """The median change of the targets that are not ours; None if there are none."""
    others = {s["target"] for s in new.samples if s["row"] == row and not s["target"].startswith(OURS)}
    changes = []
    for target in others:
        before, after = (used(run, row, target, value) for run in (old, new))
        if before and after and statistics.median(before) and statistics.median(after):
            changes.append(statistics.median(after) / statistics.median(before))
    return statistics.median(changes) if changes else None


def markdown(old, new, lines):
    text = [
        "# Bench: comparison",
        "",
        f"Was: {old.facts['time']}, commit {old.facts['commit']}, {old.facts['cpus']} × {old.facts['cpu']}.",
        f"Now: {new.facts['time']}, commit {new.facts['commit']}, {new.facts['cpus']} × {new.facts['cpu']}.",
    ]
    if old.facts["cpu"] != new.facts["cpu"] or old.facts["cpus"] != new.facts["cpus"]:
        text += ["", "**Different machines: only the corrected ratio says something.**"]
    text += [
        "",
        f"A regression is more than {100 * WORSE:.0f} % worse, as it is and corrected for the change of the other programs "
        "in that row, with each median outside the other's spread.",
        "",
        "| | row | target | value | was | now | ratio | others' | corrected |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for line in sorted(lines, key=lambda line: line["mark"] != "REGRESSION"):
        mark = f"**{line['mark']}**" if line["mark"] == "REGRESSION" else line["mark"]
        drift = "" if line["drift"] is None else f"{line['drift']:.2f} ×"
        text.append(f"| {mark} | {line['row']} | {line['target']} | {NAMES[line['value']]} | {line['was']:,.0f} | "
                    f"{line['now']:,.0f} | {line['change']:.2f} × | {drift} | {line['corrected']:.2f} × |")
    regressions = sum(line["mark"] == "REGRESSION" for line in lines)
    text += ["", f"{len(lines)} values compared, {regressions} regressions."]
    return "\n".join(text) + "\n"
