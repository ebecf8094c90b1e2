"""Running one target on one row, and all of them in rounds. What a sample means is for others to say."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import machine
import rows

# CPU time of others, in CPUs, above which a run does not count as clean.
OTHERS_CPUS = 0.10
START_TIMEOUT_S = 10
STOP_TIMEOUT_S = 10
# What a run takes beside its ramp and measured time: the wait for an idle machine, start and end. Seconds.
OVERHEAD_S = 0.9


class NotOffered(Exception):
    """The daemon does not have what the target is about; the message says what."""


class Failed(Exception):
    """A run that did not work; the message says which and why."""


def seconds_of(args, plan):
    """How long the rounds take if nobody disturbs them."""
    return args.rounds * sum(len(able) for _, able in plan) * (args.ramp + args.runtime + OVERHEAD_S)


def all_rounds(args, plan, files, results, deadline):
    """Every target of every row in every round that `results` does not have yet; saved after each sample. It ends early
    when the clock is past `deadline` (as time.monotonic tells it)."""
    done = {(s["round"], s["row"], s["target"]) for s in results.samples}
    total = args.rounds * sum(len(able) for _, able in plan)
    at = 0
    for number in range(args.rounds):
        if not any(floor["round"] == number for floor in results.floors):
            results.floors.append({"round": number, **floors(args)})
        for row, able in plan:
            # Another target goes first each time, so that a drift of the machine favours none.
            turn = number % len(able)
            for target in able[turn:] + able[:turn]:
                at += 1
                if (number, row.name, target.name) in done or results.is_given_up(row.name, target.name):
                    continue
                if time.monotonic() >= deadline:
                    progress("the time is up (--minutes)", end="\n")
                    return
                label = f"[{at}/{total}] round {number + 1}: {row.name}: {target.name}"
                try:
                    sample = one(args, row, target, files[row.medium], label)
                except NotOffered as reason:
                    progress(f"{label}: left out: {reason}", end="\n")
                    results.left_out[target.name] = str(reason)
                except Failed as failure:
                    progress(f"{label}: {failure}", end="\n")
                    results.failures.append({"row": row.name, "target": target.name, "round": number,
                                             "message": str(failure)})
                else:
                    results.note_command(row.name, target.name, command(row, target))
                    results.samples.append({"round": number, "row": row.name, "target": target.name, **sample})
                results.save()
    progress("", end="\n")


def command(row, target):
    """How it is started, as text, without what differs from machine to machine."""
    return " ".join(map(str, target.argv(pathlib.Path(), row, "FILE", "SOCKET")))


def one(args, row, target, file, label):
    idle = machine.wait_until_idle(args.idle_timeout, lambda text: progress(f"{label}: {text}"))
    progress(label)
    runner = {"fio": fio, "daemon": daemon, "floor": floor}[target.kind]
    with machine.Hogs(row.cpus == "busy") as hogs:
        sample = runner(args, row, target, file, hogs)
    sample["idle_before"] = idle
    sample["clean"] = idle and sample["others_cpus"] <= OTHERS_CPUS
    mark = "" if sample["clean"] else "   (not clean: others used CPU)"
    progress(f"{label}: {sample['iops']:,.0f} IOPS{mark}", end="\n")
    return sample


def daemon(args, row, target, file, hogs):
    """Starts the daemon, drives its socket, stops it."""
    with tempfile.TemporaryDirectory(prefix="blockport-bench-") as directory:
        socket, log = pathlib.Path(directory, "socket"), pathlib.Path(directory, "log")
        argv = pinned(row, args.daemon_cpus, target.argv(args.bin_dir, row, file, socket))
        with log.open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            await_socket(process, socket, argv, log)
            client = [args.bin_dir / "blockport", "bench", "--socket", socket, "--rw", row.rw,
                      "--bs", str(row.block_bytes), "--iodepth", str(row.depth), "--queues", str(row.queues),
                      "--runtime", str(args.runtime), "--ramp", str(args.ramp), "--wait", row.wait,
                      "--daemon-pid", str(process.pid), "--json"]
            client += ["--rwmixread", str(rows.READ_SHARE_PERCENT)] if row.rw == "randrw" else []
            client += ["--packed"] if target.packed else []
            result, others = watched(pinned(row, args.client_cpus, client), process.pid, hogs)
            found = parse(client, result)
        finally:
            stop(process)
    return {
        "iops": found["iops"],
        "bandwidth_bytes_per_s": found["bandwidth_bytes_per_s"],
        "cpu_ns_per_request": found["daemon_cpu_ns_per_request"],
        "cpu_user_ns_per_request": found["daemon_cpu_user_ns_per_request"],
        "cpu_system_ns_per_request": found["daemon_cpu_system_ns_per_request"],
        "latency_ns_mean": found["latency_ns_mean"],
        "latency_ns_p50": found["latency_ns_p50"],
        "latency_ns_p99": found["latency_ns_p99"],
        "latency_ns_p99_9": found["latency_ns_p99_9"],
        "gap_ns_max": found["gap_ns_max"],
        "kicks_per_request": found["kicks"] / max(found["requests"], 1),
        "others_cpus": others,
    }


def fio(args, row, target, file, hogs):
    """fio does the work itself: its own CPU time is the comparison for a daemon's."""
    argv = target.argv(args.bin_dir, row, file, None)
    argv += [f"--runtime={args.runtime}", f"--ramp_time={args.ramp}", "--output-format=json"]
    argv = pinned(row, args.daemon_cpus, argv)
    result, others = watched(argv, None, hogs)
    job = parse(argv, result)["jobs"][0]
    if job["error"]:
        raise Failed(f"{target.name}: fio reports error {job['error']}")
    sides = [side for side in (job["read"], job["write"]) if side["total_ios"]]
    if not sides:
        raise Failed(f"{target.name}: fio did nothing")
    requests = sum(side["total_ios"] for side in sides)
    # Percent of the time that all jobs together ran.
    percent_s = job["job_runtime"] / 1000 / 100
    user_ns, system_ns = (job[name] * percent_s * 1e9 / requests for name in ("usr_cpu", "sys_cpu"))
    # Of a mix, the reads.
    latency = sides[0]["clat_ns"]
    percentiles = latency.get("percentile", {})
    iops = sum(side["iops"] for side in sides)
    return {
        "iops": iops,
        "bandwidth_bytes_per_s": iops * row.block_bytes,
        "cpu_ns_per_request": user_ns + system_ns,
        "cpu_user_ns_per_request": user_ns,
        "cpu_system_ns_per_request": system_ns,
        "latency_ns_mean": latency["mean"],
        "latency_ns_p50": percentiles.get("50.000000"),
        "latency_ns_p99": percentiles.get("99.000000"),
        "latency_ns_p99_9": percentiles.get("99.900000"),
        "gap_ns_max": None,
        "kicks_per_request": None,
        "others_cpus": others,
    }


def floor(args, row, target, file, hogs):
    """Two threads that do nothing but wake each other: no client that blocks can have more."""
    argv = pinned(row, args.daemon_cpus, target.argv(args.bin_dir, row, file, None))
    # Half of the time is for the other floor.
    argv += ["--runtime", str(args.runtime)]
    result, others = watched(argv, None, hogs)
    rate = parse(argv, result)["eventfd_round_trips_per_s"]
    nothing = ("bandwidth_bytes_per_s", "cpu_ns_per_request", "cpu_user_ns_per_request", "cpu_system_ns_per_request",
               "latency_ns_p50", "latency_ns_p99", "latency_ns_p99_9", "gap_ns_max", "kicks_per_request")
    return {"iops": rate, "latency_ns_mean": 1e9 / rate, **dict.fromkeys(nothing), "others_cpus": others}


def floors(args):
    """What waking a thread and handing over a cache line cost here and now."""
    argv = [args.bin_dir / "blockport", "bench", "--floor", "--runtime", str(min(args.runtime, 1.0)), "--json"]
    try:
        result = subprocess.run(argv, capture_output=True, check=False)
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}; build it: cargo build --release --workspace") from error
    return parse(argv, result)


def watched(argv, daemon_pid, hogs):
    """Runs a client and says how many CPUs were used by neither it nor the daemon."""
    def own():
        return children_seconds() + (machine.process_seconds(daemon_pid) if daemon_pid else 0) + hogs.seconds()

    busy, mine, start = machine.busy_seconds(), own(), time.monotonic()
    result = subprocess.run(argv, capture_output=True, check=False)
    seconds = time.monotonic() - start
    others = (machine.busy_seconds() - busy) - (own() - mine)
    return result, max(0.0, others / seconds)


def children_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse(argv, result):
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip()
        if "does not offer" in message:
            raise NotOffered(message.rpartition(": ")[2])
        raise Failed(f"{' '.join(map(str, argv))}: exit status {result.returncode}: {message}")
    # fio puts its notes before the object.
    text = result.stdout.decode(errors="replace")
    return json.loads(text[text.index("{"):])


def pinned(row, cpus, argv):
    if row.cpus == "one":
        cpus = str(min(os.sched_getaffinity(0)))
    return ["taskset", "-c", cpus, *argv] if cpus else list(argv)


def await_socket(process, socket, argv, log):
    """Waits until the socket listens, without being its first client."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not listening(socket):
        if process.poll() is not None or time.monotonic() >= deadline:
            text = log.read_text(errors="replace").strip()
            raise Failed(f"{' '.join(map(str, argv))}: does not listen: {text}")
        time.sleep(0.02)


def listening(socket):
    # Columns: num refcount protocol flags type state inode path; flag 0x10000 is a listening socket.
    for line in pathlib.Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(socket) and int(fields[3], 16) & 0x10000:
            return True
    return False


def stop(process):
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def progress(text, end=""):
    """One line that is written over, on a terminal; else only lines that are complete."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
    elif end and text:
        print(text, file=sys.stderr, flush=True)
