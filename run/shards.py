"""
Token shards: the files that train.py reads, in llm.c's format.

A shard is three arrays, one after the other, all little-endian:

    header   256 int32, which is 1024 bytes
    tokens   uint16, or uint32 where the vocabulary has more than 65,535 tokens
    flags    uint8, one a token, only in a shard of rows; plain text has none

The header's first six numbers say what follows; the others are 0:

    magic        20240520 for uint16, 20240801 for uint32
    version      1 for uint16, 7 for uint32
    count        tokens in this shard, at most 2^31 - 1
    n_vocab      tokens in the vocabulary; 0: not told
    row          tokens in a row, block_size + 1; 0: plain text
    fingerprint  tells vocabularies of one size apart (run/encodings.py); 0: not told

llm.c writes and reads the first three only, so shards of plain text go both ways.

Plain text is documents end to end, an end-of-text token after each. A run cuts it where it likes.
Rows come from finetune/prepare_sft.py. Each holds whole examples and then padding, and a flag's
bits say what a token is: IN_LOSS, it counts in the loss; STARTS, an example starts with it. In rows
of run/protocol.py the one example is a document.

Rows of finetune/prepare_dpo.py hold whole pairs: an example that is chosen, then one that is not.
The second one's first token has the bit REJECTED, too.
"""

import collections
import os
import re

import numpy as np

from run.files import check_file, replacing

LAYOUTS = {  # magic: version, type of a token
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
HEADER_BYTES = 1024

# bits of a flag
IN_LOSS = 1
STARTS = 2
REJECTED = 4

# tokens, flags: np.memmap (count,), flags None for plain text; the others as in the header
Shard = collections.namedtuple("Shard", "tokens n_vocab flags row fingerprint")


def part_of(name):
    """The part that a file's name tells, "train" or "val", or None where it is no shard.

    The last of the two words counts: x_val_train_00000.bin is for training. Without a number the
    names are llm.c's, tiny_shakespeare_train.bin."""
    match = re.fullmatch(r"(?s)(?!\.).*_(train|val)(_.*)?\.bin", name)
    return match and match[1]


def shard_paths(folder, part):
    """The shards of a part, "train" or "val", of a folder, sorted; none where there is no folder.

    Exits with one line if it cannot be read."""
    folder = os.path.expanduser(folder)
    try:
        found = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise SystemExit(f"error: {folder}: {e.strerror}")
    return sorted(os.path.join(folder, name) for name in found if part_of(name) == part)


def open_shard(path):
    """The Shard in a file, memory-mapped. Exits with one line if it is not whole."""
    try:
        check_file(path)
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise SystemExit(
            f"error: {path}: {e.strerror}; make token shards with prepare_c4.py"
        )
    if len(header) < 256:
        raise SystemExit(
            f"error: {path}: truncated: {size} bytes, its header alone is 1024; "
            "delete it, make it again"
        )
    magic, version, count, n_vocab, row, fingerprint = header[:6].tolist()

    # a file of another kind, or of another byte order, has another magic
    layout_version, dtype = LAYOUTS.get(magic, (None, None))
    if version != layout_version:
        known = " or ".join(f"{m} version {v}" for m, (v, _) in LAYOUTS.items())
        raise SystemExit(
            f"error: {path}: not a token shard: magic {magic} version {version}, expected {known}"
        )

    # a file that was cut short, or written by half, has another size than its header tells
    tokens_end = HEADER_BYTES + count * dtype.itemsize
    flags_bytes = count if row > 0 else 0
    whole = tokens_end + flags_bytes
    if count < 1 or size != whole:
        raise SystemExit(
            f"error: {path}: truncated or empty: {size} bytes, but {whole} for the {count} tokens "
            "that its header counts; delete it and make it again"
        )
    if row < 0 or (row > 0 and count % row):
        raise SystemExit(
            f"error: {path}: damaged: {count} tokens are no rows of {row}; "
            "delete it and make it again"
        )

    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    flags = None
    if row:
        flags = np.memmap(path, np.uint8, "r", tokens_end, (count,))
    return Shard(tokens, n_vocab, flags, row, fingerprint)


def read_shard(path):
    """(tokens, n_vocab) of a shard, like open_shard."""
    shard = open_shard(path)
    return shard.tokens, shard.n_vocab


def write_shard(path, tokens, n_vocab, flags=None, row=0, fingerprint=0):
    """Write one shard, whole or not at all.

    tokens: integers below n_vocab, in one dimension. flags, row: for rows, as above."""
    with replacing(path) as f:
        f.writelines(shard_parts(tokens, n_vocab, flags, row, fingerprint))


def shard_parts(tokens, n_vocab, flags=None, row=0, fingerprint=0):
    """The three arrays of a shard in the order of the file; arguments as in write_shard."""
    header = shard_header(len(tokens), n_vocab, row, fingerprint)
    tokens = np.ascontiguousarray(tokens, token_dtype(n_vocab))  # (count,)
    flags = np.ascontiguousarray([] if flags is None else flags, np.uint8)  # (count,) or (0,)
    return header, tokens, flags


def shard_header(count, n_vocab, row=0, fingerprint=0):
    """The header of `count` tokens, (256,) int32."""
    magic = magic_of(n_vocab)
    version, _ = LAYOUTS[magic]
    header = np.zeros(256, "<i4")
    header[:6] = magic, version, count, n_vocab, row, fingerprint  # llm.c reads the first three
    return header


def token_dtype(n_vocab):
    """The type that a shard's tokens have, by the size of their vocabulary."""
    _, dtype = LAYOUTS[magic_of(n_vocab)]
    return dtype


def magic_of(n_vocab):
    """The layout for a vocabulary, as a key of LAYOUTS."""
    return 20240801 if n_vocab > 65535 else 20240520
