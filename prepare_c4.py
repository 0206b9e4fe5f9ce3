"""
Turns C4, or any text, into shards of tokens that train.py reads:
    python prepare_c4.py --shards=4                                     # C4 from the Hugging Face hub, 0.3 GB a file
    python prepare_c4.py --input='texts/*.jsonl.gz' --out_dir=data/mine # local .json, .jsonl (a {"text": ...} a line), .txt
    python prepare_c4.py --input=docs --out_dir=data/docs               # no data set: this Python's own documentation

One input file makes one shard, in llm.c's format: a header of 256 int32 (magic, version, number of tokens, vocabulary),
then the tokens, uint16, documents end to end, an end-of-text token after each. Files stream through, so memory stays small.
A shard takes its final name when it is complete: stop whenever you like, the same command goes on where it stopped.
"""

import ast
import base64
import collections
import contextlib
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
import sysconfig
import time
import warnings
import zlib

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import configure

input = ""  # '': C4; a glob of local files (.json .jsonl .txt, each also .gz); docs: English from this Python's libraries
out_dir = "data/c4"  # *_train_*.bin and *_val_*.bin go here
encoding = "gpt2"  # a tiktoken name; bytes: the 256 bytes and end-of-text; or a rank file like LLaMA-3's tokenizer.model
shards = 1  # how many of C4's 1024 training files, about 360,000 documents each
val_fraction = 0.05  # local input: this last part of each file's tokens is for validation (C4 has its own file)
workers = 0  # processes that tokenise; 0: all cores

LAYOUTS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, token type); llm.c's GPT-2 and LLaMA-3 shards
_block = 1 << 20  # bytes of text that a worker gets at a time, about 50 ms of work


# --- encodings -----------------------------------------------------------------------------------------------------------


class RankFile(tiktoken.Encoding):
    eot_token = property(lambda self: self._special_tokens["<|end_of_text|>"])


@functools.lru_cache
def get_encoding(name):
    """The tiktoken.Encoding called `name`: a tiktoken name, 'bytes' (n_vocab 257), or a file of "base64-token rank" lines.

    A rank file gets LLaMA-3's split pattern and its 256 special tokens. Exits with one line if there is no such encoding.
    """
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        return tiktoken.Encoding(name, pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:  # whatever its HTTP client raises
            raise SystemExit(f"error: encoding {name}: could not fetch its vocabulary ({first_line(e)}); try --encoding=bytes")
    try:  # not tiktoken's load_tiktoken_bpe: it would answer from its cache after the file has changed
        with open(name, "rb") as f:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}
    except OSError as e:
        names = ", ".join(tiktoken.list_encoding_names())
        raise SystemExit(f"error: encoding {name}: {e.strerror} as a file, and it is neither bytes nor one of {names}")
    except ValueError:
        ranks = {}
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or any(bytes([b]) not in ranks for b in range(256)):
        raise SystemExit(f'error: encoding {name}: not lines of "base64-token rank", ranks 0, 1, ..., with all 256 bytes in it')
    # llama3/tokenizer.py: ten named tokens, four of them reserved, then reserved ones up to 256
    special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{i}|>" for i in range(251)]
    special[6:6] = ["<|start_header_id|>", "<|end_header_id|>"]
    special[9:9] = ["<|eot_id|>"]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return RankFile(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={t: n + i for i, t in enumerate(special)})


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]


# --- shards --------------------------------------------------------------------------------------------------------------


def header(count, n_vocab):
    magic = 20240801 if n_vocab > 65535 else 20240520
    head = np.zeros(256, "<i4")
    head[:4] = magic, LAYOUTS[magic][0], count, n_vocab  # llm.c leaves the fourth 0
    return head, LAYOUTS[magic][1]


@contextlib.contextmanager
def replacing(path):
    """A file beside `path` to write to, which takes its name once the block has ended well."""
    try:
        with open(path + ".tmp", "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise


def write_shard(path, tokens, n_vocab):
    """Write `tokens`, integers below n_vocab, as one shard: uint16, or uint32 where n_vocab is above 65535."""
    head, dtype = header(len(tokens), n_vocab)
    with replacing(path) as f:
        f.write(head)
        f.write(np.ascontiguousarray(tokens, dtype))


def read_shard(path):
    """(np.memmap of a shard's tokens, its n_vocab; 0 if it was made elsewhere). Exits with one line if it is not whole."""
    try:
        size = os.path.getsize(path)
        head = np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}; prepare_c4.py makes token shards")
    if len(head) < 256:
        raise SystemExit(f"error: {path}: truncated: {size} bytes, less than a shard's header of 1024; make it again")
    magic, version, count, n_vocab = head[:4].tolist()
    if LAYOUTS.get(magic, (None,))[0] != version:
        known = " or ".join(f"{m} version {v}" for m, (v, _) in LAYOUTS.items())
        raise SystemExit(f"error: {path}: not a token shard: magic {magic} version {version}, expected {known}")
    dtype = np.dtype(LAYOUTS[magic][1])
    if count < 1 or size != 1024 + count * dtype.itemsize:
        expected = f"{1024 + count * dtype.itemsize} bytes for the {count} tokens in its header"
        raise SystemExit(f"error: {path}: truncated: {size} bytes, expected {expected}; make it again")
    return np.memmap(path, dtype, "r", 1024, (count,)), n_vocab


# --- text ----------------------------------------------------------------------------------------------------------------


def docs_corpus():
    """The docstrings of the standard library, numpy and torch, and the help topics, as JSON lines in random order."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    modules = [importlib.util.find_spec(name) for name in ("numpy", "torch")]
    roots = [sysconfig.get_path("stdlib")] + [os.path.dirname(m.origin) for m in modules if m]
    for folder, folders, files in (level for root in roots for level in os.walk(root)):
        skip = ("site-packages", "dist-packages", "idlelib", "lib2to3", "_inductor", "_dynamo")
        folders[:] = [d for d in folders if "test" not in d and d not in skip]
        for path in (os.path.join(folder, name) for name in files if name.endswith(".py") and "test" not in name):
            try:
                with open(path, "rb") as f, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                    nodes = ast.walk(ast.parse(f.read()))
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts += [ast.get_docstring(node, clean=False) or "" for node in nodes if isinstance(node, kinds)]
    plain = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"})
    texts = {inspect.cleandoc(text).translate(plain) for text in texts}
    texts = sorted(text for text in texts if len(text) >= 200 and text.isascii())
    random.Random(0).shuffle(texts)  # so that the last ones are a fair sample
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def blocks(stream, is_text):
    """Cut a stream into blocks of about 1 MB where no token can span the cut, so that the tokens do not depend on it.

    JSON lines: after a newline. Plain text: between a letter and a space, or after a lone newline (both hold for the
    split patterns of GPT-2, cl100k, o200k and LLaMA-3).
    """
    rest = b""
    while block := stream.read(_block):
        if is_text:
            block = rest + block
            cut = re.match(rb"(?s).*(?:[A-Za-z](?=\s)|\S\n(?=\S))", block)  # greedy: the last such place
            rest = block[cut.end() if cut else 0 :]
            block = block[: len(block) - len(rest)]
        else:
            block += stream.readline()
        yield block
    yield rest


def tokenize(encoding, is_text, block):
    """(tokens, documents, lines skipped) of a block: a piece of one document, or lines that are one document each."""
    enc = get_encoding(encoding)
    dtype = header(0, enc.n_vocab)[1]

    def encode(text):
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, UTF-8 cannot
        if encoding == "bytes":
            return np.frombuffer(text.encode(), np.uint8)  # what tiktoken gives, but at once
        return enc.encode_to_numpy(text, disallowed_special=())  # spares the list of Python integers

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


def convert(source, paths, encoding, val_fraction, map_blocks):
    """Tokenise a file into paths[0], and its last val_fraction into paths[1] if given. Returns (tokens, bad lines, seconds)."""
    enc, is_text, count, bad = get_encoding(encoding), bool(re.search(r"\.txt(\.gz)?$", source)), 0, 0
    dtype = np.dtype(header(0, enc.n_vocab)[1])
    with replacing(paths[0]) as f, io.BytesIO(docs_corpus()) if source == "docs" else open(source, "rb") as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        stream = gzip.open(raw) if source.endswith(".gz") else raw
        f.write(bytes(1024))  # the header's place
        start = time.time()
        try:
            with tqdm(desc=os.path.basename(paths[0]), unit=" documents", mininterval=1) as bar:
                for tokens, documents, skipped in map_blocks(
                    functools.partial(tokenize, encoding, is_text), blocks(stream, is_text)
                ):
                    f.write(tokens)
                    count, bad = count + len(tokens), bad + skipped
                    if count >= 2**31:
                        raise SystemExit(f"error: {source}: more than the 2**31 - 1 tokens that a shard can count; split it")
                    bar.total = int((bar.n + documents) * size / max(raw.tell(), 1))  # a guess, until the end
                    bar.set_postfix_str(f"{count / (time.time() - start):,.0f} tokens/s", refresh=False)
                    bar.update(documents)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise SystemExit(f"error: {source}: damaged or incomplete .gz ({first_line(e)}); delete it and get it again")
        except ValueError as e:  # tiktoken's pattern gives up on a million spaces
            raise SystemExit(f"error: {source}: {first_line(e)}")
        if not count:
            raise SystemExit(f'error: {source}: no text; of {bad} lines none is a JSON object with a string "text"')
        if is_text:
            f.write(np.array([enc.eot_token], dtype))
            count += 1
        kept = count - int(count * val_fraction) if len(paths) > 1 else count
        if len(paths) > 1:
            if kept == count:
                raise SystemExit(f"error: {source}: too short to split: {count} tokens; set --val_fraction=0")
            f.flush()
            write_shard(paths[1], np.fromfile(f.name, dtype, offset=1024 + kept * dtype.itemsize), enc.n_vocab)
            f.truncate(1024 + kept * dtype.itemsize)
        f.seek(0)
        f.write(header(kept, enc.n_vocab)[0])
    return count, bad, time.time() - start


# --- the command ---------------------------------------------------------------------------------------------------------


def plan(input, out_dir, shards, val_fraction):
    """What to make of what: a list of (source, [shard] or [training shard, validation shard])."""
    if not input:
        if not 1 <= shards <= 1024:
            raise SystemExit(f"error: shards={shards}: C4 has 1 to 1024 of them")
        jobs = [("en/c4-validation.00000-of-00008.json.gz", ["c4_val_00000.bin"])]  # first, it is small
        jobs += [(f"en/c4-train.{i:05d}-of-01024.json.gz", [f"c4_train_{i:05d}.bin"]) for i in range(shards)]
    else:
        if not 0 <= val_fraction < 1:
            raise SystemExit(f"error: val_fraction={val_fraction}: must be at least 0 and below 1")
        jobs, used = [], collections.Counter()
        sources = ["docs"] if input == "docs" else [f for f in sorted(glob.glob(input, recursive=True)) if os.path.isfile(f)]
        for source in sources:
            stem = re.sub(r"\.(jsonl?|txt)(\.gz)?$", "", os.path.basename(source))
            if stem == os.path.basename(source) and source != "docs":
                raise SystemExit(f"error: {source}: expected .json, .jsonl or .txt, or one of them with .gz")
            stem = stem.replace("_", "-")  # or x_val.txt's training shard would also answer to *_val_*.bin
            splits = ("train", "val") if val_fraction else ("train",)
            jobs.append((source, [f"{stem}_{split}_{used[stem]:05d}.bin" for split in splits]))
            used[stem] += 1
        if not jobs:
            raise SystemExit(f"error: input={input}: no such file")
    return [(source, [os.path.join(out_dir, name) for name in names]) for source, names in jobs]


def finished(path, n_vocab):
    """Whether `path` is a whole shard. Exits with one line if it is one of another vocabulary."""
    if not os.path.exists(path):
        return False
    try:
        found = read_shard(path)[1]
    except SystemExit as e:
        print(f"making it again: {e}")
        return False
    if found != n_vocab:
        raise SystemExit(f"error: {path}: made with n_vocab {found}, this encoding has {n_vocab}: delete it, or set another --out_dir")
    return True


def fetch(name):
    """The local path of one of C4's files, downloaded unless the hub's cache (HF_HOME) has it."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download("allenai/c4", name, repo_type="dataset")
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(f"error: could not fetch {name} of allenai/c4 ({first_line(e)}); for local text set --input=GLOB")


def ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent alone answers
    with contextlib.suppress(AttributeError):
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: a worker dies with its parent, however that dies


def prepare(input=input, out_dir=out_dir, encoding=encoding, shards=shards, val_fraction=val_fraction, workers=workers):
    """Make the shards that the settings above describe, except those that are there already."""
    import fcntl

    n_vocab = get_encoding(encoding).n_vocab  # before the fork, so that no worker loads it
    jobs = plan(input, out_dir, shards, val_fraction)
    workers = workers if workers > 0 else os.cpu_count()
    tokens = bad = seconds = 0
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(out_dir, exist_ok=True)
            lock = stack.enter_context(open(os.path.join(out_dir, ".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process here waits, and then finds the shards of the first
            todo = [job for job in jobs if not all([finished(path, n_vocab) for path in job[1]])]
            if len(todo) < len(jobs):
                print(f"kept what {out_dir} has of {len(jobs) - len(todo)} input files; to make it again, delete it")
            map_blocks = map
            if workers > 1 and (not input or sum(os.path.getsize(f) for f, _ in todo if f != "docs") > 16e6):
                # fork, not spawn, which would run the importing script again; a worker touches neither torch nor CUDA.
                # Threads would share one interpreter lock: measured on two cores, 1.3 times the processes' time.
                pool = multiprocessing.get_context("fork").Pool(workers, initializer=ignore_interrupt)
                map_blocks = stack.enter_context(pool).imap
            else:
                workers = 1
            for source, paths in todo:
                made = convert(source if input else fetch(source), paths, encoding, val_fraction, map_blocks)
                tokens, bad, seconds = tokens + made[0], bad + made[1], seconds + made[2]
        except OSError as e:
            raise SystemExit(f"error: {e.filename or out_dir}: {e.strerror or e}")
    if bad:
        print(f'skipped {bad} lines that are not JSON objects with a string "text"')
    if todo:
        print(f"{out_dir}: {tokens:,} tokens, {tokens / seconds / workers:,.0f} tokens/s a core on {workers} cores")


if __name__ == "__main__":
    config = configure(globals())
    try:
        prepare(**config)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: the shards finished so far are in {out_dir}; the same command goes on")
