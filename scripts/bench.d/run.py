"""Running one target on one row, and all of them in rounds. What a sample means is for others to say."""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import machine

# CPU time of others, in CPUs, above which a run does not count as clean.
OTHERS_CPUS = 0.10
START_TIMEOUT_S = 10
STOP_TIMEOUT_S = 10


class Failed(Exception):
    """A run that did not work; the message says which and why."""


def all_rounds(args, plan, files):
    """Every target of every row in every round: the samples, and the floors of each round."""
    samples, floors = [], []
    total = args.rounds * sum(len(able) for _, able in plan)
    for number in range(args.rounds):
        floors.append(floor(args))
        for row, able in plan:
            # Another target goes first each time, so that a drift of the machine favours none.
            turn = number % len(able)
            for target in able[turn:] + able[:turn]:
                label = f"[{len(samples) + 1}/{total}] round {number + 1}: {row.name}: {target.name}"
                sample = one(args, row, target, files[row.medium], label)
                samples.append({"round": number, "row": row.name, "target": target.name, **sample})
    progress("", end="\n")
    return samples, floors


def one(args, row, target, file, label):
    idle = machine.wait_until_idle(args.idle_timeout, lambda text: progress(f"{label}: {text}"))
    progress(label)
    runner = fio if target.kind == "fio" else daemon
    sample = runner(args, row, target, file)
    sample["idle_before"] = idle
    sample["clean"] = idle and sample["others_cpus"] <= OTHERS_CPUS
    mark = "" if sample["clean"] else "   (not clean: others used CPU)"
    progress(f"{label}: {sample['iops']:,.0f} IOPS{mark}", end="\n")
    return sample


def daemon(args, row, target, file):
    """Starts the daemon, drives its socket, stops it."""
    with tempfile.TemporaryDirectory(prefix="blockport-bench-") as directory:
        socket, log = pathlib.Path(directory, "socket"), pathlib.Path(directory, "log")
        argv = pinned(args.daemon_cpus, target.argv(args.bin_dir, row, file, socket))
        with log.open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            await_socket(process, socket, argv, log)
            client = [args.bin_dir / "blockport", "bench", "--socket", socket, "--rw", row.rw, "--bs", "4k",
                      "--iodepth", str(row.depth), "--runtime", str(args.runtime), "--ramp", str(args.ramp),
                      "--wait", args.wait, "--daemon-pid", str(process.pid), "--json"]
            result, others = watched(pinned(args.client_cpus, client), process.pid)
            found = parse(client, result)
        finally:
            stop(process)
    return {
        "iops": found["iops"],
        "cpu_ns_per_request": found["daemon_cpu_ns_per_request"],
        "latency_ns_p50": found["latency_ns_p50"],
        "latency_ns_p99": found["latency_ns_p99"],
        "gap_ns_max": found["gap_ns_max"],
        "others_cpus": others,
        "argv": [str(word) for word in argv],
    }


def fio(args, row, target, file):
    """fio does the work itself: its own CPU time is the comparison for a daemon's."""
    argv = target.argv(args.bin_dir, row, file, None)
    argv += [f"--runtime={args.runtime}", f"--ramp_time={args.ramp}", "--output-format=json"]
    argv = pinned(args.daemon_cpus, argv)
    result, others = watched(argv, None)
    job = parse(argv, result)["jobs"][0]
    side = job["read" if row.rw.endswith("read") else "write"]
    if job["error"]:
        raise Failed(f"{target.name}: fio reports error {job['error']}")
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    percentiles = side["clat_ns"].get("percentile", {})
    return {
        "iops": side["iops"],
        "cpu_ns_per_request": cpu_s * 1e9 / max(side["total_ios"], 1),
        "latency_ns_p50": percentiles.get("50.000000"),
        "latency_ns_p99": percentiles.get("99.000000"),
        "gap_ns_max": None,
        "others_cpus": others,
        "argv": argv,
    }


def floor(args):
    """What waking a thread and handing over a cache line cost here and now."""
    argv = [args.bin_dir / "blockport", "bench", "--floor", "--runtime", str(min(args.runtime, 1.0)), "--json"]
    try:
        result = subprocess.run(argv, capture_output=True, check=False)
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}; build it: cargo build --release --workspace") from error
    return parse(argv, result)


def watched(argv, daemon_pid):
    """Runs a client and says how many CPUs were used by neither it nor the daemon."""
    own = lambda: children_seconds() + (machine.process_seconds(daemon_pid) if daemon_pid else 0)  # noqa: E731
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
        raise Failed(f"{' '.join(map(str, argv))}: exit status {result.returncode}: {message}")
    # fio puts its notes before the object.
    text = result.stdout.decode(errors="replace")
    return json.loads(text[text.index("{"):])


def pinned(cpus, argv):
    return ["taskset", "-c", cpus, *argv] if cpus else argv


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
