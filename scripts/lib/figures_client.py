"""Reads a daemon's figures with prometheus_client's parser, after reads by a front-end: SOCKET. Exit status 1 says what was
not as Prometheus, or its users, expect."""

import http.client
import socket
import sys

from prometheus_client.parser import text_string_to_metric_families


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def page(path):
    connection = UnixConnection(path)
    connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", answer.headers
    return answer.read().decode()


def families(path):
    found = {}
    for family in text_string_to_metric_families(page(path)):
        assert family.name not in found, f"{family.name} stands twice"
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family
        labels = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(labels) == len(set(labels)), f"{family.name} has the same figure twice"
        found[family.name] = family
    return found


def value(family, suffix="", **labels):
    (sample,) = [s for s in family.samples if s.name == family.name + suffix and s.labels == labels]
    return sample.value


first = families(sys.argv[1])
reads = value(first["blockport_operations"], "_total", export="disk", operation="read")
assert reads > 0, "the front-end has read"
assert value(first["blockport_bytes"], "_total", export="disk", operation="read") == reads * 4096

latency = first["blockport_latency_seconds"]
assert latency.type == "histogram"
of_reads = [s for s in latency.samples if s.labels.get("operation") == "read"]
buckets = [(float(s.labels["le"]), s.value) for s in of_reads if s.name.endswith("_bucket")]
assert buckets == sorted(buckets) and buckets[-1][0] == float("inf"), buckets
assert [count for _, count in buckets] == sorted(count for _, count in buckets), buckets
assert buckets[-1][1] == value(latency, "_count", export="disk", operation="read") == reads
assert value(latency, "_sum", export="disk", operation="read") > 0

requests = sum(s.value for s in first["blockport_queue_requests"].samples)
assert requests >= reads, (requests, reads)
assert value(first["blockport_export_size_bytes"], export="disk") == 16 << 20
assert value(first["blockport_export_iostatus"], export="disk", status="ok") == 1

# What only grows does.
second = families(sys.argv[1])
for name, family in first.items():
    if family.type == "counter":
        for before, after in zip(family.samples, second[name].samples):
            assert before.labels == after.labels and before.value <= after.value, (before, after)
