"""
The files of tokens that train.py reads, in llm.c's format.
"""

import collections
import contextlib
import os

import numpy as np

LAYOUTS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, type; as in llm.c


def shard_header(count, n_vocab, row=0, fingerprint=0):
    magic = 20240801 if n_vocab > 65535 else 20240520
    header = np.zeros(256, "<i4")
    header[:6] = magic, LAYOUTS[magic][0], count, n_vocab, row, fingerprint  # llm.c leaves the last three 0
    return header, LAYOUTS[magic][1]


@contextlib.contextmanager
def replacing(path):
    """A file beside `path` to write to, which takes its name once the block has ended well."""
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise


def write_shard(path, tokens, n_vocab, flags=None, row=0, fingerprint=0):
    """Write `tokens`, integers below n_vocab, as one shard: uint16, or uint32 where n_vocab is above 65535.

    flags: one a token, where only some count in the loss: 1, it does; 2, an example starts here; stored as uint8 after
    the tokens. row: with flags, the tokens of a row, block_size + 1. fingerprint: the vocabulary's, 0: unknown.
    """
    with replacing(path) as f:
        f.writelines(shard_parts(tokens, n_vocab, flags, row, fingerprint))


def shard_parts(tokens, n_vocab, flags=None, row=0, fingerprint=0):
    """What write_shard writes: header, tokens, flags."""
    header, dtype = shard_header(len(tokens), n_vocab, row, fingerprint)
    return header, np.ascontiguousarray(tokens, dtype), np.ascontiguousarray([] if flags is None else flags, np.uint8)


Shard = collections.namedtuple("Shard", "tokens n_vocab flags row fingerprint")  # as in write_shard


def read_shard(path):
    """(np.memmap of a shard's tokens, its n_vocab: 0 if made elsewhere). Exits with one line if it is not whole."""
    return open_shard(path)[:2]


def open_shard(path):
    """The Shard in a file, memory-mapped. Exits with one line if it is not whole."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}; make token shards with prepare_c4.py or prepare_sft.py")
    if len(header) < 256:
        raise SystemExit(f"error: {path}: truncated: {size} bytes, its header alone is 1024; delete it, make it again")
    magic, version, count, n_vocab, row, fingerprint = header[:6].tolist()
    layout_version, dtype = LAYOUTS.get(magic, (None, None))
    if version != layout_version:
        known = " or ".join(f"{m} version {v}" for m, (v, _) in LAYOUTS.items())
        raise SystemExit(f"error: {path}: not a token shard: magic {magic} version {version}, expected {known}")
    end = 1024 + count * dtype.itemsize
    whole = end + count * (row > 0)
    if count < 1 or size != whole:
        found = f"{size} bytes, but {whole} for the {count} tokens that its header counts"
        raise SystemExit(f"error: {path}: truncated or empty: {found}; delete it and make it again")
    if row < 0 or row and count % row:
        raise SystemExit(f"error: {path}: damaged: {count} tokens are no rows of {row}; delete it and make it again")
    flags = np.memmap(path, np.uint8, "r", end, (count,)) if row else None
    return Shard(np.memmap(path, dtype, "r", 1024, (count,)), n_vocab, flags, row, fingerprint)


