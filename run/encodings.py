"""
Text to tokens and back, by name.

Every encoding has what the code uses of tiktoken.Encoding: n_vocab, eot_token, encode_ordinary and
decode. Here are tiktoken's own and "bytes"; what is a file, a folder or a hub repository is a
checkpoint's tokenizer, see finetune/checkpoints/tokenizer.py.
"""

import contextlib
import functools
import os
import zlib

import tiktoken

from run import foreign
from run.text import first_line


@functools.lru_cache
def get_encoding(name):
    """The encoding of that name: a tiktoken.Encoding, or a checkpoint's Tokenizer.

    name: one of tiktoken's ("gpt2", "cl100k_base", ...); "bytes", the 256 bytes and an end-of-text
    token; or a path or hub repository. Exits with one line if there is no such encoding."""
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        special = {"<|endoftext|>": 256}
        return tiktoken.Encoding(
            name, pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special
        )
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:  # whatever its HTTP client raises
            raise SystemExit(
                f"error: encoding {name}: vocabulary not fetched ({first_line(e)}); "
                "try --encoding=bytes"
            )
    return foreign.tokenizers().get_tokenizer(os.path.expanduser(name))


@functools.lru_cache
def fingerprint(encoding):
    """A number in 1 ... 2^31 - 1 that tells vocabularies apart: the CRC-32 of tokens and ids."""
    if isinstance(encoding, tiktoken.Encoding):
        tokens = tiktoken_vocabulary(encoding)
    else:
        tokens = encoding.vocabulary
    pairs = []
    for token, i in tokens.items():
        pairs.append((i, token.encode() if isinstance(token, str) else token))
    lines = (b"%d %d %s\n" % (i, len(token), token) for i, token in sorted(pairs))
    return zlib.crc32(b"".join(lines)) & 0x7FFFFFFF or 1


def tiktoken_vocabulary(encoding):
    """{token as bytes: id} of a tiktoken.Encoding."""
    vocabulary = {}
    for i in range(encoding.n_vocab):
        with contextlib.suppress(KeyError):  # cl100k_base leaves ids out
            vocabulary[encoding.decode_single_token_bytes(i)] = i
    return vocabulary
