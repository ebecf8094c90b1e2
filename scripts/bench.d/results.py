"""What a run found: one JSON file, saved after each sample, from which tables and plots are made at any time."""

import dataclasses
import json
import pathlib

# Raised when a field changes its meaning.
FORMAT = 2


class Unreadable(Exception):
    """A file that holds no results; the message says which and why."""


class Results:
    """The samples of a run and what they depend on."""

    def __init__(self, path, data):
        self.path = pathlib.Path(path)
        self.data = data

    @classmethod
    def new(cls, path, facts, options, plan, left_out):
        rows = [{**dataclasses.asdict(row), "targets": [target.name for target in able]} for row, able in plan]
        data = {"format": FORMAT, "facts": facts, "options": options, "rows": rows, "left_out": left_out, "commands": {},
                "not_measured": {}, "floors": [], "samples": [], "failures": [], "instructions": []}
        return cls(path, data)

    @classmethod
    def load(cls, path):
        try:
            data = json.loads(pathlib.Path(path).read_text())
        except (OSError, ValueError) as error:
            raise Unreadable(f"{path}: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise Unreadable(f"{path}: no results of this scripts/bench (format {FORMAT})")
        return cls(path, data)

    def save(self):
        """Replaces the file as a whole: it is never seen half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(self.text())
        new.replace(self.path)

    def text(self):
        """The file's content: an object, with a line for each thing that is one of many."""
        def lines(value):
            if isinstance(value, list) and value:
                return "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]"
            return json.dumps(value)

        return "{\n" + ",\n".join(f"{json.dumps(name)}: {lines(value)}" for name, value in self.data.items()) + "\n}\n"

    def note_command(self, row, target, command):
        self.commands.setdefault(row, {})[target] = command

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    def is_given_up(self, row, target):
        """Whether that target failed there, or cannot run at all: it is not tried again."""
        return target in self.left_out or any(failure["row"] == row and failure["target"] == target for failure in self.failures)

    def lacking(self):
        """How many runs are still to be done."""
        wanted = sum(not self.is_given_up(row["name"], target) for row in self.rows for target in row["targets"])
        have = sum(not self.is_given_up(sample["row"], sample["target"]) for sample in self.samples)
        return wanted * self.options["rounds"] - have

    def rounds(self):
        return 1 + max((sample["round"] for sample in self.samples), default=-1)

    def measured(self, row):
        """The names of a row's targets that have samples, in the order of the plan."""
        have = {sample["target"] for sample in self.samples if sample["row"] == row["name"]}
        return [name for name in row["targets"] if name in have]
