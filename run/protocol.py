"""
GaLore's protocol on C4, by which most papers of this family report their perplexities:

    tokens      T5's, t5-base: 32,000, and 100 sentinels that no text needs
    a row       one document: its first 255 tokens, </s>, and <pad> up to 256
    the loss    of all tokens but padding and each row's first, which nothing predicts
    validation  documents until 10,000,000 tokens are counted, in whole batches of 256 rows

prepare_c4.py --protocol=galore writes such rows, in the format of run/shards.py, for
block_size=255. The published model also reads the 256th token, and leaves what it predicts unused.
Attention needs no mask for the padding. It is causal, and the padding comes last.

There batches' mean losses count alike, in a step and in validation; here all tokens do.
docs/results.md says how its perplexities compare with ours ("The papers' own table").

Source: torchrun_main.py and peft_pretraining/ of github.com/jiaweizzhao/GaLore, commit 2cc66f8.
"""

import numpy as np
import tiktoken

from run.encodings import get_encoding
from run.records import Skipped, table_or_json, texts_in
from run.shards import HEADER_BYTES, IN_LOSS, STARTS, token_dtype

GALORE = "galore"  # the protocol's name, in settings and in manifests
T5 = "google-t5/t5-base"  # its tokenizer's name on the hub
VOCABULARY = 32000  # the model's vocab_size: tokens without the sentinels
SENTINELS = 100
PAD, END, UNKNOWN = 0, 1, 2  # T5's <pad>, </s> and <unk>
ROW = 256  # tokens
LONGEST = 1 << 16  # characters of a document that are tokenised, far more than a row takes

# validation
COUNTED = 10_000_000  # tokens that are not padding
BATCH = 256  # rows that the published script evaluates at a time
FILES = 2  # of C4's eight: one of them holds about as many tokens as are counted


def check_protocol(encoding, files):
    """Exit with one line if the encoding of that name is not T5's, or if a file has no records.

    files: local ones, ["docs"], or None for C4."""
    if not is_t5s(encoding):
        raise SystemExit(
            f"error: protocol={GALORE} takes T5's tokenizer, which encoding={encoding} is not: "
            f"leave encoding out for {T5}, or name a folder with a copy of it"
        )
    for file in files or []:
        if file != "docs":
            table_or_json(file)


def is_t5s(encoding):
    """Whether an encoding has T5's special tokens, and no more than T5 in all."""
    if encoding == "bytes" or encoding in tiktoken.list_encoding_names():
        return False  # known without its vocabulary
    enc = get_encoding(encoding)
    tokens = getattr(enc, "vocabulary", {})  # a rank file's has none
    special = [tokens.get(name) for name in ("<pad>", "</s>", "<unk>")]
    return special == [PAD, END, UNKNOWN] and enc.n_vocab <= VOCABULARY + SENTINELS


def tokenize_rows(encoding, block):
    """(tokens, documents, Skipped, 0) of records, each a document and a row: (documents * ROW,).

    block: as records_in reads it."""
    enc = get_encoding(encoding)
    skipped = Skipped()
    rows = [row_of(enc, text) for text in texts_in(block, skipped)]
    tokens = np.array(rows, token_dtype(enc.n_vocab)).ravel()
    return tokens, len(rows), skipped, 0


def row_of(enc, text):
    """The row of a document, (ROW,) int64."""
    # as in the published code, a special token that a text spells is that token
    ids = enc.encode_with_special(text[:LONGEST])
    ids = ids[: ROW - 1]  # a text that is cut has its </s>, too
    row = np.full(ROW, PAD)
    row[: len(ids)] = ids
    row[len(ids)] = END
    row[row >= VOCABULARY] = UNKNOWN  # a text that spells a sentinel: the model has no row for it
    return row


def tokens_of(f, enc):
    """The tokens that an open shard has behind its header, as rows (n, ROW), memory-mapped."""
    f.flush()
    tokens = np.memmap(f.name, token_dtype(enc.n_vocab), "r", HEADER_BYTES)
    return tokens.reshape(-1, ROW)


def cut_validation(f, enc):
    """Cut an open shard behind the batch with which COUNTED tokens are exceeded.

    Returns how many tokens it has then."""
    rows = tokens_of(f, enc)
    counted = 0
    for start in range(0, len(rows), BATCH):
        counted += np.count_nonzero(rows[start : start + BATCH] != PAD)
        if counted > COUNTED:
            rows = rows[: start + BATCH]
            break
    else:
        print(f"note: {counted:,} tokens for validation, where the published code takes {COUNTED:,}")
    count = rows.size
    f.truncate(HEADER_BYTES + count * rows.itemsize)
    return count


def write_flags(f, enc):
    """Write the flags of an open shard's tokens behind them; returns how many count in the loss."""
    rows = tokens_of(f, enc)
    targets = 0
    f.seek(0, 2)
    for start in range(0, len(rows), 4096):
        flags = np.where(rows[start : start + 4096] != PAD, IN_LOSS, 0).astype(np.uint8)
        flags[:, 0] = STARTS
        targets += np.count_nonzero(flags & IN_LOSS)
        f.write(flags.tobytes())
    return targets
