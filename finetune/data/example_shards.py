"""
Examples out of a user's inputs, made into a folder's two shards of rows: what prepare_sft.py does
with each record's examples, whatever these are.

It says what it read and made, and writes last, all or nothing.
"""

import collections
import contextlib
import os

from finetune.data.examples import read_examples, take
from finetune.data.inputs import files_of, inputs_of, sources_of, stem
from finetune.data.preview import show
from finetune.data.rows import fill_rows, split
from run import counts
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep, sync
from run.manifest import (Manifest, alone_in, contents, difference, facts, other_tokenizer,
                          same_contents, same_paths)
from run.shards import IN_LOSS, part_of, shard_parts

SHOWN = 3  # examples


def prepare(s, maker, shown, check, make, shorten, unit="example"):
    """Make shards of what the records in s.input make.

    maker: the script. shown: the names of the settings that change what is in the shards.
    check(file): exits with one line if a File cannot be used. make(enc, record), shorten(examples,
    size, counts): see finetune/data/examples.py. unit: what one is called."""
    # what can be wrong before anything is read
    if not s.out_dir:
        raise SystemExit("error: out_dir is empty: name the folder for the shards")
    out_dir = os.path.expanduser(s.out_dir)
    inputs = inputs_of(s.input)
    for file in files_of(inputs):
        check(file)
    enc = get_encoding(os.path.expanduser(s.encoding))
    made = facts_of(s, inputs, enc, maker, shown)
    names = names_of(s, inputs)
    check_folder(out_dir, names, made)

    # examples, each as long as a row at most
    examples, of_input = read_all(inputs, enc, s, make, shorten)
    if not examples:
        raise SystemExit(
            f"error: {s.input}: no usable {unit} ({of_input['too_long']} longer than block_size "
            f"{s.block_size})"
        )
    splits, repeats = split(examples, s.val_fraction, s.seed)
    if 0 < s.val_fraction < 1 and not (splits["val"] and splits["train"]):
        raise SystemExit(
            f"error: {s.input}: {len(examples)} {unit}s, of them {len(examples) - repeats} "
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
        counted[part_of(name)] = counts_of(part, tokens, of_input, unit)
    say_counts(out_dir, counted, repeats, s)
    if s.dry_run:
        return
    entries = {name: made | {"counts": counted[part_of(name)]} for name in names}
    write_shards(shards, out_dir, made, entries)
    print(f"{out_dir}: wrote {' and '.join(names)}")


def read_all(inputs, enc, s, make, shorten):
    """(the examples of all inputs by their weights, what was left out of them, {name: count}).

    Shows the first ones as soon as they are read."""
    examples = []
    of_input = collections.Counter(records=0, unread=0, too_long=0)
    most = max(1, -(-SHOWN // len(inputs)))  # of each
    shown = 0
    for number, given in enumerate(inputs):
        found = []
        for file in given.files:
            made = read_examples(file, enc, s.columns, make, of_input)
            for example in shorten(made, s.block_size + 1, of_input):
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


def counts_of(part, tokens, of_input, unit):
    """The counts of one part's examples (run/counts.py). tokens: their rows, (rows, size)."""
    return {
        "unit": unit,
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
        print(f"{repeats:,} repeat another: all of a kind are on one side of the split")


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


def facts_of(s, inputs, enc, maker, shown):
    """What shards.json says of them (see run/manifest.py); maker, shown: as in prepare()."""
    settings = {"maker": maker}
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
