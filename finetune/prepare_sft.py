r"""
Turns examples into shards of rows that train.py fine-tunes on, with a loss on the answers alone:
    python prepare_sft.py --input=gsm8k.jsonl --out_dir=data/gsm8k --encoding=smollm2 \
        --prompt='Question: {question}\nAnswer:' --completion=' {answer}'
    python prepare_sft.py --input=sst2/train.tsv --out_dir=data/sst2 --encoding=smollm2 --columns=sentence,label \
        --labels=negative,positive --prompt='Review: {sentence}\nSentiment:' --completion=' {label}'
    python prepare_sft.py --input='chats/*.jsonl' --out_dir=data/chats --encoding=smollm2  # {"messages": [...]} a line

A prompt and its completion become one example, with an end-of-text token after it; a record with "messages", [{"role",
"content"}], goes through the checkpoint's chat template, and all that the assistant says counts in the loss. Rows have
block_size + 1 tokens and hold whole examples. A shard is prepare_c4.py's with the row length in its header and, after
the tokens, a byte for each: bit 0, it counts in the loss; bit 1, an example starts here. Older shards are replaced.
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

from configurator import configure
from run.shards import replacing, shard_parts
from finetune.tokenizer import Tokenizer
from run.encodings import fingerprint, first_line, get_encoding

input = ""  # a glob of .json(l), .tsv, .csv, also .gz; several files make one data set
out_dir = "data/sft"  # NAME_train_00000.bin and NAME_val_00000.bin go here
encoding = "gpt2"  # of the model to tune: its checkpoint's folder, or any other that get_encoding knows
block_size = 512  # train.py's: longer examples lose the end of their completion
columns = ""  # the fields of a .tsv or .csv, comma separated; '': its first line names them
prompt = ""  # a template over a record's fields, \n for a newline; '': {prompt}
completion = ""  # '': {completion}
labels = ""  # comma separated: the words for {label} 0, 1, ...
val_fraction = 0.05  # of the examples, for validation; 1: all of them, 0: none
packing = True  # several examples a row, where they fit; False: one a row, padded
seed = 1337  # of the split and of the rows' order

_COUNTS, _STARTS = 1, 2  # bits of a flag

Example = collections.namedtuple("Example", "tokens flags")


def records(path, columns=""):
    """Yield (where, record or ValueError) for each record in a file: a dict, or why there is none."""
    kind = re.fullmatch(r".+\.(jsonl?|tsv|csv)(\.gz)?", path)
    if not kind:
        raise SystemExit(f"error: {path}: expected .json, .jsonl, .tsv or .csv, or one of these with .gz")
    try:
        with gzip.open(path) if kind[2] else open(path, "rb") as f:
            if kind[1] in ("tsv", "csv"):
                yield from _table(io.TextIOWrapper(f, "utf-8-sig", "replace", newline=""), kind[1], columns)
            elif kind[1] == "json" and f.peek(64)[:64].lstrip()[:1] == b"[":
                for i, record in enumerate(json.load(f)):
                    yield f"record {i + 1}", _object(record)
            else:
                for i, line in enumerate(f):
                    if line.strip():
                        yield f"line {i + 1}", _object(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as e:
        raise SystemExit(f"error: {path}: incomplete or damaged ({first_line(e)}); get it again")
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}")


def _object(record):
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError):
        return ValueError("not JSON")
    return record if isinstance(record, dict) else ValueError("not a JSON object")


def _table(f, kind, columns):
    csv.field_size_limit(sys.maxsize)
    # a .tsv has no quoting: in SST-2 a quotation mark is a word
    rows = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "tsv" else csv.reader(f, strict=True)
    names = [name.strip() for name in columns.split(",")] if columns else next(rows, [])
    try:
        for row in filter(None, rows):
            why = f"{len(row)} fields instead of {len(names)}, {','.join(names)}"
            yield f"line {rows.line_num}", dict(zip(names, row)) if len(row) == len(names) else ValueError(why)
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num}: {e}")


def template(name, text):
    """A str.format template of a flag, where \\n may stand for a newline. Exits with one line if it is malformed."""
    text = text.replace("\\n", "\n")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
        if all(re.match(r"[^\W\d]", field) for field in fields):
            return text
        why = "a field needs a name"
    except ValueError as e:
        why = first_line(e)
    raise SystemExit(f"error: {name}={text!r}: {why}; write {{field}}, and {{{{ for a brace")


def fill(text, record):
    """`text` with the record's fields in their places. Raises ValueError if it lacks one."""
    try:
        return text.format_map({key: value for key, value in record.items() if value is not None})
    except (LookupError, AttributeError, TypeError) as e:
        missing = e.args[0] if isinstance(e, KeyError) else first_line(e)
        raise ValueError(f"no field {missing!r}")


def prompt_and_completion(record, prompt, completion, words):
    """[(text, whether it counts)] of one record. Raises ValueError if it makes none."""
    if words and "label" in record:
        label = str(record["label"])
        if not label.isascii() or not label.isdigit() or int(label) >= len(words):
            raise ValueError(f"label {label!r} is none of 0 to {len(words) - 1}")
        record = record | {"label": words[int(label)]}
    pieces = [(fill(prompt, record), False), (fill(completion, record), True)]
    if not pieces[1][0].strip():
        raise ValueError("its completion is empty")
    return pieces


def conversation(enc, messages):
    """[(text, whether it counts)] of one conversation: all that the assistant says, with the token that ends it.

    Raises ValueError if the messages are none, and KeyError if one has no role."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('its messages are no list of {"role", "content"}')
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message.get("content"), str):
            raise ValueError("a message's role or content is not a text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError("the assistant says nothing")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("it has no message of the assistant")
    whole, pieces, at = enc.render(messages), [], 0
    for i in turns:
        before = enc.render(messages[:i], add_generation_prompt=True)
        through = enc.render(messages[: i + 1])
        if not through.startswith(before) or not whole.startswith(through) or len(before) < at:
            raise SystemExit(f"message {i + 1}: the chat template of {enc.name} does not write a conversation message "
                             "by message, so that what the assistant says cannot be found in it")
        ended = through.rstrip()  # many templates write a newline after the end token, which nobody needs to learn
        end = len(ended) if ended.endswith(tuple(enc.special)) else len(through)
        pieces += [(whole[at : len(before)], False), (whole[len(before) : end], True)]
        at = end
    return [*pieces, (whole[at:], False)]


def encode(encode_text, pieces):
    """(ids, flags) of a text in pieces [(text, whether it counts)].

    The tokens are the whole text's, where each piece ends with one: sentencepiece would mark a piece's start as a
    word's. Else they are those of the pieces, as the model will see a prompt by itself ("Answer: " + "4")."""
    texts, counts = zip(*pieces)
    prefixes = [encode_text(text) for text in itertools.accumulate(texts)]
    ids, ends = prefixes[-1], [len(prefix) for prefix in prefixes]
    if any(prefix != ids[: len(prefix)] for prefix in prefixes):
        parts = [encode_text(text) for text in texts]
        ids, ends = list(itertools.chain(*parts)), list(itertools.accumulate(map(len, parts)))
    return ids, np.repeat(counts, np.diff(ends, prepend=0)).astype(int).tolist()  # _COUNTS is 1


def example(enc, record, prompt="{prompt}", completion="{completion}", words=(), chat=True):
    """The Example that a record makes, of any length. Raises ValueError, or KeyError, if it makes none."""
    if chat and "messages" in record:
        if not isinstance(enc, Tokenizer) or enc.chat_template is None:
            raise SystemExit("the encoding has no chat template; messages need an instruct model's checkpoint, or "
                             "--prompt and --completion")
        ids, flags = encode(enc.encode_with_special, conversation(enc, record["messages"]))
    else:
        ids, flags = encode(enc.encode_ordinary, prompt_and_completion(record, prompt, completion, words))
        ids, flags = [*ids, enc.eot_token], [*flags, _COUNTS]
    whole = enc.with_bos(ids) if isinstance(enc, Tokenizer) else ids
    flags = [0] * (len(whole) - len(ids)) + flags
    flags[0] = _STARTS  # and no target: nothing comes before it
    return Example(np.array(whole, np.uint32), np.array(flags, np.uint8))


def pack(lengths, size):
    """Rows of `size`, as lists of indices, of pieces of these lengths, each in the fullest row that has room for it."""
    rows, by_room, rooms = [], collections.defaultdict(list), 0  # rooms: bit r is set if some row has room r
    for i, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def fill_rows(examples, block_size, packing, eot):
    """(tokens, flags), each (rows, block_size + 1), of examples that fit one row each."""
    size = block_size + 1
    rows = pack([len(e.tokens) for e in examples], size) if packing else [[i] for i in range(len(examples))]
    tokens, flags = np.full((len(rows), size), eot, np.uint32), np.zeros((len(rows), size), np.uint8)
    for row, of_row in enumerate(rows):
        at = 0
        for e in (examples[i] for i in of_row):
            tokens[row, at : at + len(e.tokens)], flags[row, at : at + len(e.tokens)] = e
            at += len(e.tokens)
    return tokens, flags


def read_examples(paths, enc, columns, prompt, completion, labels):
    """The examples of all files. Says how many records of each make none, and the first one's reason."""
    chat, words = not prompt and not completion, [word.strip() for word in labels.split(",")] if labels else []
    prompt, completion = template("prompt", prompt or "{prompt}"), template("completion", completion or "{completion}")
    examples = []
    for path in paths:
        total, bad, reason = 0, 0, ""
        for where, record in tqdm(records(path, columns), os.path.basename(path), unit=" records", mininterval=1):
            total += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                examples.append(example(enc, record, prompt, completion, words, chat))
            except KeyError:
                raise SystemExit(f'error: {path}, {where}: a message has no role; each is {{"role", "content"}}')
            except SystemExit as e:
                raise SystemExit(f"error: {path}, {where}: {str(e.code).removeprefix('error: ')}")
            except ValueError as e:
                bad, reason = bad + 1, reason or f"{where}: {first_line(e)}"
        if bad:
            print(f"{path}: {bad} of {total} records left out, the first for this: {reason}")
    return examples


def shorten(examples, size):
    """(examples of at most `size` tokens, how many lost an end, how many were dropped, with no target left)."""
    cut = [Example(e.tokens[:size], e.flags[:size]) for e in examples]
    kept = [i for i, e in enumerate(cut) if (e.flags & _COUNTS).any()]
    return [cut[i] for i in kept], sum(len(examples[i].tokens) > size for i in kept), len(cut) - len(kept)


def prepare_sft(input=input, out_dir=out_dir, encoding=encoding, block_size=block_size, columns=columns, prompt=prompt,
                completion=completion, labels=labels, val_fraction=val_fraction, packing=packing, seed=seed):
    """Make the two shards that the settings describe (see above)."""
    if block_size < 1 or not 0 <= val_fraction <= 1:
        raise SystemExit(f"error: block_size={block_size}, val_fraction={val_fraction}: must be at least 1, and 0 to 1")
    enc = get_encoding(encoding)
    paths = list(filter(os.path.isfile, sorted(glob.glob(input, recursive=True))))
    if not paths:
        raise SystemExit(f"error: input={input}: no such file")
    name = os.path.basename(paths[0]) if len(paths) == 1 else os.path.basename(os.path.abspath(out_dir))
    name = re.sub(r"\.(jsonl?|tsv|csv)(\.gz)?$", "", name).replace("_", "-")  # or x_val.tsv would match *_val_*.bin
    examples = read_examples(paths, enc, columns, prompt, completion, labels)
    examples, truncated, dropped = shorten(examples, block_size + 1)
    if not examples:
        raise SystemExit(f"error: {input}: no usable example ({dropped} longer than block_size {block_size})")
    held_out = round(len(examples) * val_fraction)
    if 0 < val_fraction < 1 and not 0 < held_out < len(examples):
        raise SystemExit(f"error: {input}: {len(examples)} examples are too few to split; set --val_fraction=0")
    order = np.random.default_rng(seed).permutation(len(examples))  # of examples, not rows: packing changes nothing
    made, summary = {}, collections.Counter()
    for split, part in (("val", order[:held_out]), ("train", order[held_out:])):
        path = os.path.join(out_dir, f"{name}_{split}_00000.bin")
        if not len(part):
            if os.path.exists(path):
                raise SystemExit(f"error: {path}: is of another split, and would stay; delete it")
            continue
        tokens, flags = fill_rows([examples[i] for i in part], block_size, packing, enc.eot_token)
        if tokens.size >= 2**31:
            raise SystemExit(f"error: {input}: more than 2**31 - 1 tokens in rows: split it")
        made[path] = shard_parts(tokens.ravel(), enc.n_vocab, flags.ravel(), block_size + 1, fingerprint(enc))
        summary.update(rows=len(tokens), room=tokens.size, loss=int((flags & _COUNTS).sum()))
    try:
        os.makedirs(out_dir, exist_ok=True)
        with contextlib.ExitStack() as stack:  # both take their names only when both are written
            for path, parts in made.items():
                stack.enter_context(replacing(path)).writelines(parts)
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")
    count = sum(len(e.tokens) for e in examples)
    print(f"{out_dir}: {len(examples):,} examples ({held_out:,} for validation), {count:,} tokens, {summary['loss']:,} "
          f"in the loss, {summary['rows']:,} rows of {block_size + 1}, {count / summary['room']:.1%} full; "
          f"{truncated:,} truncated, {dropped:,} dropped: too long")


if __name__ == "__main__":
    config = configure(globals())
    try:
        prepare_sft(**config)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")
