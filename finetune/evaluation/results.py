"""
The file of an evaluation's results so far: a line of JSON each, below one that says of what they are.
"""

import contextlib
import json
import math
import os

from run.files import check_file, lock, parse_json


@contextlib.contextmanager
def open_partial(path):
    """The file of results so far, to read and to append to; this process alone has it."""
    if os.path.exists(path):
        check_file(path)
    with open(path, "a+b") as f:
        if lock(f) is False:
            raise SystemExit(f"error: {path}: another process evaluates this: wait for it")
        try:
            yield f
        finally:
            if os.path.exists(path) and not os.path.getsize(path):
                os.unlink(path)  # nothing was found


def finished(partial, items, subject, task):
    """{item: result} that an interrupted run left in a file, which is then ready to append to.

    There is none if it is of another subject. What is no result of an item is done again."""
    entries = []
    partial.seek(0)
    lines = partial.read().splitlines()
    for line in lines:
        try:
            entries.append(parse_json(line))
        except ValueError:  # a torn last line
            entries.append(None)
    head = {"subject": subject}  # the file's first line
    if entries and entries[0] != head:
        print(
            f"{partial.name} is of other settings, or the model or the data have changed: "
            "starting anew"
        )
        entries = []
    done = {}
    for entry in entries[1:]:
        if is_result(entry, items, task):
            done[entry["item"]] = entry
    # written anew, without what is no result
    partial.truncate(0)
    for entry in [head, *done.values()]:
        partial.write(json.dumps(entry).encode() + b"\n")
    partial.flush()
    return done


def is_result(entry, items, task):
    """Whether an entry of a file of results is one of an item."""

    def is_finite(x):
        return isinstance(x, (int, float)) and math.isfinite(x)

    if not isinstance(entry, dict) or not is_finite(entry.get("seconds")):
        return False
    i = entry.get("item")
    if type(i) is not int or not 0 <= i < len(items):
        return False
    if task == "generate":
        return isinstance(entry.get("text"), str)
    scores = entry.get("scores")
    right_count = isinstance(scores, list) and len(scores) == len(items[i]["rows"])
    return right_count and all(map(is_finite, scores))
