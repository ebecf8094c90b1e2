"""The machine: how busy it is, what it is, and the files that are measured. It starts nothing."""

import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import time

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Below this share of one CPU in use the machine counts as idle.
IDLE_CPUS = 0.10
IDLE_WINDOW_S = 0.3


def busy_seconds():
    """CPU time since boot that programs, or other machines on this hardware, used. Not interrupts: while we measure
    they are ours."""
    fields = [int(field) for field in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = fields[:8]
    return (user + nice + system + steal) * TICK_S


def process_seconds(pid):
    """CPU time of a process and all its threads, those that ended included; 0 if it is gone."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = stat.rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def wait_until_idle(timeout, tell):
    """Waits, at most `timeout` seconds, for a window in which hardly any CPU was used; whether it came."""
    deadline = time.monotonic() + timeout
    while True:
        before = busy_seconds()
        time.sleep(IDLE_WINDOW_S)
        cpus = (busy_seconds() - before) / IDLE_WINDOW_S
        if cpus <= IDLE_CPUS:
            return True
        if time.monotonic() >= deadline:
            return False
        tell(f"waiting for an idle machine ({cpus:.1f} CPUs in use)")


def file_system(path):
    """As stat names it: ext4 is "ext2/ext3"."""
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()


def can_loop():
    """Whether loop devices can be made here."""
    return os.geteuid() == 0 and bool(shutil.which("losetup")) and os.path.exists("/dev/loop-control")


def facts(args, files):
    """What the numbers depend on."""
    cpu = next((line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "file_systems": files.file_systems,
        "qemu_storage_daemon": version(["qemu-storage-daemon", "--version"]),
        "fio": version(["fio", "--version"]),
        "blockport": version([args.bin_dir / "blockport", "--version"]),
        "commit": version(["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty"]),
    }


def version(argv):
    if not shutil.which(argv[0]):
        return None
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or [None])[0]


class Hogs:
    """More busy threads than CPUs, while it is entered."""

    def __init__(self, wanted):
        self._count = len(os.sched_getaffinity(0)) + 1 if wanted else 0
        self._processes = []

    def __enter__(self):
        command = ["sh", "-c", "while :; do :; done"]
        self._processes = [subprocess.Popen(command) for _ in range(self._count)]
        return self

    def __exit__(self, *_error):
        for process in self._processes:
            process.kill()
            process.wait()

    def seconds(self):
        """CPU time they have used."""
        return sum(process_seconds(process.pid) for process in self._processes)


class Files:
    """A file on a disk, with a loop device on it, and one in memory: made when asked for and removed at the end."""

    def __init__(self, disk_dir, mebibytes, media):
        self._dirs = {"ext4": disk_dir, "tmpfs": pathlib.Path("/dev/shm")}
        self._mebibytes = mebibytes
        wanted = {"ext4" if medium == "loop" else medium for medium in media}
        self._media = [medium for medium in self._dirs if medium in wanted]
        self._loop_wanted = "loop" in media
        self._loop = None
        self._paths = {}
        self.file_systems = {}

    def __enter__(self):
        try:
            for medium in self._media:
                self._make(medium)
            if self._loop_wanted:
                self._loop = self._attach_loop()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error):
        if self._loop:
            subprocess.run(["losetup", "--detach", self._loop], check=False)
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def __getitem__(self, medium):
        return self._loop if medium == "loop" else self._paths.get(medium)

    def _attach_loop(self):
        argv = ["losetup", "--find", "--show", "--direct-io=on", str(self._paths["ext4"])]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    def _make(self, medium):
        directory = self._dirs[medium]
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="blockport-bench-", suffix=".raw", dir=directory)
        self._paths[medium] = pathlib.Path(name)
        # Really written: holes and unwritten extents would be measured otherwise, and they are faster.
        chunk = os.urandom(1 << 20)
        with os.fdopen(descriptor, "wb") as file:
            for _ in range(self._mebibytes):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.file_systems[medium] = file_system(directory)
