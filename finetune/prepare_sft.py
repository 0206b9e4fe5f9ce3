r"""
Turns examples into shards of rows that train.py fine-tunes on, with a loss on the answers alone.

    python -m finetune.prepare_sft --input=gsm8k.jsonl --out_dir=data/gsm8k --encoding=smollm2 \
        --prompt='Question: {question}\nAnswer:' --completion=' {answer}'
    python -m finetune.prepare_sft --input=sst2/train.tsv --out_dir=data/sst2 --encoding=smollm2 \
        --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:' --completion=' {label}'
    # {"messages": [...]} a line
    python -m finetune.prepare_sft --input='chats/*.jsonl' --out_dir=data/chats --encoding=smollm2

A prompt and its completion become one example, with an end-of-text token after it. A record with
"messages", [{"role", "content"}], goes through the checkpoint's chat template, and all that the
assistant says counts in the loss.

What else a record has ("tools") goes to the template if it asks for it by name. What of a record is
in no example is said, and so is what makes none, with its reason.

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
input = ""  # a glob of .json(l), .tsv, .csv, also .gz, .zst; several files make one data set
out_dir = "data/sft"  # NAME_train_00000.bin and NAME_val_00000.bin go here
encoding = "gpt2"  # of the model to tune: its checkpoint's folder, or a name like gpt2 or bytes
block_size: at_least(1) = 512  # train.py's: longer examples lose the end of their completion

# examples
columns = ""  # the fields of a .tsv or .csv, comma separated; '': its first line names them
prompt = ""  # a template over a record's fields, \n for a newline; '': {prompt}
completion = ""  # '': {completion}
labels = ""  # comma separated: the words for {label} 0, 1, ...

# rows
val_fraction: between(0, 1) = 0.05  # of the examples, for validation; 1: all of them, 0: none
packing = True  # several examples a row, where they fit; False: one a row, padded
seed: at_least(0) = 1337  # of the split and of the rows' order

if __name__ == "__main__":  # a tokenizer's libraries take a while: what is mistyped is said before
    s = configure(sys.modules[__name__])

import collections
import contextlib
import hashlib
import itertools
import os
import re
import string

import numpy as np

from finetune.conversations import conversation, template_fields, unused, without_nothing
from finetune.tokenizer import Tokenizer
from prepare_c4 import PIECE, last_cut
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep, sync
from run.manifest import (Manifest, alone_in, contents, difference, facts, other_tokenizer,
                          same_contents, same_paths, source)
from run.records import Skipped, matching, records, stem_of, table_or_json
from run.shards import IN_LOSS, STARTS, part_of, shard_parts
from run.show import Progress
from run.text import first_line

Example = collections.namedtuple("Example", "tokens flags")  # uint32 and uint8, (length,) each
MAKER = "finetune.prepare_sft"
SETTINGS = "block_size columns prompt completion labels val_fraction packing seed".split()


def main(s):
    try:
        prepare_sft(s)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")


def prepare_sft(s):
    """Make the two shards that the settings describe (see above)."""
    prompt, completion, words, chat = templates(s)

    def make(enc, record):
        made = example(enc, record, prompt, completion, words, chat)
        return made, not_in_example(enc, record, prompt, completion, chat)

    prepare(s, MAKER, SETTINGS, make, shorten)


def prepare(s, maker, shown, make, shorten, unit="example"):
    """Make shards of what the records in s.input make.

    maker: the script. shown: the names of the settings that change what is in the shards. make(enc,
    record), shorten(examples, size): see read_examples() and shorten(). unit: what one is called."""
    # what can be wrong before anything is read
    if not s.out_dir:
        raise SystemExit("error: out_dir is empty: name the folder for the shards")
    paths = matching(s.input)
    for path in paths:
        table_or_json(path)
    out_dir = os.path.expanduser(s.out_dir)
    enc = get_encoding(os.path.expanduser(s.encoding))
    made = facts_of(s, paths, enc, maker, shown)
    check_folder(out_dir, names_of(s, paths), made)

    # examples, each as long as a row at most
    found = read_examples(paths, enc, s.columns, make)
    examples, truncated, dropped = shorten(found, s.block_size + 1)
    if not examples:
        raise SystemExit(
            f"error: {s.input}: no usable {unit} ({dropped} longer than block_size {s.block_size})"
        )
    splits, repeats = split(examples, s.val_fraction, s.seed)
    if 0 < s.val_fraction < 1 and not (splits["val"] and splits["train"]):
        raise SystemExit(
            f"error: {s.input}: {len(examples)} {unit}s, of them {len(examples) - repeats} "
            "different, are too few to split; set --val_fraction=0"
        )

    # all is in memory before anything is written: what is refused leaves no file behind
    shards = {}  # {name: its parts}
    summary = collections.Counter()
    for name in names_of(s, paths):
        part = [examples[i] for i in splits[part_of(name)]]
        tokens, flags = fill_rows(part, s.block_size, s.packing, enc.eot_token)  # (rows, size) each
        if tokens.size >= 2**31:
            raise SystemExit(f"error: {s.input}: more than 2**31 - 1 tokens in rows: split it")
        shards[name] = shard_parts(
            tokens.ravel(), enc.n_vocab, flags.ravel(), s.block_size + 1, fingerprint(enc)
        )
        loss = int((flags & IN_LOSS).sum())
        summary.update(rows=len(tokens), room=tokens.size, loss=loss)
    write_shards(shards, out_dir, made)

    # what was made
    count = sum(len(e.tokens) for e in examples)
    full = count / summary["room"]
    print(
        f"{out_dir}: {len(examples):,} {unit}s ({len(splits['val']):,} for validation), "
        f"{count:,} tokens, {summary['loss']:,} in the loss, "
        f"{summary['rows']:,} rows of {s.block_size + 1}, {full:.1%} full; "
        f"{truncated:,} truncated, {dropped:,} dropped: too long"
    )
    if repeats:
        print(f"{repeats:,} {unit}s repeat another: all of a kind are on one side of the split")


def split(examples, val_fraction, seed):
    """({"train": numbers, "val": numbers}, how many repeat another), in a random order.

    By examples, not rows: packing changes nothing. Those that are the same are on one side."""
    same = collections.defaultdict(list)  # {hash of an example: its numbers}
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    for i in order:
        e = examples[i]
        same[hashlib.blake2b(e.tokens.tobytes() + e.flags.tobytes()).digest()].append(i)
    held_out = round(len(examples) * val_fraction)
    in_val = set()
    for numbers in same.values():  # in the order of the first of each
        if len(in_val) + len(numbers) <= held_out:
            in_val.update(numbers)
    splits = {
        "val": [i for i in order if i in in_val],
        "train": [i for i in order if i not in in_val],
    }
    return splits, len(examples) - len(same)


# -----------------------------------------------------------------------------
# the folder


def names_of(s, paths):
    """The names of the shards to make: without the part that gets no example."""
    whole = os.path.abspath(os.path.expanduser(s.out_dir))
    stem = stem_of(paths[0] if len(paths) == 1 else whole)
    names = []
    if s.val_fraction > 0:
        names.append(f"{stem}_val_00000.bin")
    if s.val_fraction < 1:
        names.append(f"{stem}_train_00000.bin")
    return names


def facts_of(s, paths, enc, maker, shown):
    """What shards.json says of them (see run/manifest.py); maker, shown: as in prepare()."""
    settings = {"maker": maker}
    settings |= {name: getattr(s, name) for name in shown}
    try:
        sources = [source(path) for path in paths]
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


def write_shards(shards, out_dir, made):
    """Write {name: parts}; all take their names only when all are on the disk."""
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
            manifest.begin(dict.fromkeys(shards, made))
            stack.close()
            manifest.finish(shards)
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")


# -----------------------------------------------------------------------------
# templates


def template(name, text):
    """A str.format template of a flag, where \\n may stand for a newline.

    Exits with one line if it is malformed."""
    text = text.replace("\\n", "\n")
    try:
        parts = string.Formatter().parse(text)
        fields = [field for _, field, _, _ in parts if field is not None]
        if not all(re.match(r"[^\W\d]", field) for field in fields):
            why = "a field needs a name"
        elif any("." in re.sub(r"\[[^]]*\]", "", field) for field in fields):
            why = "a part of a field is named in brackets, as {answers[text]}"  # not Python's own
        else:
            return text
    except ValueError as e:
        why = first_line(e)
    raise SystemExit(f"error: {name}={text!r}: {why}; write {{field}}, and {{{{ for a brace")


class Filled(string.Formatter):
    """str.format for records: a list or an object is no text, but its parts may be."""

    def format_field(self, value, spec):
        if isinstance(value, (list, dict)):
            raise ValueError("a field is a list or an object: name its part, as {answers[0]}")
        if re.search(r"\d{5}", spec):
            raise ValueError(f"{spec} makes a text of more than 9,999 characters")
        return super().format_field(value, spec)


def fill(text, record):
    """`text` with the record's fields in their places. Raises ValueError if it lacks one."""
    given = {key: value for key, value in record.items() if value is not None}
    try:
        return Filled().vformat(text, (), given)
    except (LookupError, AttributeError, TypeError) as e:
        missing = e.args[0] if isinstance(e, KeyError) else first_line(e)
        raise ValueError(f"no field {missing!r}")


def fields_in(text):
    """The record's fields that a template names."""
    fields = (field for _, field, _, _ in string.Formatter().parse(text) if field is not None)
    return {re.match(r"[^.\[]*", field)[0] for field in fields}


def templates(s):
    """(prompt, completion, words of labels, whether "messages" are conversations) of settings."""
    words = [word.strip() for word in s.labels.split(",")] if s.labels else []
    prompt = template("prompt", s.prompt or "{prompt}")
    completion = template("completion", s.completion or "{completion}")
    chat = not s.prompt and not s.completion  # templates of the user's take "messages" as a field
    return prompt, completion, words, chat


def prompt_and_completion(record, prompt, completion, words):
    """[(text, whether it counts)] of one record. Raises ValueError if it makes none.

    prompt, completion: templates. words: for the field "label" 0, 1, ..., or empty."""
    if words and "label" in record:
        label = str(record["label"])
        if not label.isascii() or not label.isdigit() or int(label) >= len(words):
            raise ValueError(f"label {label!r} is none of 0 to {len(words) - 1}")
        record = record | {"label": words[int(label)]}
    question = fill(prompt, record)
    answer = fill(completion, record)
    if not answer.strip():
        raise ValueError("its completion is empty")
    return [(question, False), (answer, True)]


# -----------------------------------------------------------------------------
# examples


def encode(encode_text, pieces):
    """(ids, flags) of a text in pieces [(text, whether it counts)].

    The tokens are the whole text's, where each piece ends with one: alone, a piece would have its
    start marked as a word's by sentencepiece. Else they are those of the pieces, as the model will
    see a prompt by itself ("Answer: " + "4")."""
    texts, counts = zip(*pieces)
    prefixes = [in_slices(encode_text, text) for text in itertools.accumulate(texts)]
    ids = prefixes[-1]  # the whole text's
    ends = [len(prefix) for prefix in prefixes]  # of each piece in ids
    # a token that spans two pieces: each piece by itself
    if any(prefix != ids[: len(prefix)] for prefix in prefixes):
        parts = [in_slices(encode_text, text) for text in texts]
        ids = list(itertools.chain(*parts))
        ends = list(itertools.accumulate(map(len, parts)))
    flags = np.where(counts, IN_LOSS, 0)
    return ids, np.repeat(flags, np.diff(ends, prepend=0)).tolist()


def not_in_example(enc, record, prompt, completion, chat):
    """What of a record that made an example is not in it, a list of short texts."""
    if chat and "messages" in record:
        return unused(enc, record)
    used = fields_in(prompt) | fields_in(completion)
    return [f"the field {name!r}" for name in without_nothing(record) if name not in used]


def in_slices(encode_text, text):
    """The ids of a text; tiktoken gives up on a million spaces, so that a very long one is cut."""
    ids = []
    start = 0
    while len(text) - start > PIECE:
        end = last_cut(text, start, start + PIECE)
        if end == start:
            end = start + PIECE
        ids += encode_text(text[start:end])
        start = end
    return ids + encode_text(text[start:])


def example(enc, record, prompt="{prompt}", completion="{completion}", words=(), chat=True):
    """The Example that a record makes, of any length.

    chat: a record with "messages" is a conversation. The rest: as in prompt_and_completion. Raises
    ValueError, or KeyError, if it makes none."""
    if chat and "messages" in record:
        check_template(enc, "--prompt and --completion")
        pieces = conversation(enc, record["messages"], template_fields(enc, record))
        return of_pieces(enc, pieces, is_chat=True)
    return of_pieces(enc, prompt_and_completion(record, prompt, completion, words), is_chat=False)


def check_template(enc, otherwise):
    """Exit with one line if an encoding has no chat template. otherwise: flags that need none."""
    if not isinstance(enc, Tokenizer) or enc.chat_template is None:
        raise SystemExit(
            "the encoding has no chat template; messages need an instruct model's checkpoint, "
            f"or {otherwise}"
        )


def of_pieces(enc, pieces, is_chat):
    """The Example of a text in pieces [(text, whether it counts)]. is_chat: a template wrote it,
    with its special tokens; else an end-of-text token follows."""
    if is_chat:
        ids, flags = encode(enc.encode_with_special, pieces)
    else:
        ids, flags = encode(enc.encode_ordinary, pieces)
        ids = [*ids, enc.eot_token]
        flags = [*flags, IN_LOSS]
    # bos is context, too, and no target
    if isinstance(enc, Tokenizer):
        with_bos = enc.with_bos(ids)
        flags = [0] * (len(with_bos) - len(ids)) + flags
        ids = with_bos
    flags[0] = STARTS  # and no target: nothing comes before it
    return Example(np.array(ids, np.uint32), np.array(flags, np.uint8))


def read_examples(paths, enc, columns, make):
    """Yield the examples in all files. make(enc, record): (the Example, what of it is not in that);
    raises ValueError, or KeyError, if it makes none.

    Says of each file what was left out, and what of its records is in no example."""
    for path in paths:
        total = 0
        skipped = Skipped()
        not_used = Skipped()
        found = records(path, columns)
        progress = Progress(os.path.basename(path), unit="records")
        for where, record in progress.over(found):
            total += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                made, rest = make(enc, record)
                for what in rest:
                    not_used.add(what, where)
            except KeyError:  # the file's structure is another: all of its records will be so
                raise SystemExit(
                    f'error: {path}, {where}: a message has no role; each is {{"role", "content"}}'
                )
            except SystemExit as e:  # nor can others be read: say which was met first
                raise SystemExit(f"error: {path}, {where}: {str(e.code).removeprefix('error: ')}")
            except ValueError as e:
                skipped.add(first_line(e), where)
            else:
                yield made
        skipped.say(path, total)
        for what, (count, where) in not_used.items():
            print(f"{path}: not used: {what} ({count:,} of {total:,} records; the first: {where})")


def shorten(examples, size):
    """(examples of at most `size` tokens, how many lost an end, how many were dropped).

    Dropped is what has no target left."""
    kept = []
    truncated = 0
    dropped = 0
    for e in examples:
        short = Example(e.tokens[:size].copy(), e.flags[:size].copy())  # not a view of a long one
        if (short.flags & IN_LOSS).any():
            kept.append(short)
            truncated += len(e.tokens) > size
        else:
            dropped += 1
    return kept, truncated, dropped


# -----------------------------------------------------------------------------
# rows


def pack(lengths, size):
    """Rows of `size`, as lists of indices, of pieces of these lengths.

    Each goes into the fullest row that has room for it, or into a new one."""
    rows = []
    by_room = collections.defaultdict(list)  # {room left: rows}
    rooms = 0  # bit r is set if some row has room r
    for i, length in enumerate(lengths):
        fitting = rooms >> length  # bit r: a row has room for it, and r to spare
        if fitting:
            spare = (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
            room = length + spare
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room  # it was the last with this room
        else:
            room = size
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def fill_rows(examples, block_size, packing, eot):
    """(tokens, flags), each (rows, block_size + 1), of examples that fit one row each.

    What is left of a row is padded with `eot`, which counts for nothing."""
    size = block_size + 1
    if packing:
        rows = pack([len(e.tokens) for e in examples], size)
    else:
        rows = [[i] for i in range(len(examples))]
    tokens = np.full((len(rows), size), eot, np.uint32)  # uint16 holds no vocabulary above 65,535
    flags = np.zeros((len(rows), size), np.uint8)
    for row, numbers in enumerate(rows):
        at = 0
        for i in numbers:
            end = at + len(examples[i].tokens)
            tokens[row, at:end] = examples[i].tokens
            flags[row, at:end] = examples[i].flags
            at = end
    return tokens, flags


if __name__ == "__main__":
    main(s)
