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

Rows have block_size + 1 tokens and hold whole examples. A shard is prepare_c4.py's with the row
length in its header and, after the tokens, a byte of flags for each (run/shards.py has the
format). Bit 0: it counts in the loss. Bit 1: an example starts here. Older shards are replaced.
"""

import collections
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import string
import sys
import zlib

import numpy as np
from tqdm import tqdm

from configurator import at_least, between, configure
from finetune.tokenizer import Tokenizer
from run.encodings import fingerprint, get_encoding
from run.files import replacing
from run.text import first_line
from run.shards import IN_LOSS, STARTS, shard_parts

# input and output
input = ""  # a glob of .json(l), .tsv, .csv, also .gz; several files make one data set
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

Example = collections.namedtuple("Example", "tokens flags")  # uint32 and uint8, (length,) each


def main():
    s = configure(sys.modules[__name__])
    try:
        prepare_sft(s)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")


def prepare_sft(s):
    """Make the two shards that the settings describe (see above)."""
    # examples, each as long as a row at most
    enc = get_encoding(s.encoding)
    paths = list(filter(os.path.isfile, sorted(glob.glob(s.input, recursive=True))))
    if not paths:
        raise SystemExit(f"error: input={s.input}: no such file")
    examples = read_examples(paths, enc, s)
    examples, truncated, dropped = shorten(examples, s.block_size + 1)
    if not examples:
        raise SystemExit(
            f"error: {s.input}: no usable example ({dropped} longer than block_size {s.block_size})"
        )

    # split by examples, not rows: packing changes nothing
    held_out = round(len(examples) * s.val_fraction)
    if 0 < s.val_fraction < 1 and not 0 < held_out < len(examples):
        raise SystemExit(
            f"error: {s.input}: {len(examples)} examples are too few to split; "
            "set --val_fraction=0"
        )
    order = np.random.default_rng(s.seed).permutation(len(examples))
    splits = {"val": order[:held_out], "train": order[held_out:]}

    # all is in memory before anything is written: what is refused leaves no file behind
    shards = {}  # {path: its parts}
    summary = collections.Counter()
    for split, numbers in splits.items():
        path = os.path.join(s.out_dir, f"{data_set_name(paths, s.out_dir)}_{split}_00000.bin")
        if not len(numbers):
            if os.path.exists(path):
                raise SystemExit(f"error: {path}: is of another split, and would stay; delete it")
            continue
        part = [examples[i] for i in numbers]
        tokens, flags = fill_rows(part, s.block_size, s.packing, enc.eot_token)  # (rows, size) each
        if tokens.size >= 2**31:
            raise SystemExit(f"error: {s.input}: more than 2**31 - 1 tokens in rows: split it")
        shards[path] = shard_parts(
            tokens.ravel(), enc.n_vocab, flags.ravel(), s.block_size + 1, fingerprint(enc)
        )
        loss = int((flags & IN_LOSS).sum())
        summary.update(rows=len(tokens), room=tokens.size, loss=loss)
    write_shards(shards, s.out_dir)

    # what was made
    count = sum(len(e.tokens) for e in examples)
    full = count / summary["room"]
    print(
        f"{s.out_dir}: {len(examples):,} examples ({held_out:,} for validation), "
        f"{count:,} tokens, {summary['loss']:,} in the loss, "
        f"{summary['rows']:,} rows of {s.block_size + 1}, {full:.1%} full; "
        f"{truncated:,} truncated, {dropped:,} dropped: too long"
    )


def data_set_name(paths, out_dir):
    """The first part of the shards' names: the one file's, or the output folder's."""
    source = paths[0] if len(paths) == 1 else os.path.abspath(out_dir)
    name = re.sub(r"\.(jsonl?|tsv|csv)(\.gz)?$", "", os.path.basename(source))
    return name.replace("_", "-")  # or x_val.tsv's training shard would match *_val_*.bin


def write_shards(shards, out_dir):
    """Write {path: parts}; all take their names only when all are written."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for path, parts in shards.items():
                stack.enter_context(replacing(path)).writelines(parts)
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")


# -----------------------------------------------------------------------------
# records


def records(path, columns=""):
    """Yield (where, record) for each record in a file: a dict, or a ValueError that says why not.

    columns: the fields of a .tsv or .csv, comma separated; "": its first line names them."""
    kind = re.fullmatch(r".+\.(jsonl?|tsv|csv)(\.gz)?", path)
    if not kind:
        raise SystemExit(
            f"error: {path}: expected .json, .jsonl, .tsv or .csv, or one of these with .gz"
        )
    ending, compressed = kind.groups()
    try:
        with gzip.open(path) if compressed else open(path, "rb") as f:
            if ending in ("tsv", "csv"):
                text = io.TextIOWrapper(f, "utf-8-sig", "replace", newline="")
                yield from _table(text, ending, columns)
            elif ending == "json" and f.peek(64)[:64].lstrip()[:1] == b"[":
                # one list of all records
                for i, record in enumerate(json.load(f)):
                    yield f"record {i + 1}", _object(record)
            else:
                # a record a line
                for i, line in enumerate(f):
                    if line.strip():
                        yield f"line {i + 1}", _object(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as e:
        raise SystemExit(f"error: {path}: incomplete or damaged ({first_line(e)}); get it again")
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}")


def _object(record):
    """A record of JSON, a line's bytes or a part of a list, or a ValueError."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            return ValueError("not JSON")
    if isinstance(record, dict):
        return record
    return ValueError("not a JSON object")


def _table(f, kind, columns):
    """The records of a .tsv or .csv."""
    csv.field_size_limit(sys.maxsize)
    if kind == "tsv":  # no quoting: in SST-2 a quotation mark is a word
        rows = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(f, strict=True)
    if columns:
        names = [name.strip() for name in columns.split(",")]
    else:
        names = next(rows, [])
    try:
        for row in filter(None, rows):
            record = dict(zip(names, row))
            if len(row) != len(names):
                why = f"{len(row)} fields instead of {len(names)}, {','.join(names)}"
                record = ValueError(why)
            yield f"line {rows.line_num}", record
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num}: {e}")


# -----------------------------------------------------------------------------
# templates


def template(name, text):
    """A str.format template of a flag, where \\n may stand for a newline.

    Exits with one line if it is malformed."""
    text = text.replace("\\n", "\n")
    try:
        parts = string.Formatter().parse(text)
        fields = [field for _, field, _, _ in parts if field is not None]
        if all(re.match(r"[^\W\d]", field) for field in fields):
            return text
        why = "a field needs a name"
    except ValueError as e:
        why = first_line(e)
    raise SystemExit(f"error: {name}={text!r}: {why}; write {{field}}, and {{{{ for a brace")


def fill(text, record):
    """`text` with the record's fields in their places. Raises ValueError if it lacks one."""
    given = {key: value for key, value in record.items() if value is not None}
    try:
        return text.format_map(given)
    except (LookupError, AttributeError, TypeError) as e:
        missing = e.args[0] if isinstance(e, KeyError) else first_line(e)
        raise ValueError(f"no field {missing!r}")


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


def conversation(enc, messages):
    """[(text, whether it counts)] of one conversation.

    What counts is all that the assistant says, with the token that ends it. Raises ValueError if
    the messages are none, and KeyError if one has no role."""
    answers = _answers(messages)
    whole = enc.render(messages)
    pieces = []
    at = 0  # where the next piece starts in `whole`
    for i in answers:
        # an answer lies between what is written up to its start and what is written through it
        before = enc.render(messages[:i], add_generation_prompt=True)
        through = enc.render(messages[: i + 1])
        one_by_one = through.startswith(before) and whole.startswith(through)
        if not one_by_one or len(before) < at:
            raise SystemExit(
                f"message {i + 1}: the chat template of {enc.name} does not write a conversation "
                "message by message, so that what the assistant says cannot be found in it"
            )
        end = len(through)
        # many templates write a newline after the end token, which nobody needs to learn
        stripped = through.rstrip()
        if stripped.endswith(tuple(enc.special)):
            end = len(stripped)
        pieces.append((whole[at : len(before)], False))
        pieces.append((whole[len(before) : end], True))
        at = end
    pieces.append((whole[at:], False))
    return pieces


def _answers(messages):
    """The places of the assistant's messages. Raises ValueError or KeyError as conversation()."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('its messages are no list of {"role", "content"}')
    places = []
    for i, message in enumerate(messages):
        if not isinstance(message["role"], str) or not isinstance(message.get("content"), str):
            raise ValueError("a message's role or content is not a text")
        if message["role"] == "assistant":
            if not message["content"].strip():
                raise ValueError("the assistant says nothing")
            places.append(i)
    if not places:
        raise ValueError("it has no message of the assistant")
    return places


# -----------------------------------------------------------------------------
# examples


def encode(encode_text, pieces):
    """(ids, flags) of a text in pieces [(text, whether it counts)].

    The tokens are the whole text's, where each piece ends with one: alone, a piece would have its
    start marked as a word's by sentencepiece. Else they are those of the pieces, as the model will
    see a prompt by itself ("Answer: " + "4")."""
    texts, counts = zip(*pieces)
    prefixes = [encode_text(text) for text in itertools.accumulate(texts)]
    ids = prefixes[-1]  # the whole text's
    ends = [len(prefix) for prefix in prefixes]  # of each piece in ids
    # a token that spans two pieces: each piece by itself
    if any(prefix != ids[: len(prefix)] for prefix in prefixes):
        parts = [encode_text(text) for text in texts]
        ids = list(itertools.chain(*parts))
        ends = list(itertools.accumulate(map(len, parts)))
    flags = np.where(counts, IN_LOSS, 0)
    return ids, np.repeat(flags, np.diff(ends, prepend=0)).tolist()


def example(enc, record, prompt="{prompt}", completion="{completion}", words=(), chat=True):
    """The Example that a record makes, of any length.

    chat: a record with "messages" is a conversation. The rest: as in prompt_and_completion. Raises
    ValueError, or KeyError, if it makes none."""
    if chat and "messages" in record:
        if not isinstance(enc, Tokenizer) or enc.chat_template is None:
            raise SystemExit(
                "the encoding has no chat template; messages need an instruct model's checkpoint, "
                "or --prompt and --completion"
            )
        pieces = conversation(enc, record["messages"])
        ids, flags = encode(enc.encode_with_special, pieces)
    else:
        pieces = prompt_and_completion(record, prompt, completion, words)
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


def read_examples(paths, enc, s):
    """The examples in all files, by the settings columns, prompt, completion and labels.

    Says how many records of each file make none, and the first one's reason."""
    chat = not s.prompt and not s.completion  # templates of the user's take "messages" as a field
    words = [word.strip() for word in s.labels.split(",")] if s.labels else []
    prompt = template("prompt", s.prompt or "{prompt}")
    completion = template("completion", s.completion or "{completion}")
    examples = []
    for path in paths:
        total = 0
        bad = 0
        reason = ""  # of the first that makes none
        found = records(path, s.columns)
        for where, record in tqdm(found, os.path.basename(path), unit=" records", mininterval=1):
            total += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                examples.append(example(enc, record, prompt, completion, words, chat))
            except KeyError:  # the file's structure is another: all of its records will be so
                raise SystemExit(
                    f'error: {path}, {where}: a message has no role; each is {{"role", "content"}}'
                )
            except SystemExit as e:  # nor can others be read: say which was met first
                raise SystemExit(f"error: {path}, {where}: {str(e.code).removeprefix('error: ')}")
            except ValueError as e:
                bad += 1
                reason = reason or f"{where}: {first_line(e)}"
        if bad:
            print(f"{path}: {bad} of {total} records left out, the first for this: {reason}")
    return examples


def shorten(examples, size):
    """(examples of at most `size` tokens, how many lost an end, how many were dropped).

    Dropped is what has no target left."""
    kept = []
    truncated = 0
    for e in examples:
        short = Example(e.tokens[:size], e.flags[:size])
        if (short.flags & IN_LOSS).any():
            kept.append(short)
            truncated += len(e.tokens) > size
    return kept, truncated, len(examples) - len(kept)


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
    main()
