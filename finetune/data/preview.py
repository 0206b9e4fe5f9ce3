"""
Examples as text, with what counts in the loss marked: a wrong template is seen at once.

On a terminal what counts is green; elsewhere, or where NO_COLOR is set, it is in [[ ]].
"""

import itertools
import os
import re
import sys

import numpy as np

from run.shards import IN_LOSS

PIECE = 600  # characters that are shown of what counts, or of what does not, in one go
GREEN = "\x1b[32m", "\x1b[0m"
BRACKETS = "[[", "]]"


def show(enc, example, number):
    """Print an example. enc: its tokenizer. number: from 1."""
    count = int((example.flags & IN_LOSS).sum())
    cut = ", its end cut" if example.cut else ""
    marks = BRACKETS
    legend = "[[ ]]"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        marks = GREEN
        legend = "green"
    print(f"--- example {number}: {len(example.tokens):,} tokens{cut}; "
          f"{count:,} count in the loss, in {legend}")
    for line in marked(enc, example, marks).split("\n"):
        print(f"    {line}")


def marked(enc, example, marks=BRACKETS):
    """The text of an example, with `marks` (before, after) around what counts."""
    before, after = marks
    text = ""
    for piece, counts in pieces(enc, example):
        piece = shortened(visible(piece))
        text += f"{before}{piece}{after}" if counts else piece
    return text


def pieces(enc, example):
    """[(text, whether it counts)] of an example, as its tokens decode together."""
    counts = (example.flags & IN_LOSS) > 0  # (length,)
    ends = [*(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    ids = example.tokens.tolist()
    found = []
    for start, end in itertools.pairwise([0, *ends]):
        # by itself a piece may lose the blank before its first word
        whole = enc.decode(ids[:end])
        before = enc.decode(ids[:start]) if start else ""
        text = whole[len(before) :] if whole.startswith(before) else enc.decode(ids[start:end])
        found.append((text, bool(counts[start])))
    return found


def visible(text):
    """A text whose control characters, but for newlines, are spelled: a terminal obeys them."""
    return re.sub(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: spelled(m[0]), text)


def spelled(character):
    return character.encode("unicode_escape").decode()


def shortened(text):
    """A text without its middle, if it is long."""
    more = len(text) - PIECE
    if more <= 0:
        return text
    return f"{text[: PIECE // 2]} ... ({more:,} characters) ... {text[-PIECE // 2 :]}"
