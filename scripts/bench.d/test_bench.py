"""Tests of what judges: medians, verdicts, comparisons, selections. They start no program that is measured."""

import copy
import pathlib
import unittest

import compare
import measures
import presets
import report
import results
import rows
import targets

NULL = next(row for row in rows.ROWS if row.name == "null-read-32")


def sample(target, number, iops, cpu_ns=1000.0, clean=True, row=NULL.name):
    return {"round": number, "row": row, "target": target, "iops": iops, "bandwidth_bytes_per_s": iops * 4096,
            "cpu_ns_per_request": cpu_ns, "cpu_user_ns_per_request": cpu_ns / 4, "cpu_system_ns_per_request": cpu_ns * 3 / 4,
            "latency_ns_mean": 1000, "latency_ns_p50": 1000, "latency_ns_p99": 2000, "latency_ns_p99_9": 3000,
            "gap_ns_max": 4000, "kicks_per_request": 0.0, "others_cpus": 0.0, "clean": clean}


def found(ours, theirs):
    facts = dict.fromkeys(("time", "kernel", "cpu", "cpus", "qemu_storage_daemon", "fio", "blockport", "commit"), "x")
    facts["file_systems"] = {}
    options = {"preset": "full", "rounds": len(ours), "runtime": 1.0, "ramp": 0.1, "file_size": 1, "daemon_cpus": None,
               "client_cpus": None, "quick": False}
    able = [target for target in targets.TARGETS if target.name in ("blockport", "qsd-io_uring-iothread")]
    made = results.Results.new(pathlib.Path("results.json"), facts, options, [(NULL, able)], {})
    made.samples.extend(sample("blockport", n, iops) for n, iops in enumerate(ours))
    made.samples.extend(sample("qsd-io_uring-iothread", n, iops) for n, iops in enumerate(theirs))
    return made


class Judging(unittest.TestCase):
    def verdict(self, ours, theirs, **how):
        bound = measures.Measure(NULL.name, "iops", "qsd-*", "at least", 8.0)
        return measures.judge(found(ours, theirs).samples, [bound], **how)[0]

    def test_a_ratio_is_taken_round_by_round(self):
        verdict = self.verdict([80, 900, 160], [10, 100, 20])
        self.assertEqual((verdict["is"], verdict["max"], verdict["verdict"]), (8.0, 9.0, "met"))

    def test_a_miss_within_the_spread_is_called_that(self):
        self.assertEqual(self.verdict([70, 70, 90], [10, 10, 10])["verdict"], "missed, within the spread")
        self.assertEqual(self.verdict([70, 70, 79], [10, 10, 10])["verdict"], "missed")
        self.assertEqual(self.verdict([70, 70, 90], [10, 10, 10], lenient=True)["verdict"], "met")

    def test_runs_that_others_disturbed_do_not_count_while_enough_are_left(self):
        samples = [sample("t", n, n, clean=n > 1) for n in range(5)]
        self.assertEqual([s["iops"] for s in measures.clean(samples)], [2, 3, 4])
        samples = [sample("t", n, n, clean=n > 3) for n in range(5)]
        self.assertEqual(len(measures.clean(samples)), 5)

    def test_the_thriftiest_rival_counts_for_cpu_and_the_fastest_for_rate(self):
        samples = [sample("blockport", 0, 10), sample("qsd-a", 0, 5, 500.0), sample("qsd-b", 0, 7, 900.0)]
        for value, best in (("cpu_ns_per_request", "qsd-a"), ("requests_per_cpu_s", "qsd-a"), ("iops", "qsd-b")):
            bound = measures.Measure(NULL.name, value, "qsd-*", "at least", 1.0)
            self.assertEqual(measures.best_rival(samples, bound), best, value)


class Comparing(unittest.TestCase):
    def marks(self, old, new):
        return {line["value"]: line["mark"] for line in compare.compare(old, new)}

    def test_a_run_is_no_regression_of_itself(self):
        same = found([100, 101, 102], [10, 10, 10])
        self.assertEqual(set(self.marks(same, copy.deepcopy(same)).values()), {""})

    def test_a_loss_stands_out(self):
        old, new = found([100, 101, 102], [10, 10, 10]), found([80, 81, 82], [10, 10, 10])
        self.assertEqual(self.marks(old, new)["iops"], "REGRESSION")
        self.assertEqual(self.marks(new, old)["iops"], "better")
        text = compare.markdown(old, new, compare.compare(old, new))
        self.assertIn("**REGRESSION**", text)
        self.assertIn("1 regressions", text)

    def test_one_bad_round_hides_no_loss(self):
        old, new = found([100, 101, 102], [10, 10, 10]), found([50, 51, 100.5], [10, 10, 10])
        self.assertEqual(self.marks(old, new)["iops"], "REGRESSION")

    def test_a_slower_machine_is_no_regression(self):
        old, new = found([100, 101, 102], [10, 10, 10]), found([80, 81, 82], [8, 8, 8])
        self.assertEqual(self.marks(old, new)["iops"], "")

    def test_noise_is_no_regression(self):
        old, new = found([80, 101, 122], [10, 10, 10]), found([70, 90, 102], [10, 10, 10])
        self.assertEqual(self.marks(old, new)["iops"], "")


class Selecting(unittest.TestCase):
    def test_every_measure_has_its_row_and_targets(self):
        names = {preset: {row.name: {t.name for t in able} for row, able in presets.plan(preset)} for preset in presets.PRESETS}
        for preset, wanted in (("measures", measures.MEASURES), ("full", measures.MEASURES), ("short", measures.GROSS)):
            for measure in wanted:
                able = names[preset].get(measure.row, set())
                self.assertIn(measure.target, able, measure)
                rivals = [name for name in able if measure.against and measures.fnmatch.fnmatch(name, measure.against)]
                self.assertTrue(measure.against is None or rivals, measure)

    def test_names_are_unique(self):
        for names in (rows.NAMES, targets.NAMES):
            self.assertEqual(len(names), len(set(names)))

    def test_a_report_of_a_part_of_a_run_says_so(self):
        part = found([100, 101], [10])
        text = report.markdown(part, measures.judge(part.samples))
        self.assertIn("Not complete: 1 runs are missing", text)
        self.assertIn("| null-read-32 | blockport | IOPS |", text)


if __name__ == "__main__":
    unittest.main()
