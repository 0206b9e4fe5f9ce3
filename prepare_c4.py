"""
Turns C4, or any text, into shards of tokens that train.py reads:
    python prepare_c4.py --shards=4                                      # C4 from the Hugging Face hub, 0.3 GB a file
    python prepare_c4.py --input='texts/*.jsonl.gz' --out_dir=data/mine  # local .json(l), {"text": ...} a line, or .txt
    python prepare_c4.py --input=docs --out_dir=data/docs                # no data set: this Python's own documentation

One input file makes one shard in llm.c's format: a header of 256 int32 (magic, version, token count, vocabulary size),
then the tokens as uint16, documents end to end with an end-of-text token after each. Files stream through, so memory
stays small. A shard takes its name when it is complete: stop at any time, the same command goes on where it stopped.
"""

import ast
import collections
import contextlib
import ctypes
import functools
import glob
import gzip
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import configure
from run.shards import LAYOUTS, open_shard, read_shard, replacing, shard_header, write_shard
from run.encodings import fingerprint, first_line, get_encoding, valid

input = ""  # '': C4; a glob of local files (.json .jsonl .txt, also .gz); docs: English from this Python's libraries
out_dir = "data/c4"  # *_train_*.bin and *_val_*.bin go here
encoding = "gpt2"  # a tiktoken name; bytes: 256 bytes and end-of-text; or a checkpoint's folder (see tokenizer.py)
shards = 1  # how many of C4's 1024 training files, about 360,000 documents each
val_fraction = 0.05  # local input: this last part of each file's tokens is for validation (C4 has a file for that)
workers = 0  # processes that tokenise; 0: one a core

_block = 1 << 20  # bytes of text that a worker gets at a time, about 50 ms of work


def docs_corpus():
    """JSON lines, in random order: Python's help topics, the docstrings of the standard library, numpy and torch."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    modules = [importlib.util.find_spec(name) for name in ("numpy", "torch")]
    roots = [sysconfig.get_path("stdlib")] + [os.path.dirname(m.origin) for m in modules if m]
    skip = ("site-packages", "dist-packages", "idlelib", "lib2to3", "_inductor", "_dynamo")
    for folder, folders, files in (entry for root in roots for entry in os.walk(root)):
        folders[:] = [name for name in folders if "test" not in name and name not in skip]
        for name in files:
            if not name.endswith(".py") or "test" in name:
                continue
            try:
                with open(os.path.join(folder, name), "rb") as f, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                    nodes = ast.walk(ast.parse(f.read()))
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts += [ast.get_docstring(node, clean=False) or "" for node in nodes if isinstance(node, kinds)]
    plain = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"})
    texts = {inspect.cleandoc(text).translate(plain) for text in texts}
    texts = sorted(text for text in texts if len(text) >= 200 and text.isascii())
    random.Random(0).shuffle(texts)  # so that the last ones, for validation, are a fair sample
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def blocks(stream, is_text, cuts_at_spaces=True):
    """Cut a stream into blocks of about 1 MB: JSON lines after a newline, plain text where no token can span the cut.

    That is between a letter and a space, or after a lone newline: true of the split patterns of GPT-2, cl100k, LLaMA-3.
    Where it is not (sentencepiece marks the start of what it gets), cuts_at_spaces is False and plain text stays whole.
    """
    if is_text and not cuts_at_spaces:
        yield stream.read()
        return
    rest = b""
    while block := stream.read(_block):
        if is_text:
            block = rest + block
            cut = re.match(rb"(?s).*(?:[A-Za-z](?=\s)|\S\n(?=\S))", block)  # greedy: the last such place
            end = cut.end() if cut else 0
            block, rest = block[:end], block[end:]
        else:
            block += stream.readline()
        yield block
    yield rest


def tokenize(encoding, is_text, block):
    """(tokens, documents, lines skipped) of a block: a piece of one document, or lines that are one document each."""
    enc = get_encoding(encoding)
    dtype = shard_header(0, enc.n_vocab)[1]

    def encode(text):
        text = valid(text)
        if encoding == "bytes":
            return np.frombuffer(text.encode(), np.uint8)  # what tiktoken gives, at once
        if isinstance(enc, tiktoken.Encoding):
            return enc.encode_to_numpy(text, disallowed_special=())  # spares encode_ordinary's list of Python integers
        return np.array(enc.encode_ordinary(text), dtype)

    if is_text:
        return encode(block.decode("utf-8", "replace")).astype(dtype), 0, 0
    eot = np.array([enc.eot_token], dtype)
    tokens, documents, bad = [eot[:0]], 0, 0
    for line in filter(bytes.strip, block.split(b"\n")):
        try:
            tokens += encode(json.loads(line)["text"]), eot
            documents += 1
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad += 1
    return np.concatenate(tokens).astype(dtype), documents, bad


def convert(source, shard, val_shard, encoding, val_fraction, map_blocks):
    """Tokenise one file into `shard`, its last val_fraction into `val_shard` unless that is None.

    map_blocks: map, or a pool's. Returns (tokens, lines skipped, seconds).
    """
    enc, is_text, count, bad = get_encoding(encoding), source.endswith((".txt", ".txt.gz")), 0, 0
    empty_header, dtype = shard_header(0, enc.n_vocab)
    with replacing(shard) as f, io.BytesIO(docs_corpus()) if source == "docs" else open(source, "rb") as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        stream = gzip.open(raw) if source.endswith(".gz") else raw
        start = time.time()
        f.write(empty_header)
        try:
            with tqdm(desc=os.path.basename(shard), unit=" documents", mininterval=1) as bar:
                pieces = blocks(stream, is_text, getattr(enc, "cuts_at_spaces", True))  # tiktoken's all do
                results = map_blocks(functools.partial(tokenize, encoding, is_text), pieces)
                for tokens, documents, skipped in results:
                    f.write(tokens)
                    count, bad = count + len(tokens), bad + skipped
                    bar.total = int((bar.n + documents) * size / max(raw.tell(), 1))  # an estimate, until the end
                    bar.set_postfix_str(f"{count / (time.time() - start):,.0f} tokens/s", refresh=False)
                    bar.update(documents)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise SystemExit(f"error: {source}: incomplete or damaged ({first_line(e)}); delete it and get it again")
        except ValueError as e:  # tiktoken gives up on a million spaces
            raise SystemExit(f"error: {source}: {first_line(e)}")
        if not count or count >= 2**31:
            why = "more than 2**31 - 1 tokens: split it" if count else "no text: leave it out"
            raise SystemExit(f'error: {source}: {why} ({bad} lines are not JSON with a string "text")')
        if is_text:
            f.write(np.array([enc.eot_token], dtype))
            count += 1
        seconds = time.time() - start
        kept = count
        if val_shard:
            kept = count - int(count * val_fraction)
            if kept == count:
                raise SystemExit(f"error: {source}: {count} tokens are too few to split; set --val_fraction=0")
            f.flush()
            held_out = np.fromfile(f.name, dtype, offset=1024 + kept * dtype.itemsize)
            write_shard(val_shard, held_out, enc.n_vocab, fingerprint=fingerprint(enc))
            f.truncate(1024 + kept * dtype.itemsize)
        f.seek(0)
        f.write(shard_header(kept, enc.n_vocab, fingerprint=fingerprint(enc))[0])
    return count, bad, seconds


def fetch(name):
    """The local path of one of C4's files: from the hub's cache (HF_HOME), where it is downloaded if need be."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download("allenai/c4", name, repo_type="dataset")
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(f"error: could not fetch allenai/c4 {name} ({first_line(e)}); local text: --input=GLOB")


def plan(input, shards, val_fraction):
    """What to make of what: [(file, name of its shard, name of its validation shard or None)]."""
    if not input:  # validation first, it is small
        jobs = [("en/c4-validation.00000-of-00008.json.gz", "c4_val_00000.bin", None)]
        return jobs + [(f"en/c4-train.{i:05d}-of-01024.json.gz", f"c4_train_{i:05d}.bin", None) for i in range(shards)]
    if not 0 <= val_fraction < 1:
        raise SystemExit(f"error: val_fraction={val_fraction}: must be at least 0 and less than 1")
    jobs, seen = [], collections.Counter()
    for source in ["docs"] if input == "docs" else filter(os.path.isfile, sorted(glob.glob(input, recursive=True))):
        name = re.fullmatch(r"(docs)|(.+)\.(jsonl?|txt)(\.gz)?", os.path.basename(source))
        if not name:
            raise SystemExit(f"error: {source}: expected .json, .jsonl or .txt, or one of these with .gz")
        stem = (name[1] or name[2]).replace("_", "-")  # or x_val.txt's training shard would match *_val_*.bin too
        name = f"{stem}_%s_{seen[stem]:05d}.bin"
        jobs.append((source, name % "train", name % "val" if val_fraction else None))
        seen[stem] += 1
    if not jobs:
        raise SystemExit(f"error: input={input}: no such file")
    return jobs


def finished(path, enc):
    """Whether `path` is a whole shard; exits with one line if it is one of another vocabulary than that of `enc`."""
    if not os.path.exists(path):
        return False
    try:
        found = open_shard(path)
    except SystemExit:
        return False  # not whole: it is made again
    if found.n_vocab != enc.n_vocab:
        raise SystemExit(f"error: {path}: has n_vocab {found.n_vocab}, not {enc.n_vocab}; delete it or set another "
                         "--out_dir")
    if found.fingerprint not in (0, fingerprint(enc)) or found.row:
        what = "by prepare_sft.py" if found.row else "with another tokenizer"
        raise SystemExit(f"error: {path}: was made {what}; delete it or set another --out_dir")
    print(f"{path}: kept; to make it again, delete it")
    return True


def _die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, for a parent that is killed


def _forked_pool(workers):
    # Processes: threads took 1.3 times as long on two cores, sharing Python's lock. Forked: a spawned one would run the
    # script that imported us, and load the vocabulary, again. They use neither torch nor CUDA.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _die_with_parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is for the parent alone
    pool.submit(int).result()  # forks them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return pool


def _map_ahead(pool, ahead, function, items):
    """map() in a pool that has at most `ahead` items in hand, where pool.map would read all of them first."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def prepare(input=input, out_dir=out_dir, encoding=encoding, shards=shards, val_fraction=val_fraction, workers=workers):
    """Make the shards that the settings describe (see above), except those that are there already."""
    enc = get_encoding(encoding)
    jobs = plan(input, shards, val_fraction)
    workers = workers if workers > 0 else os.cpu_count()
    tokens = bad = seconds = 0
    try:
        os.makedirs(out_dir, exist_ok=True)
        jobs = [[source, *(name and os.path.join(out_dir, name) for name in names)] for source, *names in jobs]
        jobs = [job for job in jobs if not all([finished(path, enc) for path in job[1:] if path])]
        large = not input or sum(os.path.getsize(job[0]) for job in jobs if input != "docs") > 16e6
        with contextlib.ExitStack() as stack:
            map_blocks = map
            if jobs and large and workers > 1:
                map_blocks = functools.partial(_map_ahead, stack.enter_context(_forked_pool(workers)), 2 * workers)
            else:
                workers = 1
            for source, shard, val_shard in jobs:
                source = source if input else fetch(source)
                made = convert(source, shard, val_shard, encoding, val_fraction, map_blocks)
                tokens, bad, seconds = tokens + made[0], bad + made[1], seconds + made[2]
    except OSError as e:
        raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")
    if bad:
        print(f'skipped {bad} lines that are not JSON objects with a string "text"')
    if jobs:
        print(f"{out_dir}: {tokens:,} tokens, {tokens / seconds / workers:,.0f} tokens/s a core on {workers} cores")


if __name__ == "__main__":
    config = configure(globals())
    try:
        prepare(**config)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: finished shards stay in {out_dir}, the same command makes the others")
