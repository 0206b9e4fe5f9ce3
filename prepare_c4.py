"""
Turns C4, or any text, into shards of tokens that train.py reads:
    python prepare_c4.py --shards=4                                        # C4, 0.3 GB a file
    python prepare_c4.py --input='texts/*.jsonl.gz' --out_dir=data/mine    # files of your own
    python prepare_c4.py --input=docs --out_dir=data/docs                  # nothing to download

C4 comes from the Hugging Face hub. Files of your own are .json or .jsonl, one {"text": ...} a
line or a list of them; .csv or .tsv with a column "text"; or .txt, one document each. All of
these also with .gz or .zst (run/records.py). "docs" is this Python's own documentation.

One file makes one shard (run/shards.py has the format): its documents end to end, an end-of-text
token after each. Files stream through, so memory stays small. A shard takes its name when it is
complete, and shards.json says of what it was made (run/manifest.py). Stop at any time: the same
command goes on where it stopped, and makes again what has changed.
"""

import sys

from configurator import between, configure, from_below

# -----------------------------------------------------------------------------
# text and tokens
input = ""  # "": C4; a glob of local files, ** for all folders; "docs": this Python's documentation
out_dir = "data/c4"  # *_train_*.bin and *_val_*.bin go here
encoding = "gpt2"  # a tiktoken name; "bytes": 256 bytes and end-of-text; or a checkpoint's folder
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
import ctypes
import functools
import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tiktoken
from tqdm import tqdm

from run import manifest
from run.docs import docs_corpus, docs_source
from run.encodings import fingerprint, get_encoding
from run.files import replacing, sweep
from run.manifest import Manifest
from run.records import (NOT_UTF8, NULS, Skipped, kind_of, matching, open_source, record_blocks,
                         records_in, stem_of)
from run.shards import HEADER_BYTES, open_shard, part_of, shard_header, token_dtype
from run.text import first_line, valid

C4 = "allenai/c4"  # its name on the hub
MAKER = "prepare_c4"  # what a manifest calls this script
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

# a file, the facts of its shards (run/manifest.py), and their paths; val_shard is None where there
# is but one
Job = collections.namedtuple("Job", "file facts shard val_shard")


def main(s):
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
    shards=shards,
    val_fraction=val_fraction,
    workers=workers,
):
    """Make the shards that the settings describe, except those that are there already."""
    if not out_dir:
        raise SystemExit("error: out_dir is empty: name a folder for the shards")
    out_dir = os.path.expanduser(out_dir)
    files = files_of(input, val_fraction)
    enc = get_encoding(encoding)
    total = collections.Counter()  # what convert returns, of all files
    try:
        with manifest.alone_in(out_dir):
            # an earlier command may have made some of them
            sweep(out_dir)
            made = Manifest.read(out_dir)
            wanted = jobs_of(files, made, encoding, shards, val_fraction)
            jobs = [job for job in wanted if not finished(job, made)]
            check_others(wanted, made)
            entries = {name: job.facts for job in jobs for name in names_of(job)}
            begin = functools.cache(functools.partial(made.begin, entries))  # once for all

            # one file after the other; the workers share the blocks of each
            workers = workers or cores()
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
    """Exit with one line unless a folder's shards are what prepare() makes of these.

    A folder without a shards.json is taken as it is, and that is said."""
    out_dir = os.path.expanduser(out_dir)
    try:
        made = Manifest.read(out_dir)
        if not made.names():
            print(f"note: {out_dir} has shards already, and nothing says of what: --data_input="
                  f"{input} is not read")
            return
        jobs = jobs_of(files_of(input, val_fraction), made, encoding, shards, val_fraction)
        for job in jobs:
            why = reason_to_make(job, made)
            if why:
                raise SystemExit(f"{job.shard}: {why}")
        check_others(jobs, made)
    except (OSError, SystemExit) as e:
        why = str(e).removeprefix("error: ").partition("; delete it")[0]
        raise SystemExit(
            f"error: the shards in {out_dir} are not those of --data_input={input} ({why}); set "
            "another --data_dir, or leave --data_input out to train on them as they are"
        )


# -----------------------------------------------------------------------------
# what to make of what


def files_of(input, val_fraction):
    """The local files to read, ["docs"], or None for C4. Exits with one line if there are none."""
    if not 0 <= val_fraction < 1:
        raise SystemExit(f"error: val_fraction={val_fraction}: must be at least 0 and less than 1")
    if not input:
        return None
    if input == "docs":
        if os.path.isfile(input):
            print("note: docs is this Python's documentation; a file here would be ./docs")
        return ["docs"]
    files = matching(input)
    for file in files:
        kind_of(file)
    return files


def jobs_of(files, made, encoding, shards, val_fraction):
    """The Jobs of local files, or where `files` is None of C4's first ones.

    made: the Manifest of the folder that they go to. Raises OSError if a file cannot be read."""
    how = {"encoding": encoding, "enc": get_encoding(encoding), "maker": MAKER}
    jobs = []
    if files is None:
        for name, file in files_of_c4(shards).items():
            source = {"path": f"{C4}/{file}", "hub": C4, "file": file}
            facts = manifest.facts([source], **how)
            jobs.append(Job(file, facts, os.path.join(made.folder, name), None))
        return jobs

    sources = [docs_source() if file == "docs" else manifest.source(file) for file in files]
    for file, source, name in zip(files, sources, shard_names(files, sources, made)):
        facts = manifest.facts([source], **how, val_fraction=val_fraction)
        shard = os.path.join(made.folder, name)
        val_shard = None
        if val_fraction > 0:
            val_shard = os.path.join(made.folder, name.replace("_train_", "_val_"))
        jobs.append(Job(file, facts, shard, val_shard))
    return jobs


def files_of_c4(shards):
    """{shard: file on the hub}: C4's first for validation, `shards` of those for training."""
    # validation first: it is small, and no run starts without it
    files = {"c4_val_00000.bin": "en/c4-validation.00000-of-00008.json.gz"}
    for i in range(shards):
        files[f"c4_train_{i:05d}.bin"] = f"en/c4-train.{i:05d}-of-01024.json.gz"
    return files


def shard_names(files, sources, made):
    """The name of each file's training shard, without the folder.

    A file that has a shard keeps its name, whatever files come or go beside it. It is known by its
    contents if it was moved, and by its path if it was changed."""
    before = {}  # {name: its source}, of those that no file has taken yet
    for name in made.names():
        entry = made.entry(name)
        if part_of(name) == "train" and entry["settings"].get("maker") == MAKER:
            before[name] = entry["sources"][0]
    names = {}  # {place in `files`: name}
    for key in (str, manifest.contents, manifest.path_of):
        named = collections.defaultdict(list)
        for name, source in before.items():
            named[key(source)].append(name)
        for i, source in enumerate(sources):
            same = named.get(key(source))
            if i not in names and same:
                names[i] = same.pop(0)
                del before[names[i]]

    # the others take the next numbers; a Mac's file system takes X and x for one name
    taken = {name.lower() for name in made.names()}
    for i, file in enumerate(files):
        if i not in names:
            names[i] = new_name(file, taken)
            taken.add(names[i].lower())
    return [names[i] for i in range(len(files))]


def new_name(file, taken):
    # a name that starts with a dot is hidden, and one of 255 bytes has no room for more
    stem = stem_of(file).lstrip(".").encode()[:150].decode(errors="ignore") or "text"
    names = (f"{stem}_train_{i:05d}.bin" for i in itertools.count())
    return next(name for name in names if name.lower() not in taken)


def names_of(job):
    """The names of a job's shards, without the folder."""
    return [os.path.basename(path) for path in paths_of(job)]


def paths_of(job):
    return [path for path in (job.shard, job.val_shard) if path]


def finished(job, made):
    """Whether a job's shards are all there already; says so, and why if they are made again."""
    why = reason_to_make(job, made)
    for path in paths_of(job):
        if not why:
            print(f"{path}: kept; to make it again, delete it")
        elif os.path.exists(path):
            print(f"note: {path}: is made again: {why}")
    return not why


def reason_to_make(job, made):
    """Why a job's shards are to be made: one is missing or out of date; "" if they are as wanted.

    Exits with one line if what is in a shard's place is not of this job."""
    reasons = []
    for path in paths_of(job):
        name = os.path.basename(path)
        if not os.path.lexists(path):
            reasons.append(f"{name} is missing")
            continue
        whole = is_whole_shard(path, job)
        entry = made.entry(name)
        other = ""
        if entry is None:
            other = f"{manifest.NAME} does not say of what it was made"
        elif manifest.difference(entry, job.facts):
            other = f"was made with {manifest.difference(entry, job.facts)}"
        elif not manifest.same_contents(entry, job.facts):
            reasons.append(f"{made.source_of(name)} has changed")
            if not manifest.same_paths(entry, job.facts):
                other = f"was made of {made.source_of(name)}"
        if other:
            raise SystemExit(f"error: {path}: {other}; delete it or set another --out_dir")
        if not made.is_finished(name):
            reasons.append("it was not finished")
        elif not whole:
            reasons.append("it is not whole")
    return reasons[0] if reasons else ""


def is_whole_shard(path, job):
    """Whether `path` is a whole shard. Exits with one line if it is one of another vocabulary."""
    tokenizer = job.facts["tokenizer"]
    try:
        found = open_shard(path)
    except SystemExit:
        return False
    if found.n_vocab != tokenizer["n_vocab"]:
        raise SystemExit(
            f"error: {path}: has n_vocab {found.n_vocab}, not {tokenizer['n_vocab']}; "
            "delete it or set another --out_dir"
        )
    if found.row:
        maker = "by finetune.prepare_sft"
    elif found.fingerprint != tokenizer["fingerprint"]:
        maker = "with another tokenizer"
    else:
        return True
    raise SystemExit(f"error: {path}: was made {maker}; delete it or set another --out_dir")


def check_others(jobs, made):
    """Say what shards the folder has beside these jobs'. Exits with one line if they do not fit.

    They do if an earlier command made them by the same tokenizer, of files that are still as they
    were."""
    names = {name for job in jobs for name in names_of(job)}
    others = made.strangers(names)
    for name in others:
        entry = made.entry(name)
        why = ""
        if entry is None:
            why = f"{manifest.NAME} does not say of what it was made"
        elif entry["settings"].get("maker") != MAKER:
            why = f"was made by {entry['settings'].get('maker')}"
        elif manifest.other_tokenizer(entry, jobs[0].facts):
            why = f"was made with {manifest.other_tokenizer(entry, jobs[0].facts)}"
        elif not is_up_to_date(entry["sources"][0]) or not made.is_finished(name):
            why = f"{made.source_of(name)}, of which it was made, is gone or has changed"
        if why:
            path = os.path.join(made.folder, name)
            raise SystemExit(
                f"error: {path}: {why}, and it would be trained on; "
                "delete it or set another --out_dir"
            )
    if others:
        print(
            f"note: {made.folder} has {len(others)} more shards, of files that are not in this "
            f"command: {others[0]}, of {made.source_of(others[0])}"
        )
    there = [*names, *others]
    made.forget([name for name in made.names() if name not in there])


def is_up_to_date(source):
    """Whether what a shard was made of is still there, and as it was."""
    if "hub" in source:
        return True
    if source["path"] == "docs":
        return source == docs_source()
    return os.path.isfile(source["path"]) and source == manifest.source(source["path"])


def is_of_c4(job):
    return "hub" in job.facts["sources"][0]


def fetch(name):
    """The local path of one of C4's files, downloaded unless the hub's cache (HF_HOME) has it."""
    from huggingface_hub import hf_hub_download  # slow, and local files do without

    try:
        return hf_hub_download(C4, name, repo_type="dataset")
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(
            f"error: could not fetch {C4} {name} ({first_line(e)}); local text: --input=GLOB"
        )


# -----------------------------------------------------------------------------
# one file


def convert(job, enc, val_fraction, map_blocks, begin):
    """Make the shards of one job.

    map_blocks: map(), or one that works in several processes. begin: called when the shards are
    complete, before they take their names. Returns a Counter of "tokens", of "skipped" records and of "seconds"."""
    file = job.file
    if is_of_c4(job):  # its turn has come
        file = fetch(file)
    with contextlib.ExitStack() as stack:
        f = stack.enter_context(replacing(job.shard))
        f.write(shard_header(0, enc.n_vocab))  # keeps the place: what it says is known at the end
        made = write_tokens(f, job, file, enc, map_blocks)
        count = made["tokens"]
        if job.val_shard:
            moved = int(count * val_fraction)
            if moved == 0:
                raise SystemExit(
                    f"error: {file}: {count} tokens are too few to split; set --val_fraction=0"
                )
            count -= moved
            val = stack.enter_context(replacing(job.val_shard))
            write_header(val, moved, enc)
            move_tokens(f, val, count, enc)
        write_header(f, count, enc)
        begin()
    return made


def write_header(f, count, enc):
    f.seek(0)
    f.write(shard_header(count, enc.n_vocab, fingerprint=fingerprint(enc)))


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
    with stream, progress_bar(job) as bar:
        start = time.perf_counter()
        # the text in blocks, and what makes tokens of one
        if kind == "txt":
            tokenize = tokenize_text
            blocks = text_blocks(stream, file, enc, made)
        else:
            tokenize = tokenize_records
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
                bar.total = int((bar.n + documents) * size / max(tell(), 1))
                speed = made["tokens"] / max(time.perf_counter() - start, 1e-9)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(documents)
        except ValueError as e:  # a table or a list that is not whole
            raise SystemExit(f"error: {file}: {first_line(e)}")

    left_out.say(file)
    if made["tokens"] == 0:
        raise SystemExit(
            f"error: {file}: no text: leave it out "
            f'({made["skipped"]} lines are not JSON with a string "text")'
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


def progress_bar(job):
    """A bar on a terminal, and nothing elsewhere."""
    name = os.path.basename(job.shard)
    return tqdm(desc=name, unit=" documents", mininterval=1, disable=None)


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
    for where, record in records_in(block):
        if isinstance(record, ValueError):
            skipped.add(str(record), where)
        elif not isinstance(record.get("text"), str):
            skipped.add('no string "text"', where)
        else:
            cuts += encode_long(enc, record["text"], pieces)
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


# -----------------------------------------------------------------------------
# processes


def cores():
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def worth_processes(jobs):
    """Whether there is so much to do that processes are worth their start."""
    if any(is_of_c4(job) for job in jobs):
        return True
    return sum(job.facts["sources"][0].get("size", 0) for job in jobs) > SMALL


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


if __name__ == "__main__":
    main(s)
