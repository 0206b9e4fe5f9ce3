"""
How many examples a folder's rows hold, and what of its input they do not.

finetune/prepare_sft.py says it before it writes them, and shards.json keeps it, so that train.py
says the same before it trains. A shard's counts:

    {"unit": "example", "examples": 95, "tokens": 9120, "in_loss": 2280, "cut": 3,
     "rows": 18, "of_input": {"records": 104, "unread": 3, "too_long": 1}}

tokens: without padding. cut: examples that lost their end. unread: records that made no example;
too_long: examples without a target in the first block_size + 1 tokens.
"""

import contextlib

from run.manifest import Manifest
from run.shards import part_of

OF_SHARD = ("examples", "tokens", "in_loss", "cut", "rows")
OF_INPUT = ("records", "unread", "too_long")
USES = {"train": "to train on", "val": "to validate on"}


def lines(folder, counts):
    """What to say of {part: its counts}, "train" and "val", in that order; a part may be missing.

    Parts that one command made have one "of_input"."""
    said = []
    inputs = []  # (what was made of them, their counts)
    for part, use in USES.items():
        if part not in counts:
            continue
        c = counts[part]
        share = c["in_loss"] / max(1, c["tokens"])
        said.append(
            f"{folder}: {c['examples']:,} {c['unit']}s {use}: {c['tokens']:,} tokens, of which "
            f"{c['in_loss']:,} ({share:.1%}) count in the loss; {c['cut']:,} are cut at block_size"
        )
        if (c["unit"], c["of_input"]) not in inputs:
            inputs.append((c["unit"], c["of_input"]))
    for unit, c in inputs:
        said.append(
            f"{folder}: left out of {c['records']:,} records: {c['unread']:,} that make no "
            f"{unit}, {c['too_long']:,} whose answer begins beyond block_size"
        )
    return said


def counts_in(folder):
    """{part: counts} of a folder's shards, as far as its shards.json tells them.

    Nothing that it has may keep a run from its data: what is damaged tells nothing."""
    found = {}
    with contextlib.suppress(SystemExit, OSError):
        manifest = Manifest.read(folder)
        for name in manifest.names():
            counts = manifest.entry(name).get("counts")
            if _is_counts(counts) and manifest.is_finished(name):
                found[part_of(name)] = counts
    return found


def _is_counts(counts):
    if not isinstance(counts, dict) or not isinstance(counts.get("of_input"), dict):
        return False
    if not isinstance(counts.get("unit"), str):
        return False
    numbers = [counts.get(key) for key in OF_SHARD]
    numbers += [counts["of_input"].get(key) for key in OF_INPUT]
    return all(type(number) is int for number in numbers)
