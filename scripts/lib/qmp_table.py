"""Asks a QEMU without a machine what it answers to commands about devices, and prints a table of it: for each command its
arguments and the class of the error, or the answer with each value replaced by the name of its type."""

import json
import socket
import sys

THROTTLE = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}

COMMANDS = [
    ("query-block", {}),
    ("query-blockstats", {}),
    ("query-iothreads", {}),
    ("block_resize", {"device": "no", "size": 1048576}),
    ("block_resize", {"size": 1048576}),
    ("block_resize", {"device": "e0"}),
    ("block_resize", {"device": "e0", "size": "x"}),
    ("blockdev-open-tray", {"device": "e0"}),
    ("blockdev-open-tray", {"device": "no"}),
    ("blockdev-open-tray", {}),
    ("blockdev-open-tray", {"device": "e0", "id": "e0"}),
    ("blockdev-close-tray", {"device": "e0"}),
    ("blockdev-close-tray", {"id": "no"}),
    ("blockdev-remove-medium", {"id": "no"}),
    ("blockdev-remove-medium", {}),
    ("blockdev-insert-medium", {"id": "no", "node-name": "n0"}),
    ("blockdev-insert-medium", {"id": "e0"}),
    ("blockdev-change-medium", {"device": "no", "filename": "/x"}),
    ("blockdev-change-medium", {"device": "e0", "filename": "/no/such/file"}),
    ("blockdev-change-medium", {"device": "e0", "filename": "/x", "read-only-mode": "no"}),
    ("block_set_io_throttle", {"device": "e0", **THROTTLE, "iops": 100}),
    ("block_set_io_throttle", {"device": "e0", **THROTTLE}),
    ("block_set_io_throttle", {"device": "no", **THROTTLE}),
    ("block_set_io_throttle", {"device": "e0", "bps": 0}),
    ("block_set_io_throttle", {"device": "e0", **THROTTLE, "iops": 1, "iops_rd": 1}),
    ("eject", {"device": "no"}),
    ("eject", {"id": "no", "force": True}),
    ("eject", {}),
    ("eject", {"device": "e0", "force": "yes"}),
    ("eject", {"device": "e0"}),
    ("query-block", {}),
    ("block_resize", {"device": "e0", "size": 1048576}),
    ("block_set_io_throttle", {"device": "e0", **THROTTLE, "iops": 100}),
    ("eject", {"device": "e0"}),
]


def shape(value):
    """Each value by the name of its type; of a list, its first entry."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in sorted(value.items())}
    if isinstance(value, list):
        return [shape(entry) for entry in value[:1]]
    return {bool: "bool", int: "int", float: "number", str: "str", type(None): "null"}[type(value)]


def main(path):
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
        lines = stream.makefile("r", encoding="ascii")
        lines.readline()

        def execute(command, arguments):
            stream.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
            while True:
                answer = json.loads(lines.readline())
                if "event" not in answer:
                    return answer

        execute("qmp_capabilities", {})
        rows = []
        for command, arguments in COMMANDS:
            answer = execute(command, arguments)
            row = {"execute": command, "arguments": arguments}
            if "error" in answer:
                row["error"] = answer["error"]["class"]
            else:
                row["return"] = shape(answer["return"])
            rows.append("  " + json.dumps(row))
        print("[\n" + ",\n".join(rows) + "\n]")


main(sys.argv[1])
