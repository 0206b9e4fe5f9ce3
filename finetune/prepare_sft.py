r"""
Turns examples into shards of rows that train.py fine-tunes on, with a loss on the answers alone.

    python -m finetune.prepare_sft --input=gsm8k.jsonl --out_dir=data/gsm8k --encoding=smollm2 \
        --prompt='Question: {question}\nAnswer:' --completion=' {answer}'
    python -m finetune.prepare_sft --input=sst2/train.tsv --out_dir=data/sst2 --encoding=smollm2 \
        --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:' --completion=' {label}'
    # chats, {"messages": [...]} a record: twice those of a file, half of a data set on the hub
    python -m finetune.prepare_sft --input='my.jsonl*2,hf:HuggingFaceTB/smol-smoltalk*0.5' \
        --out_dir=data/chats --encoding=smollm2

What --input may name is in finetune/inputs.py. A prompt and its completion become one example, with
an end-of-text token after it. A record with "messages", [{"role", "content"}], or ShareGPT's
"conversations", goes through the checkpoint's chat template, and all that the assistant says counts
in the loss.

What else a record has ("tools") goes to the template if it asks for it by name. What of a record is
in no example is said, and so is what makes none, with its reason. The first three examples are
shown, with what counts marked, and all are counted before anything is written.

Rows have block_size + 1 tokens and hold whole examples. A shard is prepare_c4.py's with the row
length in its header and, after the tokens, a byte of flags for each (run/shards.py has the
format). Bit 0: it counts in the loss. Bit 1: an example starts here.

A folder holds one data set. What an earlier command made of the same files is replaced; shards of
anything else are left alone, and nothing is added to them. But a training set (--val_fraction=0)
and a validation set (--val_fraction=1) of two files may share a folder.
"""

import sys

from configurator import at_least, between, configure

# input and output
input = ""  # .json(l), .tsv, .csv, also with .gz, .zst; .parquet; hf:owner/name; commas between
out_dir = "data/sft"  # NAME_train_00000.bin and NAME_val_00000.bin go here
encoding = "gpt2"  # of the model to tune: its checkpoint's folder, or a name like gpt2 or bytes
block_size: at_least(1) = 512  # train.py's: longer examples lose the end of their completion
dry_run = False  # show three examples and the numbers, and leave: nothing is written

# examples
columns = ""  # the fields of a .tsv or .csv, comma separated; '': its first line names them
prompt = ""  # a template over a record's fields, \n for a newline; '': {prompt}
completion = ""  # '': {completion}
labels = ""  # comma separated: the words for {label} 0, 1, ...

# rows
val_fraction: between(0, 1) = 0.05  # of the examples, for validation; 1: all of them, 0: none
packing = True  # several examples a row, where they fit; False: one a row, padded
seed: at_least(0) = 1337  # of the split, of the rows' order, and of what weights draw

if __name__ == "__main__":  # a tokenizer's libraries take a while: what is mistyped is said before
    s = configure(sys.modules[__name__])

import collections
import contextlib
import os

from finetune.examples import check_columns, read_examples, shorten, take
from finetune.inputs import files_of, inputs_of, sources_of, stem
from finetune.preview import show
from finetune.rows import fill_rows, split
from finetune.templates import templates
from run import counts
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep, sync
from run.manifest import (Manifest, alone_in, contents, difference, facts, other_tokenizer,
                          same_contents, same_paths)
from run.shards import IN_LOSS, part_of, shard_parts

MAKER = "finetune.prepare_sft"
SHOWN = 3  # examples


def main(s):
    try:
        prepare_sft(s)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")


def prepare_sft(s):
    """Make the two shards that the settings describe (see above)."""
    # what can be wrong before anything is read
    if not s.out_dir:
        raise SystemExit("error: out_dir is empty: name the folder for the shards")
    templates(s)
    out_dir = os.path.expanduser(s.out_dir)
    inputs = inputs_of(s.input)
    for file in files_of(inputs):
        check_columns(file, s)
    enc = get_encoding(os.path.expanduser(s.encoding))
    made = facts_of(s, inputs, enc)
    names = names_of(s, inputs)
    check_folder(out_dir, names, made)

    # examples, each as long as a row at most
    examples, of_input = read_all(inputs, enc, s)
    if not examples:
        raise SystemExit(
            f"error: {s.input}: no usable example ({of_input['too_long']} longer than block_size "
            f"{s.block_size})"
        )
    splits, repeats = split(examples, s.val_fraction, s.seed)
    if 0 < s.val_fraction < 1 and not (splits["val"] and splits["train"]):
        raise SystemExit(
            f"error: {s.input}: {len(examples)} examples, of them {len(examples) - repeats} "
            "different, are too few to split; set --val_fraction=0"
        )

    # all is in memory before anything is written: what is refused leaves no file behind
    shards = {}  # {name: its parts}
    counted = {}  # {part: its counts, see run/counts.py}
    for name in names:
        part = [examples[i] for i in splits[part_of(name)]]
        tokens, flags = fill_rows(part, s.block_size, s.packing, enc.eot_token)  # (rows, size) each
        if tokens.size >= 2**31:
            raise SystemExit(f"error: {s.input}: more than 2**31 - 1 tokens in rows: split it")
        shards[name] = shard_parts(
            tokens.ravel(), enc.n_vocab, flags.ravel(), s.block_size + 1, fingerprint(enc)
        )
        counted[part_of(name)] = counts_of(part, tokens, of_input)
    say_counts(out_dir, counted, repeats, s)
    if s.dry_run:
        return
    entries = {name: made | {"counts": counted[part_of(name)]} for name in names}
    write_shards(shards, out_dir, made, entries)
    print(f"{out_dir}: wrote {' and '.join(names)}")


def read_all(inputs, enc, s):
    """(the examples of all inputs by their weights, what was left out of them, {name: count}).

    Shows the first ones as soon as they are read."""
    examples = []
    of_input = collections.Counter(records=0, unread=0, too_long=0)
    most = max(1, -(-SHOWN // len(inputs)))  # of each
    shown = 0
    for number, given in enumerate(inputs):
        found = []
        for file in given.files:
            for example in shorten(read_examples(file, enc, s, of_input), s.block_size + 1, of_input):
                found.append(example)
                if len(found) <= most:
                    shown += 1
                    show(enc, example, shown)
        taken = take(found, given.weight, [s.seed, number])
        examples += taken
        if len(inputs) > 1 or given.weight != 1:
            print(f"{given.name}: {len(taken):,} examples taken of its {len(found):,}, "
                  f"by weight {given.weight:g}")
    return examples, dict(of_input)


def counts_of(part, tokens, of_input):
    """The counts of one part's examples (run/counts.py). tokens: their rows, (rows, size)."""
    return {
        "examples": len(part),
        "tokens": sum(len(e.tokens) for e in part),
        "in_loss": sum(int((e.flags & IN_LOSS).sum()) for e in part),
        "cut": sum(e.cut for e in part),
        "rows": len(tokens),
        "of_input": of_input,
    }


def say_counts(out_dir, counted, repeats, s):
    """Say how many examples there are, of how many tokens, and what is not in them."""
    for line in counts.lines(out_dir, counted):
        print(line)
    rows = sum(c["rows"] for c in counted.values())
    full = sum(c["tokens"] for c in counted.values()) / (rows * (s.block_size + 1))
    print(f"{out_dir}: {rows:,} rows of {s.block_size + 1} tokens, {full:.1%} full")
    if repeats:
        print(f"{repeats:,} examples repeat another: all of a kind are on one side of the split")


# -----------------------------------------------------------------------------
# the folder


def names_of(s, inputs):
    """The names of the shards to make: without the part that gets no example."""
    name = stem(inputs, os.path.abspath(os.path.expanduser(s.out_dir)))
    names = []
    if s.val_fraction > 0:
        names.append(f"{name}_val_00000.bin")
    if s.val_fraction < 1:
        names.append(f"{name}_train_00000.bin")
    return names


def facts_of(s, inputs, enc):
    """What shards.json says of them (see run/manifest.py)."""
    settings = {"maker": MAKER}
    shown = "block_size columns prompt completion labels val_fraction packing seed".split()
    settings |= {name: getattr(s, name) for name in shown}
    if any(given.weight != 1 for given in inputs):  # of each file
        settings["weights"] = [given.weight for given in inputs for _ in given.files]
    commits = {given.name: given.commit for given in inputs if given.commit}
    if commits:
        settings["commits"] = commits
    try:
        sources = sources_of(inputs)
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
    return facts(sources, s.encoding, enc, **settings)


def check_folder(out_dir, names, made):
    """Exit with one line if shards in the folder would mix with those to make.

    names: of these. made: their facts. What an earlier run made of the same files is replaced; and
    there may be the other part, train or val, of other files."""
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise SystemExit(f"error: out_dir={out_dir}: File exists, and is no folder")
    manifest = Manifest.read(out_dir)
    parts = {part_of(name) for name in names}
    for name in manifest.strangers([]):
        path = os.path.join(out_dir, name)
        entry = manifest.entry(name)
        if entry is None:
            why = "was made of something that shards.json does not tell"
        elif same_paths(entry, made) or same_contents(entry, made):
            if name in names:
                continue
            why = "was made of the same input, with another split"
        elif name in names or part_of(name) in parts:
            why = f"was made of {manifest.source_of(name)}, not of this input"
        elif shares_a_text(entry, made):
            why = f"was made of {manifest.source_of(name)}, which this input has, too"
        else:
            why = other_kind(entry, made)
        if why:
            raise SystemExit(f"error: {path}: {why}; delete it or set another --out_dir")


def shares_a_text(entry, made):
    return not set(contents(entry["sources"])).isdisjoint(contents(made["sources"]))


def other_kind(entry, made):
    """What keeps the shard of an entry from being read beside those to make, or ""."""
    for name in ("maker", "block_size"):
        before = entry["settings"].get(name)
        now = made["settings"][name]
        if before != now:
            return f"was made with {name}={before}, not {now}"
    other = other_tokenizer(entry, made)
    return other and f"was made with {other}"


def write_shards(shards, out_dir, made, entries):
    """Write {name: parts}; all take their names only when all are on the disk.

    made: the facts of all. entries: {name: what shards.json is to say}."""
    try:
        with alone_in(out_dir), contextlib.ExitStack() as stack:
            sweep(out_dir)
            check_folder(out_dir, shards, made)  # now that nobody else writes there
            manifest = Manifest.read(out_dir)
            for name in shards:
                entry = manifest.entry(name)
                changed = entry and difference(entry, made)
                if changed:
                    print(f"note: {os.path.join(out_dir, name)} is replaced: it had {changed}")
            for name, parts in shards.items():
                f = stack.enter_context(replacing(os.path.join(out_dir, name)))
                f.writelines(parts)
                sync(f)
            manifest.begin(entries)
            stack.close()
            manifest.finish(shards)
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")


if __name__ == "__main__":
    main(s)
