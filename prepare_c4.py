"""
Turns C4, or any text, into shards of tokens that train.py reads:
    python prepare_c4.py --shards=4                                        # C4, 0.3 GB a file
    python prepare_c4.py --input='texts/*.jsonl.gz' --out_dir=data/mine    # files of your own
    python prepare_c4.py --input=docs --out_dir=data/docs                  # nothing to download
    python prepare_c4.py --protocol=galore --shards=15 --out_dir=data/c4_galore    # papers' rows

C4 comes from the Hugging Face hub. Files of your own are .json or .jsonl, one {"text": ...} a
line or a list of them; .csv or .tsv with a column "text"; or .txt, one document each. All of
these also with .gz or .zst (run/records.py). "docs" is this Python's own documentation.

One file makes one shard (run/shards.py has the format): its documents end to end, an end-of-text
token after each; or, as GaLore's code has them, one document a row (run/protocol.py). Files stream
through, so memory stays small. A shard takes its name when it is complete, and shards.json says of
what it was made (run/manifest.py). Stop at any time: the same command goes on where it stopped, and
makes again what has changed.
"""

import sys

from configurator import between, configure, from_below, one_of

# -----------------------------------------------------------------------------
# text and tokens
input = ""  # "": C4; a glob of local files, ** for all folders; "docs": this Python's documentation
out_dir = "data/c4"  # *_train_*.bin and *_val_*.bin go here
encoding = "gpt2"  # a tiktoken name; "bytes": 256 bytes and end-of-text; or a checkpoint's folder
protocol: one_of("packed", "galore") = "packed"  # galore: a row of 256 T5 tokens a document
# amounts
shards: between(0, 1024) = 1  # C4: how many training files, about 360,000 documents each
val_fraction: from_below(0, 1) = 0.05  # local files: the last part of each one is for validation
# system
workers: between(0, 512) = 0  # processes that tokenise; 0: one a core
# -----------------------------------------------------------------------------

if __name__ == "__main__":  # what is mistyped is said before anything is loaded
    s = configure(sys.modules[__name__])

import codecs
import collections
import contextlib
import functools
import io
import os
import re
import shutil
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tiktoken

from run import manifest
from run.docs import docs_corpus
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep
from run.jobs import (check_others, fetch, files_of, finished, is_of_c4, is_of_rows, jobs_of,
                      names_of, paths_of, reason_to_make)
from run.machine import usable_cores
from run.manifest import Manifest
from run.pool import map_in_processes
from run.protocol import (GALORE, ROW, T5, check_protocol, cut_validation, tokenize_rows,
                          write_flags)
from run.records import Skipped, kind_of, record_blocks, texts_in
from run.shards import HEADER_BYTES, part_of, shard_header, token_dtype
from run.show import Progress
from run.sources import NOT_UTF8, NULS, open_source
from run.text import first_line, valid

BLOCK = 1 << 20  # bytes of text that a worker gets at a time, about 50 ms of work
PIECE = 1 << 19  # characters that are tokenised at once: tiktoken gives up on a million spaces
SMALL = 16e6  # bytes of input for which it does not pay to start processes
MOST_TOKENS = 2**31 - 1  # that a shard's header can count

# the last place to cut a text at: behind it no token of GPT-2, cl100k, o200k or LLaMA-3 goes on
CUT = re.compile(
    r"(?s).*(?:"
    r"\S(?=[ \t])"  # a word, and its blank
    r"|[^\W_](?=\s)"  # a letter or number, and any space; signs take the newlines after them
    r"|\S\n(?=[^\s/])"  # a lone newline; o200k takes the slashes after it
    r")"
)


def main(s):
    if s.protocol == GALORE and "encoding" not in s.given:
        s.encoding = T5
    try:
        prepare(**s.as_dict())
    except KeyboardInterrupt:
        raise SystemExit(
            f"interrupted: finished shards stay in {s.out_dir}, the same command makes the others"
        )


def prepare(
    input=input,
    out_dir=out_dir,
    encoding=encoding,
    protocol=protocol,
    shards=shards,
    val_fraction=val_fraction,
    workers=workers,
):
    """Make the shards that the settings describe, except those that are there already."""
    if not out_dir:
        raise SystemExit("error: out_dir is empty: name a folder for the shards")
    out_dir = os.path.expanduser(out_dir)
    files = files_of(input, val_fraction)
    if protocol == GALORE:
        check_protocol(encoding, files)
    enc = get_encoding(encoding)
    total = collections.Counter()  # what convert returns, of all files
    try:
        with manifest.alone_in(out_dir):
            # an earlier command may have made some of them
            sweep(out_dir)
            made = Manifest.read(out_dir)
            wanted = jobs_of(files, made, encoding, shards, val_fraction, protocol)
            jobs = [job for job in wanted if not finished(job, made)]
            check_others(wanted, made)
            made.forget_missing()
            entries = {name: job.facts for job in jobs for name in names_of(job)}
            begin = functools.cache(functools.partial(made.begin, entries))  # once for all

            # one file after the other; the workers share the blocks of each
            workers = workers or usable_cores()
            if not worth_processes(jobs):
                workers = 1
            try:
                with map_in_processes(workers) as map_blocks:
                    for job in jobs:
                        total.update(convert(job, enc, val_fraction, map_blocks, begin))
                        made.finish(names_of(job))
            finally:
                made.write()
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")
    except BrokenProcessPool:
        raise SystemExit(
            "error: a process that tokenised was killed, perhaps for want of memory; the same "
            "command goes on, and with fewer --workers it takes less"
        )

    if total["skipped"]:
        print(f'skipped {total["skipped"]} lines that are not JSON objects with a string "text"')
    if jobs:
        speed = total["tokens"] / max(total["seconds"], 1e-9) / workers
        print(
            f"{out_dir}: {total['tokens']:,} tokens, {speed:,.0f} tokens/s a core "
            f"on {workers} cores"
        )


def check_made_of(input, out_dir, encoding=encoding, val_fraction=val_fraction):
    """Whether all the shards that prepare() makes of these are in a folder that has some already.

    Exits with one line if it has others, or if a file has changed since. A folder without a
    shards.json is taken as it is, and that is said."""
    out_dir = os.path.expanduser(out_dir)
    complete = True
    try:
        made = Manifest.read(out_dir)
        if not made.names():
            print(f"note: {out_dir} has shards already, and nothing says of what: --data_input="
                  f"{input} is not read")
            return True
        jobs = jobs_of(files_of(input, val_fraction), made, encoding, shards, val_fraction)
        for job in jobs:
            why = reason_to_make(job, made)
            if not any(map(os.path.lexists, paths_of(job))):
                complete = False  # a stop came before its turn
            elif why:
                raise SystemExit(f"{job.shard}: {why}")
        for name in made.strangers([name for job in jobs for name in names_of(job)]):
            raise SystemExit(f"{name} was made of {made.source_of(name)}")
    except (OSError, SystemExit) as e:
        why = str(e).removeprefix("error: ").partition("; delete it")[0]
        raise SystemExit(
            f"error: the shards in {out_dir} are not those of --data_input={input} ({why}); set "
            "another --data_dir, or leave --data_input out to train on them as they are"
        )
    return complete


# -----------------------------------------------------------------------------
# one file


def convert(job, enc, val_fraction, map_blocks, begin):
    """Make the shards of one job.

    map_blocks: map(), or one that works in several processes. begin: called when the shards are
    complete, before they take their names. Returns a Counter of "tokens", of "skipped" records and
    of "seconds"."""
    files = [job.file]
    if is_of_c4(job):  # its turn has come
        files = [fetch(source["file"]) for source in job.facts["sources"]]
    with contextlib.ExitStack() as stack:
        f = stack.enter_context(replacing(job.shard))
        f.write(shard_header(0, enc.n_vocab))  # keeps the place: what it says is known at the end
        made = collections.Counter()
        for file in files:
            made.update(write_tokens(f, job, file, enc, map_blocks))
        count = made["tokens"]
        if is_of_c4(job) and is_of_rows(job) and part_of(job.shard) == "val":
            count = cut_validation(f, enc)
        if job.val_shard:
            unit = ROW if is_of_rows(job) else 1  # tokens that stay together
            moved = int(count // unit * val_fraction) * unit
            if moved == 0:
                raise SystemExit(
                    f"error: {job.file}: {count} tokens are too few to split; set --val_fraction=0"
                )
            count -= moved
            val = stack.enter_context(replacing(job.val_shard))
            val.write(shard_header(0, enc.n_vocab))
            move_tokens(f, val, count, enc)
            complete(val, job.val_shard, moved, enc, job)
        complete(f, job.shard, count, enc, job)
        begin()
    return made


def complete(f, path, count, enc, job):
    """Write the header of an open shard with `count` tokens, and of rows their flags.

    path: the name that it is to take."""
    row = 0
    if is_of_rows(job):
        row = ROW
        targets = write_flags(f, enc)
        print(f"{path}: {count // ROW:,} rows, {targets:,} tokens in the loss")
    f.seek(0)
    f.write(shard_header(count, enc.n_vocab, row, fingerprint(enc)))


def move_tokens(f, val, count, enc):
    """Move what is behind the first `count` tokens of the shard f to the end of the shard val."""
    end = HEADER_BYTES + count * token_dtype(enc.n_vocab).itemsize  # of what stays
    f.flush()
    with open(f.name, "rb") as written:
        written.seek(end)
        shutil.copyfileobj(written, val, 1 << 20)
    f.truncate(end)


def write_tokens(f, job, file, enc, map_blocks):
    """Write the tokens of a job's file to f; returns what convert returns."""
    kind = "jsonl" if file == "docs" else kind_of(file)[0]
    made = collections.Counter()
    left_out = Skipped()
    stream, size, tell = open_text(file)
    with stream, Progress(os.path.basename(job.shard), unit="documents") as progress:
        start = time.perf_counter()
        # the text in blocks, and what makes tokens of one
        if kind == "txt":
            tokenize = tokenize_text
            blocks = text_blocks(stream, file, enc, made)
        else:
            tokenize = tokenize_rows if is_of_rows(job) else tokenize_records
            blocks = record_blocks(stream, kind)
        tokenize = functools.partial(tokenize, job.facts["tokenizer"]["name"])

        # the tokens come in the order of the file, whichever worker is ready first
        try:
            for tokens, documents, skipped, cuts in map_blocks(tokenize, blocks):
                f.write(tokens)
                made.update(tokens=len(tokens), skipped=skipped.total, cuts=cuts)
                left_out.merge(skipped)
                check_count(file, made)
                # an estimate until the end: as many documents a byte as so far
                progress.total = int((progress.done + documents) * size / max(tell(), 1))
                speed = made["tokens"] / max(time.perf_counter() - start, 1e-9)
                progress.advance(documents, f"{speed:,.0f} tokens/s")
        except ValueError as e:  # a table or a list that is not whole
            raise SystemExit(f"error: {file}: {first_line(e)}")

    left_out.say(file)
    if made["tokens"] == 0:
        expected = 'JSON with a string "text"'
        if kind in ("csv", "tsv"):
            expected = 'rows with a "text", which is to be a name in the first one'
        raise SystemExit(
            f"error: {file}: no text: leave it out ({made['skipped']} lines are not {expected})"
        )
    if kind == "txt":  # one document, which came in pieces
        f.write(np.array([enc.eot_token], token_dtype(enc.n_vocab)))
        made["tokens"] += 1
        check_count(file, made)
    if made["cuts"] and enc.name != "bytes":
        print(
            f"note: {file}: has texts of more than {PIECE:,} characters, cut at {made['cuts']} "
            "places where a token might go on"
        )
    made["seconds"] = time.perf_counter() - start
    return made


def check_count(file, made):
    """Exit with one line if a file has more tokens than a header can count."""
    if made["tokens"] > MOST_TOKENS:
        raise SystemExit(f"error: {file}: more than {MOST_TOKENS:,} tokens: split it")


def open_text(file):
    """(buffered stream, bytes in the file, what tells how many were read).

    Of a local file, or of the documentation as if it were one."""
    if file == "docs":
        corpus = docs_corpus()
        stream = io.BufferedReader(io.BytesIO(corpus))
        return stream, len(corpus), stream.tell
    stream = open_source(file)
    return stream, stream.raw.size, stream.raw.file.tell


def worth_processes(jobs):
    """Whether there is so much to do that processes are worth their start."""
    if any(is_of_c4(job) for job in jobs):
        return True
    return sum(job.facts["sources"][0].get("size", 0) for job in jobs) > SMALL


# -----------------------------------------------------------------------------
# one block


def text_blocks(stream, file, enc, made):
    """Cut plain text into blocks of about BLOCK bytes, each where no token can span the cut.

    A text that has no such place for PIECE characters is cut all the same, and made["cuts"] counts
    it; so is a longer one where a tokenizer marks the start of each text that it gets, as
    sentencepiece does."""
    exact = cuts_at_spaces(enc)
    rest = ""
    for text in decoded(stream, file):
        rest += text
        end = last_cut(rest, 0, len(rest)) if exact else 0
        if end:
            yield rest[:end].encode()
            rest = rest[end:]
        while len(rest) > PIECE:
            end = last_cut(rest, 0, PIECE) or PIECE
            made["cuts"] += 1
            yield rest[:end].encode()
            rest = rest[end:]
    yield rest.encode()


def decoded(stream, file):
    """The text of a stream, BLOCK bytes at a time. Exits with one line if it is not UTF-8."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    at = 0  # bytes read
    while data := stream.read(BLOCK):
        pending, _ = utf8.getstate()  # the start of a character, of the block before
        if b"\0" in data:
            refuse(file, NULS, at + data.index(b"\0"))
        try:
            text = utf8.decode(data)
        except UnicodeDecodeError as e:
            refuse(file, NOT_UTF8, at - len(pending) + e.start)
        at += len(data)
        yield text
    pending, _ = utf8.getstate()
    if pending:
        refuse(file, NOT_UTF8, at - len(pending))


def refuse(file, why, at):
    raise SystemExit(f"error: {file}: at byte {at:,}: {why}")


def last_cut(text, start, end):
    """The last place in text[start:end] to cut it at, as an index into text; start: there is none.

    No token of GPT-2's vocabulary, cl100k's, o200k's or LLaMA-3's spans such a place."""
    last = CUT.match(text, start, end)
    return last.end() if last else start


def cuts_at_spaces(enc):
    """Whether text may be cut for this encoding; a checkpoint's tokenizer says it of itself."""
    return isinstance(enc, tiktoken.Encoding) or enc.cuts_at_spaces


def tokenize_records(encoding, block):
    """(tokens, documents, Skipped, cuts that may change a token) of records, each a document.

    block: as records_in reads it."""
    enc = get_encoding(encoding)
    pieces = []
    cuts = 0
    documents = 0
    skipped = Skipped()
    for text in texts_in(block, skipped):
        cuts += encode_long(enc, text, pieces)
        pieces.append([enc.eot_token])
        documents += 1
    return joined(pieces, enc), documents, skipped, cuts


def tokenize_text(encoding, block):
    """The same of a block of a .txt, UTF-8: a piece of a document, which counts as none."""
    enc = get_encoding(encoding)
    pieces = []
    cuts = encode_long(enc, block.decode(), pieces)
    return joined(pieces, enc), 0, Skipped(), cuts


def joined(pieces, enc):
    """Lists or arrays of tokens as one array of the type that a shard has."""
    dtype = token_dtype(enc.n_vocab)
    return np.concatenate([np.array([], dtype), *pieces]).astype(dtype)


def encode_long(enc, text, pieces):
    """Append the tokens of a text of any length to `pieces`, of PIECE characters at most each.

    Returns how many cuts may have changed a token."""
    cuts = 0
    start = 0
    while len(text) - start > PIECE:
        end = last_cut(text, start, start + PIECE)
        if end == start or not cuts_at_spaces(enc):
            cuts += 1
        if end == start:
            end = start + PIECE
        pieces.append(encode(enc, text[start:end]))
        start = end
    pieces.append(encode(enc, text[start:]))
    return cuts


def encode(enc, text):
    """The tokens of a text, (n,) of any integer type; nothing in it is special."""
    text = valid(text)
    if enc.name == "bytes":
        return np.frombuffer(text.encode(), np.uint8)  # the tokens that tiktoken gives, at once
    if isinstance(enc, tiktoken.Encoding):
        # encode_ordinary would make a list of Python integers first
        return enc.encode_to_numpy(text, disallowed_special=())
    return np.array(enc.encode_ordinary(text), np.uint32)


if __name__ == "__main__":
    main(s)
