"""Times qcow2 images and `blockport img` beside QEMU's programs, in rounds that alternate.

Owns the rows, how each is measured, and the report. scripts/bench-qcow2 provides the programs.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

BLOCKPORT = os.environ.get("BLOCKPORT", "blockport")
SECRET = "of-no-worth"


def run(*words, **more):
    """Runs a program that must succeed; returns what it said."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}".strip())
    return done.stdout


def forget(*paths):
    """Takes files out of the page cache, written back first."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Daemon:
    """blockport, serving one node on a socket of its own."""

    def __init__(self, place, node, iothreads=1):
        self.socket = os.path.join(place, "bench.sock")
        words = [BLOCKPORT]
        for index in range(iothreads):
            words += ["--object", f"iothread,id=t{index}"]
        for part in node:
            words += part
        words += ["--export", f"vhost-user-blk,id=e,node-name=disk,writable=on,iothread=t0,"
                  f"addr.type=unix,addr.path={self.socket}"]
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 30
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the daemon did not start: {self.process.stderr.read()}")
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)

    def bench(self, *words, seconds):
        said = run(BLOCKPORT, "bench", "--socket", self.socket, "--json", "--runtime", seconds, "--ramp", min(1, seconds),
                   "--wait", "once", "--daemon-pid", self.process.pid, *words)
        return json.loads(said)


def found(report, *names):
    """The first number of that name in a report, however deep."""
    if isinstance(report, dict):
        for name in names:
            if isinstance(report.get(name), (int, float)):
                return report[name]
        report = list(report.values())
    if isinstance(report, list):
        for part in report:
            number = found(part, *names)
            if number is not None:
                return number
    return None


def iops(report):
    return found(report, "iops")


class Bench:
    def __init__(self, args, place):
        self.args, self.place = args, place
        self.mib, self.seconds = args.size, args.seconds
        self.queue_depth = None

    def path(self, name):
        return os.path.join(self.place, name)

    def source(self):
        """A raw image, half of it compressible, a quarter holes."""
        path = self.path("source.raw")
        if not os.path.exists(path):
            with open(path, "wb") as file:
                for index in range(self.mib):
                    file.seek(index << 20)
                    if index % 4 == 0:
                        file.write(os.urandom(1 << 20))
                    elif index % 4 != 3:
                        file.write((b"%016d" % index) * 32768 + os.urandom(1 << 19))
                file.truncate(self.mib << 20)
        return path

    def full(self, name, *options):
        """A qcow2 image in which everything is allocated."""
        path = self.path(name)
        if not os.path.exists(path):
            raw = self.path("full.raw")
            if not os.path.exists(raw):
                with open(raw, "wb") as file:
                    for _ in range(self.mib):
                        file.write(os.urandom(1 << 20))
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
            forget(path)
        return path

    def node(self, path, *options):
        text = ",".join(["qcow2,node-name=disk,file.driver=file,file.cache.direct=on,cache.direct=on",
                         f"file.filename={path}", *options])
        return [["--blockdev", text]]

    def raw_node(self):
        self.full("full.qcow2")
        path = self.path("full.raw")
        return [["--blockdev", f"raw,node-name=disk,file.driver=file,file.cache.direct=on,file.filename={path}"]]

    def rate(self, node, *words, prepare=None):
        if prepare:
            prepare()
        with Daemon(self.place, node) as daemon:
            return daemon.bench(*words, seconds=self.seconds)

    def qemu_bench(self, path, *words, options="", requests=None, size=4096, depth=32, prepare=None):
        """Requests a second of `qemu-img bench`."""
        if prepare:
            prepare()
        count = requests or 4000 * max(1, self.seconds)
        image = f"driver=qcow2,file.driver=file,file.filename={path},file.cache.direct=on,cache.direct=on{options}"
        said = run("qemu-img", "bench", "-c", count, "-d", depth, "-s", size, "-t", "none", "-i", "io_uring", *words,
                   "--image-opts", image)
        took = float(re.search(r"completed in ([0-9.]+) seconds", said).group(1))
        return count / max(took, 1e-6)

    # Each row returns two functions: ours and the other's; and whether more is better.

    def randread(self):
        path = self.full("full.qcow2")
        words = ["--rw", "randread", "--bs", "4k", "--iodepth", "32"]
        return (lambda: iops(self.rate(self.node(path), *words)), lambda: iops(self.rate(self.raw_node(), *words)))

    def randread_cpu(self):
        path = self.full("full.qcow2")
        words = ["--rw", "randread", "--bs", "4k", "--iodepth", "32"]
        cpu = lambda report: found(report, "daemon_cpu_ns_per_request", "cpu_ns_per_request", "ns_per_request")
        return (lambda: cpu(self.rate(self.node(path), *words)), lambda: cpu(self.rate(self.raw_node(), *words)))

    def chain(self):
        base = self.full("full.qcow2")
        below = base
        for level in (1, 2):
            path = self.path(f"level{level}.qcow2")
            if not os.path.exists(path):
                run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path)
                writes = [word for at in range(level, self.mib, 3) for word in ("-c", f"write -q {at}M 256k")]
                for start in range(0, len(writes), 400):
                    run("qemu-io", "-f", "qcow2", *writes[start:start + 400], path)
            below = path
        words = ["--rw", "randread", "--bs", "4k", "--iodepth", "32"]
        return (lambda: iops(self.rate(self.node(below), *words)), lambda: iops(self.rate(self.raw_node(), *words)))

    def allocating(self, size):
        path = self.path("empty.qcow2")
        span = max(self.mib, 64)

        def prepare():
            run("qemu-img", "create", "-q", "-f", "qcow2", path, f"{span}M")

        # One write into each cluster, so that all of them allocate; qemu-img bench strides, ours strikes at random.
        requests = min(span * 16, 4000 * max(1, self.seconds))

        def ours():
            prepare()
            with Daemon(self.place, self.node(path)) as daemon:
                said = run(BLOCKPORT, "bench", "--socket", daemon.socket, "--json", "--rw", "randwrite", "--bs", size,
                           "--iodepth", 32, "--requests", requests, "--wait", "once")
                return iops(json.loads(said))

        bytes_of = {"4k": 4096, "64k": 65536}[size]
        return (ours, lambda: self.qemu_bench(path, "-w", "-S", 65536, size=bytes_of, requests=requests, prepare=prepare))

    def small_cache(self):
        path = self.path("sparse64g.qcow2")
        if not os.path.exists(path):
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", path,
                "4G" if self.args.short else "64G")
        cache = ",l2-cache-size=1M,refcount-cache-size=256K"
        words = ["--rw", "randread", "--bs", "4k", "--iodepth", "32"]
        stride = (1 << 30) // 1000 // 4096 * 4096 + 4096
        return (lambda: iops(self.rate(self.node(path, cache[1:]), *words)),
                lambda: self.qemu_bench(path, "-S", stride, options=cache))

    def compressed_read(self):
        self.source()
        path = self.path("compressed.qcow2")
        if not os.path.exists(path):
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", 8, self.source(), path)
        words = ["--rw", "read", "--bs", "64k", "--iodepth", "8"]
        requests = min(self.mib * 16, 2000 * max(1, self.seconds))
        return (lambda: iops(self.rate(self.node(path), *words)),
                lambda: self.qemu_bench(path, size=65536, depth=8, requests=requests))

    def convert(self, words, source, target):
        """Wall time of a conversion, page cache dropped."""
        def timed(program):
            def once():
                forget(source)
                if os.path.exists(target):
                    os.unlink(target)
                start = time.monotonic()
                run(*program, "convert", "-m", 8, *words, source, target)
                took = time.monotonic() - start
                forget(target)
                return took
            return once
        return (timed([BLOCKPORT, "img"]), timed(["qemu-img"]))

    def to_qcow2(self):
        return self.convert(["-f", "raw", "-O", "qcow2"], self.source(), self.path("target.qcow2"))

    def to_raw(self):
        path = self.path("source.qcow2")
        if not os.path.exists(path):
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.source(), path)
        return self.convert(["-f", "qcow2", "-O", "raw"], path, self.path("target.raw"))

    def to_compressed(self):
        return self.convert(["-f", "raw", "-O", "qcow2", "-c"], self.source(), self.path("target.qcow2"))

    def luks(self, rw):
        path = self.path("secret.luks")
        secret = ["--object", f"secret,id=s,data={SECRET}"]
        if not os.path.exists(path):
            run("qemu-img", "create", "-q", "-f", "luks", *secret, "-o", "key-secret=s,iter-time=10", path, f"{self.mib}M")
        node = [secret, ["--blockdev", "luks,node-name=disk,key-secret=s,file.driver=file,file.cache.direct=on,"
                         f"cache.direct=on,file.filename={path}"]]
        words = ["--rw", rw, "--bs", "4k", "--iodepth", "32"]
        return (lambda: iops(self.rate(node, *words)), lambda: iops(self.rate(self.raw_node(), *words)))


# Name, what is measured, the bound on ours over theirs, whether more is better, how.
ROWS = [
    ("randread", "4k randread, allocated: IOPS over raw", 0.97, True, Bench.randread),
    ("randread-cpu", "the same: CPU ns per request over raw", None, False, Bench.randread_cpu),
    ("chain", "4k randread over a 3-deep chain: IOPS over raw", 0.9, True, Bench.chain),
    ("allocating-4k", "4k allocating randwrite, depth 32: IOPS over qemu-img bench", 2, True, lambda b: b.allocating("4k")),
    ("allocating-64k", "64k allocating randwrite, depth 32: IOPS over qemu-img bench", 2, True, lambda b: b.allocating("64k")),
    ("small-cache", "4 KiB clusters, cache too small: IOPS over qemu-img bench", 1, True, Bench.small_cache),
    ("compressed-read", "compressed read: throughput over qemu-img bench", 1.5, True, Bench.compressed_read),
    ("to-qcow2", "img convert raw to qcow2: time over qemu-img", 0.95, False, Bench.to_qcow2),
    ("to-raw", "img convert qcow2 to raw: time over qemu-img", 0.95, False, Bench.to_raw),
    ("to-compressed", "img convert raw to compressed qcow2: time over qemu-img", 0.95, False, Bench.to_compressed),
    ("luks-read", "LUKS 4k randread: IOPS over raw", 0.9, True, lambda b: b.luks("randread")),
    ("luks-write", "LUKS 4k randwrite: IOPS over raw", 0.9, True, lambda b: b.luks("randwrite")),
]


def measure(bench, row):
    name, what, bound, more, make = row
    result = {"row": name, "what": what, "bound": bound}
    try:
        ours, theirs = make(bench)
        pairs = []
        for number in range(bench.args.rounds):
            # Who comes first alternates.
            order = [ours, theirs] if number % 2 == 0 else [theirs, ours]
            values = [measured() for measured in order]
            if None in values:
                raise RuntimeError("the report lacks the figure")
            pairs.append(values if number % 2 == 0 else values[::-1])
        ratios = [mine / other for mine, other in pairs]
        ratio = statistics.median(ratios)
        met = None if bound is None else (ratio >= bound if more else ratio <= bound)
        result.update(pairs=pairs, ratio=ratio, least=min(ratios), most=max(ratios), met=met)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        result["skipped"] = str(error).splitlines()[0][:200]
    return result


def markdown(results):
    lines = ["| work | bound | ratio | spread | |", "|---|---|---|---|---|"]
    for result in results:
        more = next(row[3] for row in ROWS if row[0] == result["row"])
        bound = "-" if result["bound"] is None else f"{'≥' if more else '≤'} {result['bound']}"
        if "skipped" in result:
            lines.append(f"| {result['what']} | {bound} | - | - | skipped: {result['skipped']} |")
            continue
        met = {None: "", True: "met", False: "**missed**"}[result["met"]]
        spread = f"{result['least']:.2f}–{result['most']:.2f}"
        lines.append(f"| {result['what']} | {bound} | {result['ratio']:.2f} | {spread} | {met} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--directory")
    parser.add_argument("--json")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{row[0]:16} {row[1]}" for row in ROWS))
        return
    if args.short:
        args.rounds, args.size, args.seconds = 1, 64, 1
    wanted = args.rows.split(",") if args.rows else [row[0] for row in ROWS]
    unknown = set(wanted) - {row[0] for row in ROWS}
    if unknown:
        sys.exit(f"there is no row {', '.join(sorted(unknown))}; --list names them")
    parent = args.directory or os.path.join(os.environ.get("PROJECT", "."), "target")
    os.makedirs(parent, exist_ok=True)
    place = tempfile.mkdtemp(prefix="bench-qcow2-", dir=parent)
    try:
        bench = Bench(args, place)
        results = []
        for row in ROWS:
            if row[0] in wanted:
                print(f"  {row[1]}", file=sys.stderr, flush=True)
                results.append(measure(bench, row))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(markdown(results))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rounds": args.rounds, "size_mib": args.size, "seconds": args.seconds, "results": results}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
