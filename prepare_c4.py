"""
Turns C4, or any text, into shards of tokens that train.py reads:
    python prepare_c4.py --shards=4                                        # C4, 0.3 GB a file
    python prepare_c4.py --input='texts/*.jsonl.gz' --out_dir=data/mine    # files of your own
    python prepare_c4.py --input=docs --out_dir=data/docs                  # nothing to download

C4 comes from the Hugging Face hub. Files of your own are .json or .jsonl, one {"text": ...} a
line, or .txt, one document each; all of these also with .gz. "docs" is this Python's own
documentation.

One file makes one shard (run/shards.py has the format): its documents end to end, an end-of-text
token after each. Files stream through, so memory stays small. A shard takes its name when it is
complete: stop at any time, the same command goes on where it stopped.
"""

import collections
import contextlib
import ctypes
import functools
import glob
import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import at_least, between, configure
from run.docs import docs_corpus
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep
from run.shards import HEADER_BYTES, open_shard, shard_header, token_dtype, write_shard
from run.text import first_line, valid

# -----------------------------------------------------------------------------
# text and tokens
input = ""  # "": C4; a glob of local files, ** for all folders; "docs": this Python's documentation
out_dir = "data/c4"  # *_train_*.bin and *_val_*.bin go here
encoding = "gpt2"  # a tiktoken name; "bytes": 256 bytes and end-of-text; or a checkpoint's folder
# amounts
shards: between(0, 1024) = 1  # C4: how many training files, about 360,000 documents each
val_fraction = 0.05  # local files: the last part of each one's tokens, below 1, is for validation
# system
workers: at_least(0) = 0  # processes that tokenise; 0: one a core
# -----------------------------------------------------------------------------

BLOCK = 1 << 20  # bytes of text that a worker gets at a time, about 50 ms of work
SMALL = 16e6  # bytes of input for which it does not pay to start processes

# a file, and the paths of the shards to make of it; val_shard is None where there is but one
Job = collections.namedtuple("Job", "source shard val_shard")


def prepare(
    input=input,
    out_dir=out_dir,
    encoding=encoding,
    shards=shards,
    val_fraction=val_fraction,
    workers=workers,
):
    """Make the shards that the settings describe, except those that are there already."""
    enc = get_encoding(encoding)
    if input:
        jobs = jobs_of_files(input, out_dir, val_fraction)
    else:
        jobs = jobs_of_c4(out_dir, shards)
    total = collections.Counter()  # what convert returns, of all files
    try:
        # an earlier command may have made some of them
        os.makedirs(out_dir, exist_ok=True)
        sweep(out_dir)
        jobs = [job for job in jobs if not finished(job, enc)]

        # one file after the other; the workers share the blocks of each
        workers = workers or os.cpu_count()
        if not worth_processes(input, jobs):
            workers = 1
        with map_in_processes(workers) as map_blocks:
            for job in jobs:
                if not input:  # fetched when its turn comes
                    job = job._replace(source=fetch(job.source))
                total.update(convert(job, encoding, val_fraction, map_blocks))
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")

    if total["skipped"]:
        print(f'skipped {total["skipped"]} lines that are not JSON objects with a string "text"')
    if jobs:
        speed = total["tokens"] / total["seconds"] / workers
        print(
            f"{out_dir}: {total['tokens']:,} tokens, {speed:,.0f} tokens/s a core "
            f"on {workers} cores"
        )


# -----------------------------------------------------------------------------
# what to make of what


def jobs_of_c4(out_dir, shards):
    """The first of C4's files for validation, and `shards` of those for training."""
    # validation first: it is small, and no run starts without it
    val_shard = os.path.join(out_dir, "c4_val_00000.bin")
    jobs = [Job("en/c4-validation.00000-of-00008.json.gz", val_shard, None)]
    for i in range(shards):
        shard = os.path.join(out_dir, f"c4_train_{i:05d}.bin")
        jobs.append(Job(f"en/c4-train.{i:05d}-of-01024.json.gz", shard, None))
    return jobs


def jobs_of_files(input, out_dir, val_fraction):
    """Each local file, or "docs", with a shard for training and one for validation.

    Without the latter where val_fraction is 0."""
    if not 0 <= val_fraction < 1:
        raise SystemExit(f"error: val_fraction={val_fraction}: must be at least 0 and less than 1")
    sources = ["docs"]
    if input != "docs":
        sources = filter(os.path.isfile, sorted(glob.glob(input, recursive=True)))
    jobs = []
    seen = collections.Counter()  # several folders may have a file of one name
    for source in sources:
        stem = stem_of(source)
        number = seen[stem]
        seen[stem] += 1
        shard = os.path.join(out_dir, f"{stem}_train_{number:05d}.bin")
        val_shard = None
        if val_fraction > 0:
            val_shard = os.path.join(out_dir, f"{stem}_val_{number:05d}.bin")
        jobs.append(Job(source, shard, val_shard))
    if not jobs:
        raise SystemExit(f"error: input={input}: no such file")
    return jobs


def stem_of(source):
    """What a local file's shards are called by."""
    if source == "docs":
        return source
    match = re.fullmatch(r"(.+)\.(jsonl?|txt)(\.gz)?", os.path.basename(source))
    if not match:
        raise SystemExit(
            f"error: {source}: expected .json, .jsonl or .txt, or one of these with .gz"
        )
    # no "_" in it: the training shard of x_val.txt would match *_val_*.bin, too
    return match[1].replace("_", "-")


def finished(job, enc):
    """Whether a job's shards are all there already; says so for each that is."""
    paths = filter(None, (job.shard, job.val_shard))
    there = [is_finished_shard(path, enc) for path in paths]  # a list: all of them are looked at
    return all(there)


def is_finished_shard(path, enc):
    """Whether `path` is a whole shard. Exits with one line if it is one of another vocabulary."""
    if not os.path.exists(path):
        return False
    try:
        found = open_shard(path)
    except SystemExit:
        return False  # not whole: it is made again
    if found.n_vocab != enc.n_vocab:
        raise SystemExit(
            f"error: {path}: has n_vocab {found.n_vocab}, not {enc.n_vocab}; "
            "delete it or set another --out_dir"
        )
    if found.row:
        maker = "by finetune.prepare_sft"
    elif found.fingerprint not in (0, fingerprint(enc)):
        maker = "with another tokenizer"
    else:
        print(f"{path}: kept; to make it again, delete it")
        return True
    raise SystemExit(f"error: {path}: was made {maker}; delete it or set another --out_dir")


def fetch(name):
    """The local path of one of C4's files, downloaded unless the hub's cache (HF_HOME) has it."""
    from huggingface_hub import hf_hub_download  # slow, and local files do without

    try:
        return hf_hub_download("allenai/c4", name, repo_type="dataset")
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(
            f"error: could not fetch allenai/c4 {name} ({first_line(e)}); local text: --input=GLOB"
        )


# -----------------------------------------------------------------------------
# one file


def convert(job, encoding, val_fraction, map_blocks):
    """Make the shards of one job.

    map_blocks: map(), or one that works in several processes.
    Returns a Counter of "tokens", of "skipped" lines and of "seconds"."""
    enc = get_encoding(encoding)
    with replacing(job.shard) as f:
        f.write(shard_header(0, enc.n_vocab))  # keeps the place: what it says is known at the end
        made = write_tokens(f, job, encoding, map_blocks)
        count = made["tokens"]
        if job.val_shard:
            count -= move_to_validation(f, job, count, val_fraction, enc)
        f.seek(0)
        f.write(shard_header(count, enc.n_vocab, fingerprint=fingerprint(enc)))
    return made


def write_tokens(f, job, encoding, map_blocks):
    """Write the tokens of a job's source to f; returns what convert returns."""
    source = job.source
    enc = get_encoding(encoding)
    is_text = source.endswith((".txt", ".txt.gz"))
    made = collections.Counter()
    with open_source(source) as raw, progress_bar(job) as bar:
        start = time.time()
        size = raw.seek(0, os.SEEK_END)  # bytes
        raw.seek(0)

        # the text in blocks, and what makes tokens of one
        stream = gzip.open(raw) if source.endswith(".gz") else raw
        if is_text:
            tokenize = functools.partial(tokenize_text, encoding)
            blocks = text_blocks(stream, cuts_at_spaces(enc))
        else:
            tokenize = functools.partial(tokenize_lines, encoding)
            blocks = line_blocks(stream)

        # the tokens come in the order of the file, whichever worker is ready first
        try:
            for tokens, documents, skipped in map_blocks(tokenize, blocks):
                f.write(tokens)
                made.update(tokens=len(tokens), skipped=skipped)
                # an estimate until the end: as many documents a byte as so far
                bar.total = int((bar.n + documents) * size / max(raw.tell(), 1))
                speed = made["tokens"] / (time.time() - start)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(documents)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            why = f"incomplete or damaged ({first_line(e)}); delete it and get it again"
            raise SystemExit(f"error: {source}: {why}")
        except ValueError as e:  # tiktoken gives up on a million spaces
            raise SystemExit(f"error: {source}: {first_line(e)}")

    check_count(source, made)
    if is_text:  # a .txt is one document, which came in pieces
        f.write(np.array([enc.eot_token], token_dtype(enc.n_vocab)))
        made["tokens"] += 1
    made["seconds"] = time.time() - start
    return made


def check_count(source, made):
    """Exit with one line if a source has more tokens than a header can count, or none."""
    if made["tokens"] == 0:
        why = "no text: leave it out"
    elif made["tokens"] >= 2**31:
        why = "more than 2**31 - 1 tokens: split it"
    else:
        return
    bad = f'{made["skipped"]} lines are not JSON with a string "text"'
    raise SystemExit(f"error: {source}: {why} ({bad})")


def open_source(source):
    """A local file, or the documentation as if it were one."""
    if source == "docs":
        return io.BytesIO(docs_corpus())
    return open(source, "rb")


def progress_bar(job):
    return tqdm(desc=os.path.basename(job.shard), unit=" documents", mininterval=1)


def move_to_validation(f, job, count, val_fraction, enc):
    """Move the last val_fraction of f's tokens into a shard of their own. Returns how many."""
    moved = int(count * val_fraction)
    if moved == 0:
        raise SystemExit(
            f"error: {job.source}: {count} tokens are too few to split; set --val_fraction=0"
        )
    dtype = token_dtype(enc.n_vocab)
    end = HEADER_BYTES + (count - moved) * dtype.itemsize  # of what stays
    f.flush()  # it is read back, by its name
    tokens = np.fromfile(f.name, dtype, offset=end)
    write_shard(job.val_shard, tokens, enc.n_vocab, fingerprint=fingerprint(enc))
    f.truncate(end)
    return moved


# -----------------------------------------------------------------------------
# one block


def line_blocks(stream):
    """Cut JSON lines into blocks of about BLOCK bytes, each at the end of a line."""
    while block := stream.read(BLOCK):
        yield block + stream.readline()


def text_blocks(stream, cuts_at_spaces):
    """Cut plain text into blocks of about BLOCK bytes, each where no token can span the cut.

    That is between a letter and a space, or after a lone newline: true of the split patterns of
    GPT-2, cl100k and LLaMA-3. It is not true where a tokenizer marks the start of each text that
    it gets, as sentencepiece does: cuts_at_spaces is False, and the text stays whole."""
    if not cuts_at_spaces:
        yield stream.read()
        return
    rest = b""
    while block := stream.read(BLOCK):
        block = rest + block
        # .* is greedy: the last such place; without one the block waits for more text
        last = re.match(rb"(?s).*(?:[A-Za-z](?=\s)|\S\n(?=\S))", block)
        end = last.end() if last else 0
        yield block[:end]
        rest = block[end:]
    yield rest


def cuts_at_spaces(enc):
    """Whether text may be cut for this encoding; a checkpoint's tokenizer says it of itself."""
    return isinstance(enc, tiktoken.Encoding) or enc.cuts_at_spaces


def tokenize_lines(encoding, block):
    """(tokens, documents, lines skipped) of JSON lines, each a document."""
    enc = get_encoding(encoding)
    dtype = token_dtype(enc.n_vocab)
    eot = np.array([enc.eot_token], dtype)
    pieces = [np.array([], dtype)]  # so that there is one to join
    documents = 0
    skipped = 0
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        try:
            pieces += encode(enc, json.loads(line)["text"]), eot
            documents += 1
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            skipped += 1  # not JSON, no object, or no string in its "text"
    return np.concatenate(pieces).astype(dtype), documents, skipped


def tokenize_text(encoding, block):
    """The same of a block of a .txt: a piece of a document, which counts as none."""
    enc = get_encoding(encoding)
    tokens = encode(enc, block.decode("utf-8", "replace"))
    return tokens.astype(token_dtype(enc.n_vocab)), 0, 0


def encode(enc, text):
    """The tokens of a text, (n,) of any integer type; nothing in it is special."""
    text = valid(text)
    if enc.name == "bytes":
        return np.frombuffer(text.encode(), np.uint8)  # the tokens that tiktoken gives, at once
    if isinstance(enc, tiktoken.Encoding):
        # encode_ordinary would make a list of Python integers first
        return enc.encode_to_numpy(text, disallowed_special=())
    return np.array(enc.encode_ordinary(text), np.uint32)


# -----------------------------------------------------------------------------
# processes


def worth_processes(input, jobs):
    """Whether there is so much to do that processes are worth their start."""
    if not jobs or input == "docs":
        return False
    if not input:
        return True  # any file of C4
    return sum(os.path.getsize(job.source) for job in jobs) > SMALL


@contextlib.contextmanager
def map_in_processes(workers):
    """A map() whose calls run in so many processes; for one, map() itself."""
    if workers == 1:
        yield map
        return
    # Threads took 1.3 times as long on two cores: they share Python's lock. Forked: a spawned
    # process would run the script that imported us, and load the vocabulary, again. A fork is safe
    # here, as workers use neither torch nor CUDA.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        # workers inherit the mask: Ctrl-C is for the parent alone
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pool.submit(int).result()  # a first piece of work, any: it forks them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield functools.partial(map_ahead, pool, 2 * workers)


def map_ahead(pool, ahead, function, items):
    """map() in a pool, in order. It has at most `ahead` items in hand, so that memory stays small:
    pool.map would read all of them first."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def die_with_parent():
    """Have Linux kill this process when its parent ends, even if that is killed itself."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main():
    s = configure(sys.modules[__name__])
    try:
        prepare(**s.as_dict())
    except KeyboardInterrupt:
        raise SystemExit(
            f"interrupted: finished shards stay in {s.out_dir}, the same command makes the others"
        )


if __name__ == "__main__":
    main()
