"""Which targets run on which rows in the named selections. Nothing here runs anything."""

import fnmatch

import measures
import rows
import targets

# What `measures` adds to what its bounds need, for the plots: row globs → target globs.
ILLUSTRATION = {
    "null-read-32": "reference",
    "*-sweep": "*",
    "ext4-read-32": "blockport-threads",
    "tmpfs-read-32": "blockport-threads",
}
PRESETS = {
    "full": "every row with every target",
    "measures": "what the bounds need (scripts/bench.d/measures.py), and the polling sweep; rivals with an iothread, "
                "without aio=threads on ext4",
    "polling": "what polling gives and costs: the sweep over poll-max-ns, with the daemon alone on a CPU, sharing one with the "
               "client, and beside busy threads",
    "short": "a few runs that only a gross defect fails, for CI: exit status 1",
}


def plan(name):
    """[(row, [target, …]), …], in the order of the rows."""
    pick = {"full": lambda _row, _target: True, "measures": in_measures, "polling": in_polling, "short": in_short}[name]
    found = [(row, [t for t in targets.TARGETS if t.fits(row) and pick(row, t)]) for row in rows.ROWS]
    return [(row, able) for row, able in found if able]


def in_measures(row, target):
    wanted = needed(measures.MEASURES, row, target) or listed(ILLUSTRATION, row, target)
    return wanted and not hopeless(row, target)


def hopeless(row, target):
    """What the bounds name, and only `full` has, since it is behind another setting of the same program."""
    if fnmatch.fnmatch(target.name, "qsd-*-main"):
        # Behind itself with an iothread, except where all share a CPU.
        return row.cpus != "one"
    # A thread for each request costs more than the others where the disk is what is waited for.
    return fnmatch.fnmatch(target.name, "qsd-threads-*") and (row.medium == "ext4" or row.cpus == "one")


def listed(globs, row, target):
    return any(fnmatch.fnmatch(row.name, row_glob) and fnmatch.fnmatch(target.name, target_glob)
               for row_glob, target_glob in globs.items())


def in_polling(row, target):
    shared = row.cpus != "free" and target.name in ("blockport", "blockport-poll-0")
    rival = row.name == "null-read-1-once" and target.name in ("blockport", "qsd-io_uring-iothread")
    return row.sweep or shared or rival


def in_short(row, target):
    return needed(measures.GROSS, row, target)


def needed(wanted, row, target):
    return any(measure.row == row.name and (target.name == measure.target
                                            or measure.against and fnmatch.fnmatch(target.name, measure.against))
               for measure in wanted)


def filtered(plan, row_globs, target_globs):
    """The part of a plan whose names match comma-separated globs."""
    def matches(name, globs):
        return any(fnmatch.fnmatch(name, glob.strip()) for glob in globs.split(","))

    found = [(row, [t for t in able if matches(t.name, target_globs)]) for row, able in plan if matches(row.name, row_globs)]
    return [(row, able) for row, able in found if able]
