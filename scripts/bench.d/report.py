"""Samples as a table in Markdown and as JSON. It measures and judges nothing."""

import json
import statistics

import measures

UNITS = {"iops": "IOPS", "cpu_ns_per_request": "CPU per request"}


def markdown(args, facts, plan, samples, floors, verdicts, missing):
    lines = [
        "# Bench",
        "",
        f"{facts['time']}, {facts['cpus']} × {facts['cpu']}, Linux {facts['kernel']}, commit {facts['commit']}; "
        f"{facts['qemu_storage_daemon'] or 'no qemu-storage-daemon'}; {facts['fio'] or 'no fio'}.",
        f"Files: {', '.join(f'{name} on {kind}' for name, kind in facts['file_systems'].items()) or 'none'}.",
        f"4k, one queue, client waiting by {args.wait}; {args.rounds} interleaved rounds, {args.runtime:g} s a run; "
        f"pinning: daemons {args.daemon_cpus or 'none'}, client {args.client_cpus or 'none'}. "
        f"Floors: eventfd ping-pong {span(floors, 'eventfd_round_trips_per_s')} round trips/s, "
        f"cache line hand-over {span(floors, 'cache_line_ns')} ns.",
    ]
    if args.quick:
        lines += ["", "**One short round: to see that everything works, not to quote.**"]
    for name, reason in sorted(missing.items()):
        lines.append(f"Left out: {name}: {reason}.")
    for row, able in plan:
        lines += ["", f"## {row.name}: {row.title}", ""]
        lines += row_table(row, able, samples)
    if verdicts:
        lines += ["", "## Measures", "", "| row | blockport's | against | must be | is | spread | |",
                  "|---|---|---|---|---|---|---|"]
        for v in verdicts:
            lines.append(f"| {v['row']} | {UNITS[v['value']]} | {v['rival']} | {v['sense']} {v['bound']:g} × | "
                         f"{v['ratio']:.2f} × | {v['ratio_min']:.2f}–{v['ratio_max']:.2f} | {v['verdict']} |")
    return "\n".join(lines) + "\n"


def row_table(row, able, samples):
    head = ["target", "IOPS", "spread", "CPU ns/request", "p50 µs", "p99 µs", "longest gap ms", "of blockport's IOPS", "clean runs"]
    table = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for target in able:
        everything = measures.of(samples, row.name, target.name)
        used = measures.clean(everything)
        iops = [sample["iops"] for sample in used]
        middle = measures.median(used, "iops")
        # The whole range, relative to the median.
        spread = f"{100 * (min(iops) / middle - 1):+.0f} … {100 * (max(iops) / middle - 1):+.0f} %" if middle else ""
        ratios = measures.ratios(samples, row.name, target.name, "blockport", "iops")
        table.append("| " + " | ".join([
            target.name,
            f"{middle:,.0f}",
            spread,
            number(measures.median(used, "cpu_ns_per_request")),
            number(measures.median(used, "latency_ns_p50"), 1e3, 1),
            number(measures.median(used, "latency_ns_p99"), 1e3, 1),
            number(measures.median(used, "gap_ns_max"), 1e6, 1),
            f"{statistics.median(ratios):.2f} ×" if ratios else "",
            f"{sum(sample['clean'] for sample in everything)}/{len(everything)}",
        ]) + " |")
    return table


def number(value, divisor=1, digits=0):
    return "" if value is None else f"{value / divisor:,.{digits}f}"


def span(floors, name):
    values = [floor[name] for floor in floors]
    return f"{min(values):,.0f}–{max(values):,.0f}"


def write(directory, facts, text, args, samples, floors, verdicts, missing):
    """Writes both files and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "bench-" + facts["time"].replace(":", "")
    markdown_path, data_path = directory / f"{stem}.md", directory / f"{stem}.json"
    markdown_path.write_text(text)
    data = {
        "facts": facts,
        "options": {name: str(value) for name, value in vars(args).items()},
        "floors": floors,
        "samples": samples,
        "measures": verdicts,
        "left_out": missing,
    }
    data_path.write_text(json.dumps(data, indent=1) + "\n")
    return markdown_path, data_path
