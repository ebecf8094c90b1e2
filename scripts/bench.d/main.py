"""The command line of scripts/bench, and the order of things."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import compare
import machine
import measures
import presets
import report
import results
import run
import targets

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DESCRIPTION = """Compares blockport with its rivals on this machine, in one run with interleaved rounds.

Every row is a kind of work (4k random reads on a null disk, a file on ext4, on tmpfs …); every target a program that
can do it: blockport, qemu-storage-daemon in its settings, the reference device, and fio without any daemon. In each
round every target runs once, in an order that rotates; the report gives medians, the spread, the daemon's CPU time for
each request, and ratios taken round by round. Times differ from machine to machine and from minute to minute; ratios of
one run are what to quote.

Before each run it waits until the machine is idle; a run during which other programs used CPU is marked, and left out
of the medians while enough others remain. Results go to a directory of their own: results.json with all samples, saved
after each; report.md; plots as PNG and SVG. What was measured when Ctrl-C ended a run is kept; --resume goes on with it.
"""
EPILOG = """exit status: 0; 1 if a run failed, a bound of --preset short was missed, or --compare found a regression; 2 for usage;
130 after Ctrl-C.

scripts/bench itself takes --yes (install missing packages without asking) and --no-build."""

# A machine that others use may need more rounds than two until one is undisturbed.
SHORT_ROUNDS_MAX = 6
# What --resume takes over.
SETTLED = ("preset", "quick", "rows", "targets", "rounds", "runtime", "ramp", "file_size", "daemon_cpus", "client_cpus",
           "instructions")


def options():
    parser = argparse.ArgumentParser(prog="scripts/bench", description=DESCRIPTION, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=presets.PRESETS, default="full",
        help="; ".join(f"{name}: {what}" for name, what in presets.PRESETS.items()) + " (default: full)")
    add("--quick", action="store_true", help="one short round: to see that everything works, not to quote")
    add("--rounds", type=int, metavar="N", help="rounds (default: 5)")
    add("--runtime", type=float, metavar="S", help="seconds measured in each run (default: 2; 1.5 with --preset measures)")
    add("--ramp", type=float, metavar="S", help="seconds before that (default: 0.5)")
    add("--rows", default="*", metavar="GLOBS", help="only these rows, comma-separated; --list tells them")
    add("--targets", default="*", metavar="GLOBS", help="only these targets, comma-separated")
    add("--list", action="store_true", help="list rows with their targets and the time that takes, and end")
    add("--instructions", action="store_true", help="count instructions per request, too (scripts/instructions)")
    add("--daemon-cpus", metavar="LIST", help="pin daemons and fio to these CPUs, as taskset takes them")
    add("--client-cpus", metavar="LIST", help="pin the load generator to these CPUs")
    add("--disk-dir", type=pathlib.Path, default=ROOT / "target" / "bench", metavar="DIR",
        help="where the file of the ext4 and loop rows is made (default: target/bench)")
    add("--file-size", type=int, metavar="MIB", help="size of the files (default: 1024)")
    add("--idle-timeout", type=float, metavar="S",
        help="wait at most so long for an idle machine before each run (default: 60)")
    add("--minutes", type=float, default=float("inf"), metavar="M",
        help="end after so many minutes, with what was measured until then")
    add("--bin-dir", type=pathlib.Path, default=ROOT / "target" / "release", metavar="DIR",
        help="where blockport and blockport-reference are (default: target/release)")
    add("--out", type=pathlib.Path, metavar="DIR", help="where results go (default: target/bench/TIME)")
    add("--resume", type=pathlib.Path, metavar="RESULTS", help="go on with a run that was ended, with its options")
    add("--report", type=pathlib.Path, metavar="RESULTS", help="measure nothing: make report and plots again")
    add("--compare", type=pathlib.Path, metavar="OLD", help="compare with the results of an earlier run")
    parsed = parser.parse_args()
    short, bounds = parsed.preset == "short", parsed.preset == "measures"
    defaults = {"rounds": 2 if short else 1 if parsed.quick else 5,
                "runtime": 1.0 if short or parsed.quick else 1.5 if bounds else 2.0,
                "ramp": 0.3 if short or parsed.quick else 0.5,
                "file_size": 256 if short or parsed.quick else 1024,
                "idle_timeout": 0.0 if short else 5.0 if parsed.quick else 60.0}
    for name, value in defaults.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    for name in ("rounds", "runtime", "file_size"):
        if getattr(parsed, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: must be more than 0")
    return parsed


def main():
    args = options()
    if args.report:
        found = results.Results.load(args.report)
        publish(found, args.out or found.path.parent, args)
        return comparison(args, found)
    resumed = args.resume and results.Results.load(args.resume)
    if resumed:
        # What it measures and how is settled; where things are is not.
        for name in SETTLED:
            setattr(args, name, resumed.options[name])
    old = args.compare and results.Results.load(args.compare)  # before hours are spent
    plan = presets.filtered(presets.plan(args.preset), args.rows, args.targets)
    if args.list:
        for row, able in plan:
            print(f"{row.name}: {row.title}\n    " + ", ".join(t.name for t in able))
        print(duration(args, plan))
        return 0
    missing = targets.missing(args.bin_dir, {t for _, able in plan for t in able})
    not_measured = {}
    if not machine.can_loop() and any(row.medium == "loop" for row, _ in plan):
        not_measured["loop devices"] = "making one needs root and losetup"
        plan = [(row, able) for row, able in plan if row.medium != "loop"]
    if (os.cpu_count() or 1) < 4:
        not_measured["scaling over iothreads"] = f"{os.cpu_count()} CPUs; two iothreads and their clients need 4"
    if args.preset == "measures":
        if not args.instructions:
            not_measured["instructions per request, of queues, exports and filters too"] = "--instructions counts them"
        not_measured["switches, ticks and memory of idle disks"] = "scripts/test idle counts them"
        not_measured["allocations per request"] = "cargo test -p blockport-block allocations counts them"
    plan = [(row, [t for t in able if t.name not in missing]) for row, able in plan]
    plan = [(row, able) for row, able in plan if able]
    if not plan:
        say("nothing to measure")
        return 1

    for name, reason in {**missing, **not_measured}.items():
        say(f"left out: {name}: {reason}")
    say(duration(args, plan))
    deadline = time.monotonic() + 60 * args.minutes
    stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    interrupted = False
    with machine.Files(args.disk_dir, args.file_size, {row.medium for row, _ in plan}) as files:
        found = resumed
        if not found:
            words = {name: getattr(args, name) for name in SETTLED}
            directory = args.out or ROOT / "target" / "bench" / stamp
            found = results.Results.new(directory / "results.json", machine.facts(args, files), words, plan, missing)
            found.not_measured.update(not_measured)
        try:
            run.all_rounds(args, plan, files, found, deadline)
            while args.preset == "short" and args.rounds < SHORT_ROUNDS_MAX and missed(judged(found)):
                args.rounds += 2
                found.options["rounds"] = args.rounds
                run.all_rounds(args, plan, files, found, deadline)
            if args.instructions:
                found.data["instructions"] = count_instructions()
        except KeyboardInterrupt:
            interrupted = True
    if not found.samples:
        say("nothing was measured")
        return 130 if interrupted else 1
    found.save()
    verdicts = publish(found, found.path.parent, args)
    if interrupted:
        say(f"ended early; scripts/bench --resume {found.path} goes on")
        return 130
    status = 1 if found.failures else 0
    if args.preset == "short" and missed(verdicts):
        say("a bound that only a gross defect misses was missed")
        status = 1
    return comparison(args, found, old) or status


def duration(args, plan):
    runs = args.rounds * sum(len(able) for _, able in plan)
    minutes = run.seconds_of(args, plan) / 60
    return (f"{runs} runs of {args.ramp:g} + {args.runtime:g} s in {args.rounds} rounds: about {minutes:.0f} min if nobody "
            "disturbs them")


def judged(found):
    """The verdicts on a run, by the bounds that its preset has."""
    short = found.options["preset"] == "short"
    return measures.judge(found.samples, measures.GROSS if short else None, lenient=short)


def missed(verdicts):
    return any(verdict["verdict"].startswith("missed") for verdict in verdicts)


def count_instructions():
    """The lines of scripts/instructions; what it judges beyond them is a test's business."""
    run.progress("counting instructions", end="\n")
    result = subprocess.run([ROOT / "scripts" / "instructions", "--json"], capture_output=True, text=True, check=False)
    return [json.loads(line) for line in result.stdout.splitlines()]


def publish(found, directory, args):
    """Writes report and plots, prints the report, and returns the verdicts."""
    verdicts = judged(found)
    directory.mkdir(parents=True, exist_ok=True)
    plots = draw(found, verdicts, directory)
    text = report.markdown(found, verdicts, [plot for plot in plots if plot.suffix == ".png"])
    (directory / "report.md").write_text(text)
    if directory / "results.json" != found.path:
        (directory / "results.json").write_text(found.text())
    print(text)
    say(f"written to {directory}: report.md, results.json, {len(plots)} plots")
    return verdicts


def draw(found, verdicts, directory):
    try:
        import plots
    except ImportError:
        say("no plots: apt-get install python3-matplotlib, then scripts/bench --report RESULTS")
        return []
    return plots.draw(found, verdicts, directory)


def comparison(args, new, old=None):
    """The exit status that --compare asks for."""
    if not args.compare:
        return 0
    old = old or results.Results.load(args.compare)
    lines = compare.compare(old, new)
    text = compare.markdown(old, new, lines)
    (new.path.parent / "comparison.md").write_text(text)
    print(text)
    return 1 if any(line["mark"] == "REGRESSION" for line in lines) else 0


def say(text):
    print(f"bench: {text}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (run.Failed, results.Unreadable) as failure:
        say(failure)
        sys.exit(1)
