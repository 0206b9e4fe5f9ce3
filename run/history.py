"""
What a run's log.jsonl tells, for run/plot.py to draw.

A log is read line by line into a summary of bounded size: runs may have millions of steps.
"""

import json
import os

import numpy as np

from run.files import check_file

POINTS = 1000  # that a curve has at least, of a longer log
COLUMNS = 1024  # that a row of subspaces.png has at most


def read_log(path):
    """The entries of log.jsonl, one after the other, up to a line that a power cut tore.

    Each has "iter", and of the rest what is as Log.write() writes it: finite numbers, and
    "subspaces" {weight: [[step, similarity, gap], ...]}. Raises OSError."""
    check_file(path)
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)  # older logs have NaN
            except (ValueError, RecursionError):
                return  # the line before it was whole, and is the last that counts
            if isinstance(entry, dict) and _is_number(entry.get("iter")):
                known = {key: value for key, value in entry.items() if _is_number(value)}
                known["subspaces"] = _refreshes(entry.get("subspaces"))
                yield known


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e18  # NaN is not


def _refreshes(found):
    """{weight: [(step, similarity, gap), ...]} of what should be such."""
    known = {}
    for name, refreshes in found.items() if isinstance(found, dict) else ():
        known[name] = [
            refresh
            for refresh in (refreshes if isinstance(refreshes, list) else ())
            if isinstance(refresh, list) and len(refresh) == 3 and all(map(_is_number, refresh))
            and refresh[0] >= 0 and refresh[2] > 0
        ]
    return known


class Curve:
    """Points in their order. Of many, means of as many neighbours each are kept, and their range.

    points: [(x of the last, mean, lowest, highest)], POINTS to 2 * POINTS of a long log."""

    def __init__(self):
        self.points = []
        self.width = 1  # neighbours in a point
        self.open = []  # those of the next point

    def add(self, x, y):
        self.open.append((x, y, y, y))
        if len(self.open) == self.width:
            self.points.append(_merged(self.open))
            self.open = []
        if len(self.points) == 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [_merged(pair) for pair in pairs]
            self.width *= 2

    def columns(self):
        """x, mean, lowest, highest, an array each."""
        points = self.points + ([_merged(self.open)] if self.open else [])
        return np.array(points, dtype=float).reshape(-1, 4).T


def _merged(points):
    x, means, lows, highs = zip(*points)
    return x[-1], sum(means) / len(means), min(lows), max(highs)


class SubspaceMap:
    """Similarity and gap of each weight over the steps, in at most COLUMNS columns."""

    def __init__(self):
        self.steps = 0  # as far as the log goes
        self.width = 1  # steps in a column
        self.rows = {}  # {weight: (2, COLUMNS): similarity and gap of its last refresh in each}

    def add(self, entry):
        self._reach(int(entry["iter"]))
        for name, refreshes in entry["subspaces"].items():
            if name not in self.rows and refreshes:
                self.rows[name] = np.full((2, COLUMNS), np.nan, dtype=np.float32)
            for step, similarity, gap in refreshes:
                self._reach(int(step))
                self.rows[name][:, int(step) // self.width] = similarity, gap

    def _reach(self, step):
        """Make room for a step: columns become twice as wide until it has one."""
        self.steps = max(self.steps, step + 1)
        while step >= COLUMNS * self.width:
            self.width *= 2
            for row in self.rows.values():
                earlier, later = row[:, ::2], row[:, 1::2]
                row[:, : COLUMNS // 2] = np.where(np.isnan(later), earlier, later)
                row[:, COLUMNS // 2 :] = np.nan

    def values(self):
        """(names of weights, by kind and depth; similarity, gap: (weights, columns) each).

        A value holds until the next refresh; NaN before the first one."""
        names = sorted(self.rows, key=kind_and_depth)
        values = np.stack([self.rows[name] for name in names], axis=1)  # (2, weights, COLUMNS)
        values = values[:, :, : -(-self.steps // self.width)]
        place = np.where(np.isnan(values), 0, np.arange(values.shape[2]))
        place = np.maximum.accumulate(place, axis=2)  # of the last refresh until then
        similarity, gap = np.take_along_axis(values, place, axis=2)
        return names, similarity, gap


def kind_and_depth(name):
    """(kind, block) of a weight: blocks.7.attn.q_proj is an attn.q_proj, the one of block 7."""
    parts = name.split(".")
    depth = [int(part) for part in parts if part.isdecimal()]
    kind = [part for part in parts if not part.isdecimal()]
    if depth and kind[:1] == ["blocks"]:
        kind = kind[1:]
    return ".".join(kind), depth


class Summary:
    """What a run's folder tells by its log. Raises ValueError if that has no step, or OSError."""

    def __init__(self, folder):
        self.name = os.path.basename(os.path.abspath(folder))
        self.training = Curve()  # loss by tokens
        self.validation = Curve()
        self.by_hours = Curve()  # validation loss by hours of training
        self.subspaces = SubspaceMap()
        self.peak = 0.0  # GiB
        self.hours = 0.0  # of training steps; interruptions and evaluations do not count
        path = os.path.join(folder, "log.jsonl")
        self.tokens = 0  # of the last line of training
        for entry in read_log(path):
            self._add(entry)
        if not self.training.columns().size and not self.validation.columns().size:
            raise ValueError(f"{path}: holds no loss yet")

    def _add(self, entry):
        self.subspaces.add(entry)
        tokens = entry.get("tokens", self.tokens)
        if entry.get("tokens_per_s", 0) > 0:  # a line of training, not of an evaluation
            self.hours += max(0, tokens - self.tokens) / entry["tokens_per_s"] / 3600
            self.tokens = tokens
        self.peak = max(self.peak, entry.get("peak_memory_gb", 0.0))
        if "loss" in entry:
            self.training.add(tokens, entry["loss"])
        if "val_loss" in entry:
            self.validation.add(tokens, entry["val_loss"])
            # an evaluation is as late as the last line of training before it
            self.by_hours.add(self.hours, entry["val_loss"])
