"""Results as plots, PNG and SVG. It measures and judges nothing. Importing it fails where there is no Matplotlib."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

import measures  # noqa: E402
import rows  # noqa: E402
import targets  # noqa: E402

plt.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "blockport", "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "figure.constrained_layout.use": True, "axes.axisbelow": True, "grid.color": "#dddddd",
    "legend.frameon": False,
})
# Okabe and Ito's colours, which colour-blind people can tell apart. The first prefix that fits counts.
COLOURS = {
    "blockport-": "#56B4E9", "blockport": "#0072B2", "qsd-io_uring": "#E69F00", "qsd-native": "#D55E00",
    "qsd-threads": "#CC79A7", "reference": "#009E73", "fio": "#444444", "floor": "#8B6BB1",
}
MARKERS = {"blockport-": "d", "blockport": "o", "qsd-io_uring": "s", "qsd-native": "^", "qsd-threads": "v",
           "reference": "P", "fio": "X", "floor": "*"}
# Rows of work in one picture; more would not fit a screen.
CASES_MAX = 6
DPI = 110
# How far from their bounds measures are told apart.
FAR = 20


def draw(results, verdicts, directory):
    """Draws what there is data for; the paths of all files."""
    for old in [*directory.glob("*.png"), *directory.glob("*.svg")]:
        old.unlink()
    figures = {}
    if any(verdict["bound"] is not None for verdict in verdicts):
        figures["measures"] = draw_measures(results, verdicts)
    for medium in rows.MEDIA:
        cases = [row for row in results.rows if row["medium"] == medium and not row["sweep"] and results.measured(row)]
        for part, at in enumerate(range(0, len(cases), CASES_MAX)):
            name = medium if len(cases) <= CASES_MAX else f"{medium}-{part + 1}"
            figures[name] = draw_cases(results, medium, cases[at:at + CASES_MAX])
    for name, figure in (("latency", draw_latency(results)), ("polling", draw_polling(results)),
                         ("scaling", draw_scaling(results))):
        if figure:
            figures[name] = figure
    return [path for name, figure in figures.items() for path in save(figure, directory / name)]


def save(figure, stem):
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=DPI)
    # Without the time of drawing, so that the same results give the same file.
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def draw_cases(results, medium, cases):
    """A line of three charts for each kind of work: rate, CPU, latency; a bar for each target."""
    counts = [len(results.measured(row)) for row in cases]
    heights = [0.24 * count + 0.75 for count in counts]
    figure, grid = plt.subplots(len(cases), 3, figsize=(14, sum(heights) + 1.1), squeeze=False,
                                gridspec_kw={"height_ratios": heights})
    heading(figure, results, f"{rows.MEDIA[medium]}: rate, CPU time of the daemon, latency")
    figure.legend(*case_keys(), loc="upper right", ncol=5, fontsize=8, borderaxespad=0.8)
    for row, axes in zip(cases, grid):
        names = results.measured(row)
        data = [measures.clean(measures.of(results.samples, row["name"], name)) for name in names]
        rate_chart(axes[0], row, data, names)
        cpu_chart(axes[1], data, names)
        latency_chart(axes[2], data, names)
        for axis in axes:
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_yticks(range(len(names)))
            axis.set_yticklabels(names if axis is axes[0] else [])
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x")
        work = row["title"].split(", ", rows.MEDIA[medium].count(", ") + 1)[-1]
        axes[0].set_title(work[0].upper() + work[1:], loc="left", fontweight="bold")
    return figure


LATENCIES = (("p50", "o"), ("p99", "D"), ("p99_9", "|"))


def case_keys():
    """The legend of a chart of cases: keys and their names."""
    keys = [matplotlib.patches.Patch(color="#777777"),
            matplotlib.patches.Patch(facecolor="#777777", alpha=0.45, hatch="////", edgecolor="white")]
    keys += [matplotlib.lines.Line2D([], [], color="#777777", marker=marker, lw=0, ms=9 if marker == "|" else 5,
                                     mew=2 if marker == "|" else 0.5) for _, marker in LATENCIES]
    return keys, ["CPU in user space", "in the kernel", "p50", "p99", "p99.9"]


def rate_chart(axis, row, data, names):
    large = row["block_bytes"] >= rows.SEQUENTIAL_BYTES
    value, divisor, unit = ("bandwidth_bytes_per_s", 1 << 20, "MiB/s") if large else ("iops", 1, "IOPS")
    text = (lambda v: f"{v:,.0f}") if large else short
    for at, (samples, name) in enumerate(zip(data, names)):
        found = [v / divisor for v in measures.values(samples, value)]
        if not found:
            # The floor moves no data.
            continue
        middle = measures.statistics.median(found)
        axis.barh(at, middle, color=look(COLOURS, name), height=0.7,
                  xerr=[[middle - min(found)], [max(found) - middle]], error_kw={"lw": 1, "capsize": 2, "ecolor": "#222222"})
        axis.annotate(text(middle), (max(found), at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
    axis.set_xlabel(f"{unit} (median; line: least to most)")
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: text(v)))


def cpu_chart(axis, data, names):
    for at, (samples, name) in enumerate(zip(data, names)):
        user, system = (measures.median(samples, f"cpu_{side}_ns_per_request") for side in ("user", "system"))
        if user is None:
            continue
        axis.barh(at, user / 1e3, color=look(COLOURS, name), height=0.7)
        axis.barh(at, system / 1e3, left=user / 1e3, color=look(COLOURS, name), height=0.7, alpha=0.45, hatch="////",
                  edgecolor="white", lw=0)
        axis.annotate(f"{(user + system) / 1e3:.2f}", ((user + system) / 1e3, at), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.set_xlabel("CPU µs per request")


def latency_chart(axis, data, names):
    for at, (samples, name) in enumerate(zip(data, names)):
        found = [measures.median(samples, f"latency_ns_{point}") for point, _ in LATENCIES]
        if None in found:
            continue
        found = [value / 1e3 for value in found]
        colour = look(COLOURS, name)
        axis.plot(found, [at] * 3, color=colour, lw=2, alpha=0.6)
        for value, (_, marker) in zip(found, LATENCIES):
            axis.plot(value, at, marker, color=colour, ms=9 if marker == "|" else 5, mew=2 if marker == "|" else 0.5,
                      mec=colour if marker == "|" else "#222222")
    axis.set_xscale("log")
    axis.set_xlabel("latency, µs")
    decade_ticks(axis.xaxis)
    low, high = axis.get_xlim()
    if high / low > 100:
        # 2 and 5 would be too close.
        axis.xaxis.set_major_locator(ticker.LogLocator())


def draw_latency(results):
    """Latency over rate as the depth grows: a curve for each target."""
    curves = {}
    for row in results.rows:
        if row["wait"] == "poll" and row["queues"] == 1 and row["cpus"] == "free" and row["rw"] in ("randread", "randwrite"):
            for name in results.measured(row):
                samples = measures.clean(measures.of(results.samples, row["name"], name))
                point = [measures.median(samples, value) for value in ("iops", "latency_ns_p50", "latency_ns_p99")]
                # psync has one request in flight whatever the depth.
                if None not in point and not name.endswith("-main") and name != "fio-psync":
                    curves.setdefault((row["medium"], row["rw"]), {}).setdefault(name, []).append((row["depth"], *point))
    # Of one depth there is no curve.
    curves = {key: {n: sorted(c) for n, c in found.items() if len(c) > 1} for key, found in curves.items()}
    curves = {key: found for key, found in curves.items() if found}
    if not curves:
        return None
    columns = min(len(curves), 2)
    lines = -(-len(curves) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(7 * columns, 4.4 * lines + 0.6), squeeze=False)
    heading(figure, results, "latency over rate as the depth grows (number: depth; line p50, dotted p99)")
    for axis in grid.flat[len(curves):]:
        axis.set_visible(False)
    for axis, ((medium, rw), found) in zip(grid.flat, curves.items()):
        for name, points in found.items():
            depths, rates, middles, tails = zip(*points)
            colour = look(COLOURS, name)
            axis.plot(rates, [v / 1e3 for v in middles], marker=look(MARKERS, name), color=colour, label=name, ms=6)
            axis.plot(rates, [v / 1e3 for v in tails], marker=look(MARKERS, name), color=colour, ls=":", ms=4, alpha=0.8)
            for depth, rate, middle in zip(depths, rates, middles):
                axis.annotate(str(depth), (rate, middle / 1e3), xytext=(0, -11), textcoords="offset points", fontsize=7,
                              ha="center", color="#333333")
        axis.set_xlim(0, axis.get_xlim()[1])
        axis.set_yscale("log")
        axis.set_title(f"{rows.MEDIA[medium]}, 4k random {'reads' if rw == 'randread' else 'writes'}", loc="left",
                       fontweight="bold")
        axis.set_xlabel("IOPS")
        axis.set_ylabel("latency, µs")
        axis.grid()
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: short(v)))
        decade_ticks(axis.yaxis)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def draw_polling(results):
    """What polling gives and costs: latency, and below it the daemon's CPU, for each poll-max-ns."""
    sweeps = [row for row in results.rows if row["sweep"] and len(results.measured(row)) > 1]
    if not sweeps:
        return None
    figure, grid = plt.subplots(2, len(sweeps), figsize=(max(6.6 * len(sweeps), 10), 6.4), squeeze=False, sharex="col",
                                gridspec_kw={"height_ratios": (3, 2)})
    heading(figure, results, "polling: latency it gives, CPU time it takes; one request at a time, client that checks once")
    for (upper, lower), row in zip(grid.T, sweeps):
        data = []
        for name in results.measured(row):
            ns = targets.POLL_MAX_NS_DEFAULT if name == "blockport" else int(name.rsplit("-", 1)[-1])
            data.append((ns, measures.clean(measures.of(results.samples, row["name"], name))))
        data.sort(key=lambda pair: pair[0])
        places = range(len(data))
        for value, label, style, colour, aside in (("latency_ns_p50", "p50", "o-", "#0072B2", -13),
                                                   ("latency_ns_p99", "p99", "D:", "#D55E00", 6)):
            middles = [(measures.median(samples, value) or 0) / 1e3 for _, samples in data]
            upper.plot(places, middles, style, color=colour, label=label)
            for at, middle in zip(places, middles):
                text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
                upper.annotate(text, (at, middle), xytext=(0, aside), textcoords="offset points", ha="center", fontsize=8)
        cpus = [100 * (measures.median(samples, "cpus") or 0) for _, samples in data]
        bars = lower.bar(places, cpus, color=["#0072B2" if ns == targets.POLL_MAX_NS_DEFAULT else "#56B4E9" for ns, _ in data],
                         width=0.6)
        lower.bar_label(bars, [f"{value:.0f} %" for value in cpus], fontsize=8, padding=2)
        lower.set_ylim(0, max([*cpus, 1]) * 1.2)
        lower.set_xticks(list(places))
        lower.set_xticklabels([f"{ns:,}" + ("\n(default)" if ns == targets.POLL_MAX_NS_DEFAULT else "") for ns, _ in data])
        lower.set_xlabel("poll-max-ns")
        upper.set_yscale("log")
        decade_ticks(upper.yaxis)
        low, high = upper.get_ylim()
        upper.set_ylim(low / 1.5, high * 1.5)
        upper.set_title(rows.MEDIA[row["medium"]] + ", 4k random reads", loc="left", fontweight="bold")
        for axis in (upper, lower):
            axis.grid(axis="y")
        upper.legend(loc="upper right", bbox_to_anchor=(1, 1.09), ncol=2, borderaxespad=0)
    grid[0][0].set_ylabel("latency, µs")
    grid[1][0].set_ylabel("the daemon's CPU, % of one")
    return figure


def draw_scaling(results):
    """Rate over iothreads, where the machine has CPUs enough."""
    points = {}
    for row in results.rows:
        # A CPU for each iothread and each client, or the scheduler is what is measured.
        fits = 2 * row["queues"] <= results.facts["cpus"]
        if fits and row["medium"] == "null" and row["rw"] == "randread" and row["depth"] == 32 and row["wait"] == "poll":
            name = "blockport" if row["queues"] == 1 else "blockport-iothreads"
            middle = measures.median(measures.clean(measures.of(results.samples, row["name"], name)), "iops")
            if middle:
                points[row["queues"]] = middle
    if len(points) < 2:
        return None
    counts = sorted(points)
    figure, axis = plt.subplots(figsize=(8, 5))
    heading(figure, results, "scaling: null disk, 4k random reads, depth 32 on each queue")
    axis.plot(counts, [points[n] for n in counts], "o-", color="#0072B2", label="blockport")
    axis.plot(counts, [points[counts[0]] * n / counts[0] for n in counts], "--", color="#888888", label="proportional")
    for count in counts:
        axis.annotate(short(points[count]), (count, points[count]), xytext=(0, -14), textcoords="offset points", ha="center")
    axis.set_xlabel("iothreads, each with a queue and a client thread")
    axis.set_ylabel("IOPS")
    axis.set_xticks(counts)
    axis.set_ylim(0)
    axis.margins(x=0.08)
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: short(v)))
    axis.grid()
    axis.legend()
    return figure


def draw_measures(results, verdicts):
    """Every bound at 1, and how far from it each value is: to the right is better."""
    shown = [verdict for verdict in verdicts if verdict["bound"] is not None]
    figure, axis = plt.subplots(figsize=(12, 0.3 * len(shown) + 1.9))
    heading(figure, results, "measures: the value over its bound; right of the line it is met")
    colours = {"met": "#0072B2", "missed, within the spread": "#E69F00", "missed": "#D55E00"}
    marks = {"met": "o", "missed, within the spread": "s", "missed": "X"}
    for at, found in enumerate(shown):
        def goodness(value, found=found):
            ratio = value / found["bound"] if found["sense"] == "at least" else found["bound"] / max(value, 1e-9)
            # What is farther off stands at the edge.
            return min(max(ratio, 1 / FAR), FAR)

        colour = colours[found["verdict"]]
        axis.plot([goodness(found["min"]), goodness(found["max"])], [at, at], color=colour, lw=2.5, alpha=0.5)
        axis.plot(goodness(found["is"]), at, marks[found["verdict"]], color=colour, ms=7)
    axis.axvline(1, color="#222222", lw=1.2)
    axis.set_xscale("log")
    axis.set_yticks(range(len(shown)))
    axis.set_yticklabels([measure_name(verdict) for verdict in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.6), max(high, 1.6))
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g} ×"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(axis="both")
    axis.set_xlabel("value / bound, or bound / value where less is better; line: worst to best round")
    keys = [matplotlib.lines.Line2D([], [], color=colours[name], marker=marks[name], lw=0) for name in colours]
    axis.legend(keys, list(colours), loc="lower right", bbox_to_anchor=(1, 1), ncol=3, fontsize=8, borderaxespad=0.1)
    return figure


def measure_name(verdict):
    bound = f"{verdict['bound']:g} ×" if verdict["rival"] else f"{100 * verdict['bound']:g} %"
    sense = "≥" if verdict["sense"] == "at least" else "≤"
    rival = f" {verdict['rival']}" if verdict["rival"] else ""
    return f"{verdict['row']}: {measures.VALUE_NAMES[verdict['value']]} {sense} {bound}{rival}"


def heading(figure, results, what):
    facts = results.facts
    rounds = "1 round" if results.rounds() == 1 else f"medians of {results.rounds()} rounds"
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    figure.suptitle(f"blockport bench: {what}\n{facts['time'][:10]} · {facts['cpus']} × {facts['cpu']} · "
                    f"Linux {facts['kernel']} · {rounds} · commit {facts['commit']}",
                    fontsize=11, ha="left", x=0.01)


def decade_ticks(axis):
    """1, 2, 5, 10, … on a logarithmic axis, written out."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def look(table, name):
    return next(found for prefix, found in table.items() if name.startswith(prefix))


def short(value):
    """1234567 → 1.23 M"""
    for limit, unit in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
