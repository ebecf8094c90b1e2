"""Results as a text for people, in Markdown. It measures and judges nothing."""

import measures

COLUMNS = ["target", "IOPS", "spread", "MiB/s", "CPU ns/request", "user + system", "p50 µs", "p99 µs", "p99.9 µs",
           "longest gap ms", "of blockport's IOPS", "clean runs"]


def markdown(results, verdicts, plots=()):
    facts, options = results.facts, results.options
    lines = [
        "# Bench",
        "",
        f"{facts['time']}, {facts['cpus']} × {facts['cpu']}, Linux {facts['kernel']}, commit {facts['commit']}; "
        f"{facts['qemu_storage_daemon'] or 'no qemu-storage-daemon'}; {facts['fio'] or 'no fio'}.",
        f"Files: {', '.join(f'{name} on {kind}' for name, kind in facts['file_systems'].items()) or 'none'}, of "
        f"{options['file_size']} MiB.",
        f"Interleaved rounds: {results.rounds()}, {options['runtime']:g} s a run after {options['ramp']:g} s; medians; "
        f"pinning, unless a row says: daemons {options['daemon_cpus'] or 'none'}, client {options['client_cpus'] or 'none'}. "
        f"Floors: eventfd ping-pong {span(results.floors, 'eventfd_round_trips_per_s')} round trips/s, "
        f"cache line hand-over {span(results.floors, 'cache_line_ns')} ns.",
    ]
    if options["quick"]:
        lines += ["", "**One short round: to see that everything works, not to quote.**"]
    if results.lacking():
        lines += ["", f"**Not complete: {results.lacking()} runs are missing.**"]
    lines += [f"Left out: {name}: {reason}." for name, reason in sorted(results.left_out.items())]
    lines += [f"Not measured here: {what}: {why}." for what, why in results.not_measured.items()]
    for failure in results.failures:
        lines += ["", f"**Failed**: {failure['row']}, {failure['target']}: {failure['message']}"]
    if verdicts:
        lines += ["", "## Measures", "", *measures_table(verdicts)]
    if results.instructions:
        lines += ["", "### Instructions per request (callgrind)", "", *instructions_table(results.instructions)]
    if plots:
        lines += ["", "## Plots", ""]
        for plot in plots:
            lines += [f"![{plot.stem}]({plot.name})", ""]
    lines += ["", "## Rows"]
    for row in results.rows:
        if results.measured(row):
            lines += ["", f"### {row['name']}: {row['title']}", "", *row_table(results, row)]
    return "\n".join(lines) + "\n"


def measures_table(verdicts):
    table = ["| row | target | value | against | must be | is | spread | |", "|---|---|---|---|---|--:|---|---|"]
    for v in verdicts:
        must = "" if v["bound"] is None else f"{v['sense']} {bound(v, v['bound'])}"
        table.append(f"| {v['row']} | {v['target']} | {measures.VALUE_NAMES[v['value']]} | {v['rival'] or ''} | {must} | "
                     f"{bound(v, v['is'])} | {bound(v, v['min'])} … {bound(v, v['max'])} | {v['verdict']} |")
    return table


def bound(verdict, value):
    """A ratio, or a share."""
    return f"{value:.2f} ×" if verdict["rival"] else f"{100 * value:.0f} %"


def instructions_table(found):
    table = ["| count | is | must be at most | |", "|---|--:|--:|---|"]
    for line in found:
        if "measure" in line:
            table.append(f"| {line['measure']} | {line['is']} | {line['at_most']} | {line['verdict']} |")
        else:
            table.append(f"| {line['name']} | {line['instructions_per_request']} | | |")
    return table


def row_table(results, row):
    table = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for target in results.measured(row):
        everything = measures.of(results.samples, row["name"], target)
        used = measures.clean(everything)
        iops = measures.values(used, "iops")
        middle = measures.median(used, "iops")
        # The whole range, relative to the median.
        spread = f"{100 * (min(iops) / middle - 1):+.0f} … {100 * (max(iops) / middle - 1):+.0f} %" if middle else ""
        ratios = measures.ratios(results.samples, row["name"], target, "blockport", "iops")
        user, system = (measures.median(used, f"cpu_{side}_ns_per_request") for side in ("user", "system"))
        table.append("| " + " | ".join([
            target,
            number(middle),
            spread,
            number(measures.median(used, "bandwidth_bytes_per_s"), 1 << 20),
            number(measures.median(used, "cpu_ns_per_request")),
            "" if user is None else f"{user:,.0f} + {system:,.0f}",
            number(measures.median(used, "latency_ns_p50"), 1e3, 1),
            number(measures.median(used, "latency_ns_p99"), 1e3, 1),
            number(measures.median(used, "latency_ns_p99_9"), 1e3, 1),
            number(measures.median(used, "gap_ns_max"), 1e6, 1),
            f"{measures.statistics.median(ratios):.2f} ×" if ratios else "",
            f"{sum(sample['clean'] for sample in everything)}/{len(everything)}",
        ]) + " |")
    return table


def number(value, divisor=1, digits=0):
    return "" if value is None else f"{value / divisor:,.{digits}f}"


def span(floors, name):
    values = [floor[name] for floor in floors]
    return f"{min(values):,.0f}–{max(values):,.0f}" if values else "none"
