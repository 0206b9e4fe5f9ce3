r"""
Turns pairs of a chosen and a rejected answer into shards that train.py tunes on (finetune/dpo.py).

    # {"prompt": ..., "chosen": ..., "rejected": ...} a line, of texts or of messages
    python -m finetune.prepare_dpo --input=pairs.jsonl --out_dir=data/pairs \
        --encoding=HuggingFaceTB/SmolLM2-135M-Instruct
    # other fields, through the chat template
    python -m finetune.prepare_dpo --input=orca.jsonl --out_dir=data/orca --chat=True \
        --encoding=HuggingFaceTB/SmolLM2-135M-Instruct --prompt='{question}'
    python train.py config/finetune_dpo.py --data_dir=data/pairs

A record's "chosen" and "rejected" are of one of these kinds:

    texts                what follows the text in "prompt"; without one, what both begin with is it
    lists of messages    [{"role", "content"}], after those in "prompt", or whole conversations

Messages go through the checkpoint's chat template. What both sides begin with is context: what the
assistant says after it counts. A pair whose sides are the same teaches nothing, and is left out.

A row holds whole pairs, each the chosen example and then the rejected one. A side of a pair that is
longer than a row loses the end of its answer, where it has more than half of the row.

The rest is as in finetune.prepare_sft: inputs, the folder, the split, what is said and shown.
"""

import sys

from configurator import at_least, between, configure

# input and output
input = ""  # .json(l), .tsv, .csv, also with .gz, .zst; .parquet; hf:owner/name; commas between
out_dir = "data/dpo"  # NAME_train_00000.bin and NAME_val_00000.bin go here
encoding = "gpt2"  # of the model to tune: its checkpoint's folder, or a name like gpt2 or bytes
block_size: at_least(3) = 1024  # train.py's: both sides of a pair are in one row
dry_run = False  # show three pairs and the numbers, and leave: nothing is written

# pairs
columns = ""  # the fields of a .tsv or .csv, comma separated; '': its first line names them
prompt = ""  # a template over a record's fields, \n for a newline; '': {prompt}, if there is one
chosen = ""  # '': {chosen}
rejected = ""  # '': {rejected}
chat = False  # texts are messages: the prompt a user's, what follows it the assistant's

# rows
val_fraction: between(0, 1) = 0.05  # of the pairs, for validation; 1: all of them, 0: none
packing = True  # several pairs a row, where they fit; False: one a row, padded
seed: at_least(0) = 1337  # of the split, of the rows' order, and of what weights draw

if __name__ == "__main__":  # a tokenizer's libraries take a while: what is mistyped is said before
    s = configure(sys.modules[__name__])

import os

import numpy as np

from finetune.data import parquet
from finetune.data.conversations import conversations, template_fields, unused, without_nothing
from finetune.data.example_shards import prepare
from finetune.data.examples import Example, check_template, of_pieces
from finetune.data.inputs import shown_name
from finetune.data.messages import messages_of
from finetune.data.templates import fields_in, fill, template
from run.shards import IN_LOSS, REJECTED

MAKER = "finetune.prepare_dpo"
SETTINGS = "block_size columns prompt chosen rejected chat val_fraction packing seed".split()
SIDES = ("chosen", "rejected")


def main(s):
    try:
        prepare_dpo(s)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")


def prepare_dpo(s):
    """Make the two shards that the settings describe (see above)."""
    templates = {}  # {field: the user's template, or ""}
    for name in ("prompt", *SIDES):
        templates[name] = template(name, getattr(s, name))

    def check(file):
        check_columns(file, templates)

    def make(enc, record):
        made, rest = pair(enc, record, templates, s.chat)
        return [made], rest

    prepare(s, MAKER, SETTINGS, check, make, shorten, unit="pair")


def check_columns(file, templates):
    """Exit with one line if a file that tells its columns beforehand lacks one that is needed."""
    if not parquet.is_parquet(file.path):
        return
    there = parquet.columns(file.path)
    needed = fields_in(templates["prompt"])  # without a template it may be missing
    for name in SIDES:
        needed |= fields_in(templates[name] or f"{{{name}}}")
    missing = ", ".join(sorted(needed - {*there}))
    if missing:
        raise SystemExit(
            f"error: {shown_name(file)}: has no column {missing}; it has {', '.join(there)}: name "
            "those by --prompt, --chosen and --rejected"
        )


# -----------------------------------------------------------------------------
# pairs


def pair(enc, record, templates, chat=False):
    """(the Example of a record's pair, what of the record is not in it, a list of short texts).

    The Example has the tokens of both sides, one after the other, of any length. templates:
    {"prompt", "chosen", "rejected": the user's, or ""}. chat: texts are messages. Raises
    ValueError, or KeyError, if the record makes none."""
    given = {}
    for name, text in templates.items():
        found = fill(text, record) if text else record.get(name)
        if found not in (None, "", []):
            given[name] = found
    for name in SIDES:
        if name not in given:
            raise ValueError(f"it has no {name} answer")
    if given["chosen"] == given["rejected"]:
        raise ValueError("chosen and rejected are the same")

    used = {name for name, text in templates.items() if not text}
    for text in templates.values():
        used |= fields_in(text)
    rest = {name: value for name, value in without_nothing(record).items() if name not in used}
    if chat or not all(isinstance(value, str) for value in given.values()):
        check_template(enc, "texts")
        fields = template_fields(enc, rest)
        records = [rest | {"messages": talk} for talk in with_prompt(given)]
        talks = [messages_of(record, fields) for record in records]
        sides = [of_pieces(enc, pieces, is_chat=True) for pieces in answers(enc, *talks, fields)]
        not_used = unused(enc, records[0])
    else:
        sides = [of_pieces(enc, pieces, is_chat=False) for pieces in texts(given)]
        not_used = [f"the field {name!r}" for name in rest]
    return joined(*sides), not_used


def texts(given):
    """The pieces [(text, whether it counts)] of the two sides, where they are texts.

    given: {"prompt", "chosen", "rejected": text}. Without a prompt it is what both sides begin
    with, to the end of a word."""
    prompt = given.get("prompt")
    sides = [given[name] for name in SIDES]
    if prompt is None:
        both = os.path.commonprefix(sides)
        prompt = both[: max(both.rfind(" "), both.rfind("\n") + 1)] if both.strip() else ""
        sides = [side[len(prompt) :] for side in sides]
    for name, side in zip(SIDES, sides):
        if not side.strip():
            raise ValueError(f"it has no {name} answer")
    return [[(prompt, False), (side, True)] for side in sides]


def with_prompt(given):
    """The conversations of the two sides, lists of messages; given: as in texts()."""
    prompt = messages("user", given.get("prompt", []))
    talks = []
    for name in SIDES:
        side = messages("assistant", given[name])
        # some data sets have the prompt on both sides, too, and some as a text beside them
        whole = side[: len(prompt)] == prompt or side[0].get("role") in ("system", "user")
        talks.append(side if whole else prompt + side)
    return talks


def messages(role, given):
    """Messages that are a text of that role, one message, or a list of them."""
    if isinstance(given, str):
        given = {"role": role, "content": given}
    if isinstance(given, dict):
        given = [given]
    return messages_of({"messages": given})


def answers(enc, chosen, rejected, fields):
    """The pieces of two conversations, of which counts what the assistant says where they differ.

    fields: what else the chat template gets."""
    shared = 0  # messages that both begin with
    for ours, others in zip(chosen, rejected):
        if ours != others:
            break
        shared += 1
    sides = []
    for name, talk in zip(SIDES, (chosen, rejected)):
        after = [message.get("role") for message in talk[shared:]].count("assistant")
        if not after:
            raise ValueError(f"it has no {name} answer")
        found = conversations(enc, talk, fields)
        if len(found) > 1 and after > 1:
            raise ValueError("its sides have several answers, and the chat template writes an "
                             "earlier one otherwise once others follow")
        pieces = found[-1]
        # the last ones count; those before are context
        context = sum(counts for _, counts in pieces) - after
        said = 0
        for i, (text, counts) in enumerate(pieces):
            said += counts
            pieces[i] = text, counts and said > context
        sides.append(pieces)
    return sides


def joined(chosen, rejected):
    """The Example of two: one after the other, the second one marked."""
    marked = rejected.flags.copy()
    marked[0] |= REJECTED
    return Example(np.concatenate([chosen.tokens, rejected.tokens]),
                   np.concatenate([chosen.flags, marked]))


# -----------------------------------------------------------------------------
# rows


def shorten(found, size, counts):
    """Yield the pairs, of at most `size` tokens each.

    counts: its "too_long" are those that are left out, as a side has no target left, or both are
    the same now."""
    for e in found:
        middle = int((e.flags & REJECTED > 0).argmax())  # where the rejected side begins
        lengths = middle, len(e.tokens) - middle
        sides = []
        for start, length, other in ((0, *lengths), (middle, *reversed(lengths))):
            room = max(size // 2, size - other)  # half of the row, or what the other side leaves
            at = slice(start, start + min(length, room))
            sides.append(Example(e.tokens[at], e.flags[at]))
        alike = np.array_equal(sides[0].tokens, sides[1].tokens)
        if alike or not all((side.flags & IN_LOSS).any() for side in sides):
            counts["too_long"] += 1
        elif sum(lengths) > size:
            yield joined(*sides)._replace(cut=True)
        else:
            yield e


if __name__ == "__main__":
    main(s)
