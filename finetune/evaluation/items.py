"""
What the model computes: windows of a text, or questions with a row of tokens for each ending.

An item has "rows", [(ids (T,) int64, start)], of which ids[start:] count; see scores.py.
"""

import re

import numpy as np

from finetune.checkpoints.tokenizer import Tokenizer
from finetune.data.examples import encode
from prepare_c4 import encode_long
from run.encodings import fingerprint
from run.records import matching, records
from run.shards import open_shard
from run.sources import NotText, decode, open_source
from run.text import valid

LARGEST_TEXT = 1 << 28  # bytes; its tokens are in memory


def make_items(s, questions, encoding, config):
    """(items, bytes of perplexity's text): windows of text, or the questions with their rows.

    config: the model's LLaMAConfig."""
    block_size = config.block_size
    window = s.block_size or block_size
    if s.task == "generate":
        room = window - s.max_new_tokens
    else:
        room = window + 1  # whose last token is only predicted
    if window > block_size or room < 1:
        raise SystemExit(
            f"error: block_size {window}: the model's is {block_size}; max_new_tokens is less"
        )
    if s.task == "perplexity":
        items, text_bytes = windows(s.data, encoding, window, s.limit)
    else:
        items = [fit(question, encoding, room) for question in questions]
        text_bytes = 0
    if not items:
        raise SystemExit(f"error: data={s.data}: there is nothing in it for task {s.task}")
    largest = max(ids.max() for item in items for ids, _ in item["rows"])
    if largest >= config.vocab_size:
        raise SystemExit(
            f"error: data={s.data}: token {largest} is beyond the model's vocab_size "
            f"{config.vocab_size}: is it of another tokenizer?"
        )
    return items, text_bytes


def fit(question, encoding, room):
    """Give a question its rows, one for each ending, of up to `room` tokens.

    Shots are dropped, the first ones first; then the text is cut on the left."""
    shots = question["shots"]
    for dropped in range(len(shots) + 1):
        text = question.get("head", "") + "".join(shots[dropped:]) + question["text"]
        whole = [encode_ending(encoding, text, ending) for ending in question["endings"]]
        over = max(len(ids) for ids, _ in whole) - room
        if over <= 0:
            break
    # the last `room` tokens of each
    rows = []
    for (ids, count), ending in zip(whole, question["endings"]):
        ids = ids[-room:]
        start = len(ids) - count
        if start < 1 or start == len(ids) and ending:
            raise SystemExit(
                f"error: {text[-60:]!r}: an empty prompt, "
                f"or its completion has more than {room} tokens"
            )
        rows.append((ids, start))
    return question | {"rows": rows, "dropped": dropped, "cut": over > 0}


def encode_ending(encoding, text, ending):
    """(ids (T,) int64 of a text with its ending, how many of them are the ending's)."""
    pieces = [(valid(text), False), (valid(ending), True)]
    ids, flags = encode(encoding.encode_ordinary, pieces)
    return np.array(with_bos(encoding, ids), np.int64), sum(flags)


def with_bos(encoding, ids):
    """`ids` as the model expects a text to start."""
    return encoding.with_bos(ids) if isinstance(encoding, Tokenizer) else ids


def windows(data, encoding, block_size, limit=0):
    """(items, bytes of text) of perplexity: windows of block_size tokens, end to end.

    Each token is predicted once; a text's first one after bos or end-of-text, as in lm-eval's
    rolling log-likelihood. limit: only so many windows, 0 = all."""
    items = []
    size = 0
    for path in matching(data, "data"):
        for tokens in read_tokens(path, encoding):
            first = with_bos(encoding, []) or [encoding.eot_token]
            ids = np.concatenate([first, tokens]).astype(np.int64)
            starts = range(0, len(ids) - 1, block_size)
            if limit:
                starts = starts[: limit - len(items)]
            for start in starts:
                # one token more: it is only predicted
                items.append({"rows": [(ids[start : start + block_size + 1], 1)]})
            size += count_bytes(ids[1 : len(starts) * block_size + 1], encoding)
            if limit and len(items) == limit:
                return items, size
    return items, size


def read_tokens(path, encoding):
    """Yield the tokens of each text of a file: its one, or its records', or a shard's."""
    if path.endswith(".bin"):
        yield read_shard(path, encoding)
    elif re.search(r"\.(jsonl?|csv|tsv)(\.gz|\.zst)?$", path, re.I):
        for where, record in records(path):
            if isinstance(record, ValueError):
                raise SystemExit(f"error: {path}, {where}: {record}")
            if not isinstance(record.get("text"), str):
                raise SystemExit(f'error: {path}, {where}: no string "text"')
            yield tokens_of(record["text"], encoding)
    else:
        with open_source(path) as stream:
            text = stream.read(LARGEST_TEXT + 1)
        if len(text) > LARGEST_TEXT:
            raise SystemExit(
                f"error: {path}: more than {LARGEST_TEXT >> 20} MiB of text: make shards of it "
                "with prepare_c4.py, and name those"
            )
        try:
            yield tokens_of(decode(text), encoding)
        except NotText as e:
            raise SystemExit(f"error: {path}: at byte {e.at:,}: {e}")


def tokens_of(text, encoding):
    """The tokens of a text of any length, (n,) of any integer type."""
    pieces = [np.array([], np.int64)]
    encode_long(encoding, text, pieces)
    return np.concatenate(pieces)


def read_shard(path, encoding):
    """The tokens of a shard of plain text."""
    shard = open_shard(path)
    other_size = shard.n_vocab not in (0, encoding.n_vocab)
    other_vocabulary = shard.fingerprint not in (0, fingerprint(encoding))
    if shard.row or other_size or other_vocabulary:
        raise SystemExit(
            f"error: {path}: made by finetune.prepare_sft, "
            "or with another encoding than the model's"
        )
    largest = shard.tokens.max()
    if largest >= encoding.n_vocab:
        raise SystemExit(
            f"error: {path}: token {largest} is beyond the {encoding.n_vocab} of the model's "
            "encoding"
        )
    return shard.tokens


def count_bytes(ids, encoding):
    """Bytes of the text of ids (T,), end-of-text left out."""
    text = ids[ids != encoding.eot_token]
    size = 0
    for i in range(0, len(text), 10**6):  # lists of Python integers take memory
        some = text[i : i + 10**6].tolist()
        if isinstance(encoding, Tokenizer):
            size += len(encoding.decode(some).encode())
        else:
            size += len(encoding.decode_bytes(some))  # ids may end within a character
    return size
