r"""
Evaluate a model: a run's folder, a Hugging Face directory or a hub name.

    # perplexity of a text, or of shards, 'x_val_*.bin': nats a token and a byte
    python -m finetune.evaluate --model=out --task=perplexity --data=wiki.test.txt
    # the likeliest of some labels
    python -m finetune.evaluate --model=out --task=choice --data=sst2/dev.tsv \
        --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:'
    # MMLU, of its dev/*_dev.csv and test/*_test.csv
    python -m finetune.evaluate --model=out --task=mmlu --data=mmlu --shots=5
    # a number that the model writes, as in GSM8K
    python -m finetune.evaluate --model=out --task=generate --data=gsm8k.jsonl --shots=8 \
        --prompt='Question: {question}\nAnswer:'

The result is a JSON file in the working directory, whose name says what was evaluated. Stop at any
time: the same command goes on where it stopped.

What is not in 8 bits is as a run saved it (--dtype=auto). Of a Hugging Face model it is float32 on
a CPU and else bfloat16.
"""

import sys

from configurator import at_least, configure, one_of

# what to evaluate
model = "out"  # a run's folder, a Hugging Face directory or a hub name
task: one_of("perplexity", "choice", "mmlu", "generate") = "perplexity"  # see above
data = ""  # texts or .bin files (a glob); .jsonl, .tsv, .csv records; MMLU's folder
out = ""  # JSON file for the result; '': one named by model, task and data, here
limit: at_least(0) = 0  # only the first n windows, records, or questions of a subject; 0 = all
batch_size: at_least(1) = 8  # items at once; changes speed and memory alone
block_size: at_least(0) = 0  # the context's tokens, 0 = the model's

# records and examples
columns = ""  # names of a headerless .tsv's or .csv's columns; '': its first line names them
prompt = ""  # of choice and generate: a template as in finetune.prepare_sft
completion = ""  # what follows it; '': ' {label}' in choice, ' {answer}' in generate
labels = ""  # the words of choice's field `label` 0, 1, ..., like negative,positive
shots: at_least(0) = 0  # examples before each question: of MMLU's dev/, else of shots_data
shots_data = ""  # '': the first records of data, which are then not asked

# answers of generate
max_new_tokens: at_least(1) = 256  # of an answer, which also ends at end-of-text
stop = "Question:"  # it ends before this, too; \n for a newline; '': at end-of-text alone

# computation
device: one_of("auto", "cuda", "cpu") = "auto"  # cuda where there is one, else cpu
dtype: one_of("auto", "bfloat16", "float16", "float32") = "auto"  # of what is not in 8 bits
weight_bits: one_of(4, 8, 16) = 8  # of a Hugging Face model's matrices; 16: as they are, 4: NF4

if __name__ == "__main__":
    s = configure(sys.modules[__name__])

from finetune.questions import GROUP_OF, check, number, read_questions

if __name__ == "__main__":  # torch takes seconds to load: what is mistyped is said before
    check(s)

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

from finetune.data.examples import encode
from finetune.checkpoints.tokenizer import Tokenizer
from prepare_c4 import encode_long
from run.checkpoint import checkpoint_paths, load_model
from run.device import check_device, memory_peak, pick_device
from run.encodings import fingerprint, get_encoding
from run.files import check_file, lock, parse_json, replacing
from run.finite import first_not_finite
from run.records import NotText, decode, matching, open_source, records
from run.shards import open_shard
from run.show import Progress
from run.text import first_line, valid

LOSS_CHUNK = 512  # tokens whose logits exist at once: 512 x 32000 float32 is 62 MiB
LARGEST_TEXT = 1 << 28  # bytes; its tokens are in memory


def main(s):
    try:
        evaluate(s)
    except OSError as e:
        raise SystemExit(f"error: {e.filename or 'the result'}: {e.strerror or e}")
    except torch.OutOfMemoryError:
        raise SystemExit("error: out of memory on the GPU; a smaller --batch_size takes less")
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on where it stopped")


def evaluate(s):
    """Do what the settings describe: write the result, and print its figures."""
    paths = {name: os.path.expanduser(getattr(s, name)) for name in PATHS}
    s = s.changed(**paths)
    check(s)
    questions = read_questions(s)  # before the model, which takes longer to load
    kind = pick_device(s.device)
    check_device(kind)

    # where the result goes, and beside it what an interrupted run has found
    subject = subject_of(s)
    path = s.out or name_of(s, subject)
    check_out(path, subject)
    with open_partial(f"{path}.partial.jsonl") as partial:
        # the model, and what it is to compute
        model, encoding = load(s, kind)
        if subject_of(s) != subject:  # of a live run, say
            raise SystemExit(f"error: {s.model} or {s.data} has changed meanwhile: start again")
        items, text_bytes = make_items(s, questions, encoding, model.config)
        results = answer_all(s, model, encoding, items, partial, subject)

        # what they amount to
        result = summary(s, items, results, text_bytes)
        result["seconds"] = sum(r["seconds"] for r in results)
        result["peak_memory_gib"] = memory_peak(kind)
        result["settings"] = s.as_dict()
        result["subject"] = subject
        with replacing(path) as f:
            f.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
        os.unlink(partial.name)
    print_figures(path, result)
    for group, part in result.get("groups", {}).items():
        print_figures(group, part)


def load(s, kind):
    """(model, encoding) that the settings name."""
    dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
    try:
        model, name = load_model(s.model, kind, dtype, s.weight_bits)
    except ValueError as e:
        raise SystemExit(f"error: {first_line(e)}")
    bad = first_not_finite(model)
    if bad:
        raise SystemExit(f"error: {s.model}: weight {bad} is not finite: nothing can be evaluated")
    return model, get_encoding(name)


def print_figures(name, part):
    figures = [f"{key} {x:.6g}" for key, x in part.items() if isinstance(x, (int, float))]
    print(f"{name}: " + ", ".join(figures))


# -----------------------------------------------------------------------------
# what is evaluated, and the files that are named by it

PATHS = ("model", "data", "shots_data", "out")  # settings
NO_MATTER = ("out", "batch_size", "device")  # settings that change no result


def subject_of(s):
    """A hash of what the result depends on.

    That is settings, and names, sizes and times of the data's and the model's files."""
    files = []
    for name in ("data", "shots_data"):
        path = getattr(s, name)
        if os.path.isdir(path):
            files += glob.glob(os.path.join(glob.escape(path), "*", "*.csv"))  # MMLU's
        elif path:
            files += matching(path, name)
    files += checkpoint_paths(s.model)[:1]
    for ending in ("*.safetensors", "*.json", "*.model"):
        files += glob.glob(os.path.join(glob.escape(s.model), ending))
    stats = []
    for path in sorted(files):
        stat = os.stat(path)
        stats.append((os.path.realpath(path), stat.st_size, stat.st_mtime_ns))
    settings = {name: x for name, x in s.as_dict().items() if name not in NO_MATTER}
    for name in PATHS:
        if os.path.exists(getattr(s, name)) and name in settings:
            settings[name] = os.path.realpath(getattr(s, name))
    return hashlib.sha256(json.dumps([settings, stats]).encode()).hexdigest()[:16]


def name_of(s, subject):
    """The result's file, which no other subject has."""
    words = []
    for path in (s.model, s.data):
        word = os.path.basename(os.path.abspath(path))
        words.append(re.sub(r"[^\w.-]+", "-", word)[:40])
    return f"eval-{s.task}-{words[0]}-{words[1]}-{subject[:8]}.json"


def check_out(path, subject):
    """Exit with one line if the result cannot go there; say so if it takes another one's place."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        return
    check_file(path)
    with open(path, "rb") as f:
        content = f.read()
    try:
        before = parse_json(content)
    except ValueError:
        before = None
    if not isinstance(before, dict) or "settings" not in before:
        raise SystemExit(f"error: out={path}: is there, and is no result: name another file")
    if before.get("subject") != subject:
        print(f"note: {path} has the result of other settings, model or data: it is replaced")


@contextlib.contextmanager
def open_partial(path):
    """The file of results so far, to read and to append to; this process alone has it."""
    if os.path.exists(path):
        check_file(path)
    with open(path, "a+b") as f:
        if lock(f) is False:
            raise SystemExit(f"error: {path}: another process evaluates this: wait for it")
        try:
            yield f
        finally:
            if os.path.exists(path) and not os.path.getsize(path):
                os.unlink(path)  # nothing was found


# -----------------------------------------------------------------------------
# items: what the model computes, each with its rows of tokens (see loglikelihoods)


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


# -----------------------------------------------------------------------------
# what the model says


@torch.inference_mode()
def loglikelihoods(model, rows):
    """log p(ids[start:] | ids[:start]) in nats, a float for each row.

    rows: [(ids (T,) int64 array, start >= 1)]. Rows with one input, like choices of one token, are
    computed once. So is what all inputs begin with, like MMLU's examples: it goes to a cache. The
    rest of each follows, padded on the right, where causal attention does not look. Logits exist
    for ids[start:] alone, LOSS_CHUNK tokens at a time."""
    device = model.norm.weight.device

    # a row's input is all but its last token
    inputs = []
    line_of = {}  # {input, as bytes: its place in inputs}
    for ids, _ in rows:
        key = ids[:-1].tobytes()
        if key not in line_of:
            line_of[key] = len(inputs)
            inputs.append(ids[:-1])

    # what all begin with, at most up to the last token before any start
    shared = 0
    caches = None
    if len(inputs) > 1:
        before = min(start for _, start in rows) - 1
        beginnings = [ids[:before].tolist() for ids in inputs]
        shared = len(os.path.commonprefix(beginnings))  # of any lists
    if shared:
        caches = [{} for _ in model.blocks]
        beginning = torch.from_numpy(inputs[0][None, :shared])  # (1, shared)
        model.hidden(beginning.to(device), caches=caches)

    # the rest of each
    length = max(map(len, inputs))
    padded = [np.pad(ids[shared:], (0, length - len(ids))) for ids in inputs]
    idx = torch.from_numpy(np.array(padded)).to(device)  # (B, T)
    hidden = model.hidden(idx, caches=caches, position=shared)  # (B, T, C)

    # each wanted token: its row, the line and place whose hidden state predicts it, and itself
    wanted = []
    for n, (ids, start) in enumerate(rows):
        line = line_of[ids[:-1].tobytes()]
        for t in range(start, len(ids)):
            wanted.append((n, line, t - 1 - shared, ids[t]))
    row, line, place, target = torch.from_numpy(np.array(wanted)).to(device).T  # (N,) each
    # logits of these alone
    h = hidden[line, place]  # (N, C)
    losses = []
    for some, targets in zip(h.split(LOSS_CHUNK), target.split(LOSS_CHUNK)):
        logits = model.logits(some)  # (chunk, V) float32
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    losses = torch.cat(losses).cpu().numpy()
    return np.bincount(row.cpu().numpy(), -losses).tolist()  # sums in float64


@torch.inference_mode()
def greedy(model, encoding, prompts, max_new_tokens, stop=""):
    """The likeliest tokens, one by one, after each of `prompts`, as text.

    prompts: (T,) int64 arrays. A text ends after max_new_tokens, or at end-of-text or the string
    `stop`, neither included. Prompts are padded on the left, and the padding is another document,
    which the text does not see."""
    device = model.norm.weight.device
    length = max(map(len, prompts))
    padded = [np.pad(ids, (length - len(ids), 0)) for ids in prompts]
    idx = torch.tensor(np.array(padded), device=device)  # (B, T)
    documents = None  # without padding there is no mask
    if min(map(len, prompts)) < length:
        ones = [np.pad(np.ones_like(ids), (length - len(ids), 0)) for ids in prompts]
        documents = torch.tensor(np.array(ones), device=device)  # (B, T), 0 is padding

    caches = [{} for _ in model.blocks]
    position = 0
    new = [[] for _ in prompts]
    ended = [False] * len(prompts)
    # a token is a byte at least: so many hold a stop that the last one completes
    tail = len(stop.encode()) + 1
    for _ in range(max_new_tokens):
        h = model.hidden(idx, caches=caches, position=position, documents=documents)
        position += idx.shape[1]
        logits = model.logits(h[:, -1])[:, : encoding.n_vocab]  # vocab_size may be padded
        largest, idx = logits.max(dim=-1, keepdim=True)  # (B, 1) each; NaN is larger than all
        check_finite(largest[:, 0].tolist())
        if documents is not None:
            documents = torch.ones_like(idx)
        for i, token in enumerate(idx[:, 0].tolist()):
            if ended[i]:
                continue
            new[i].append(token)
            stops = stop != "" and stop in encoding.decode(new[i][-tail:])
            ended[i] = token == encoding.eot_token or stops
        if all(ended):
            break

    # `stop` may lie within a token
    texts = []
    for ids in new:
        text = encoding.decode([token for token in ids if token != encoding.eot_token])
        if stop:
            text = text.partition(stop)[0]
        texts.append(text)
    return texts


class NotFinite(ValueError):
    """A score of the model's is none: the largest of NaN would be the first. `row`: whose."""

    def __init__(self, row, score):
        super().__init__(f"the model answers {score}: its weights are not finite, or too large")
        self.row = row


def check_finite(scores):
    """Raise NotFinite unless all scores are, a list of one a row."""
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            raise NotFinite(row, score)


def answer(s, model, encoding, batch):
    """What the model says to each item of a batch: a "text", or "scores", one for each row."""
    if s.task == "generate":
        prompts = [ids for item in batch for ids, _ in item["rows"]]  # one row each
        stop = s.stop.replace(r"\n", "\n")
        texts = greedy(model, encoding, prompts, s.max_new_tokens, stop)
        return [{"text": text} for text in texts]
    rows = [row for item in batch for row in item["rows"]]
    scores = loglikelihoods(model, rows)
    check_finite(scores)
    scores = iter(scores)
    return [{"scores": list(itertools.islice(scores, len(item["rows"])))} for item in batch]


# -----------------------------------------------------------------------------
# all items, in as many runs of this script as it takes


def answer_all(s, model, encoding, items, partial, subject):
    """The result of each item, in order: [{"item", "seconds", and "scores" or "text"}].

    partial: as open_partial gives it; each batch's results are appended to it."""
    done = finished(partial, items, subject, s.task)
    todo = [i for i in range(len(items)) if i not in done]
    with Progress(s.task, total=len(items), unit="items", done=len(done)) as progress:
        for numbers in batches(items, todo, s.batch_size):
            start = time.perf_counter()
            try:
                answers = answer(s, model, encoding, [items[i] for i in numbers])
            except NotFinite as e:
                item = [i for i in numbers for _ in items[i]["rows"]][e.row]
                raise SystemExit(f"error: model={s.model}: item {item}: {e}")
            seconds = (time.perf_counter() - start) / len(numbers)
            for i, found in zip(numbers, answers):
                done[i] = {"item": i, "seconds": seconds} | found
                partial.write(json.dumps(done[i]).encode() + b"\n")
            partial.flush()
            progress.advance(len(numbers))
    return [done[i] for i in range(len(items))]


def batches(items, todo, size):
    """Lists of up to `size` of the items' numbers `todo`.

    By subject and count of shots, for these begin alike; then the longest first."""

    def beginning(i):
        return items[i].get("subject", ""), items[i].get("dropped", 0)

    def order(i):
        longest = max(len(ids) for ids, _ in items[i]["rows"])
        return beginning(i), -longest

    for _, alike in itertools.groupby(sorted(todo, key=order), key=beginning):
        while batch := list(itertools.islice(alike, size)):
            yield batch


def finished(partial, items, subject, task):
    """{item: result} that an interrupted run left in a file, which is then ready to append to.

    There is none if it is of another subject. What is no result of an item is done again."""
    entries = []
    partial.seek(0)
    lines = partial.read().splitlines()
    for line in lines:
        try:
            entries.append(parse_json(line))
        except ValueError:  # a torn last line
            entries.append(None)
    head = {"subject": subject}  # the file's first line
    if entries and entries[0] != head:
        print(
            f"{partial.name} is of other settings, or the model or the data have changed: "
            "starting anew"
        )
        entries = []
    done = {}
    for entry in entries[1:]:
        if is_result(entry, items, task):
            done[entry["item"]] = entry
    # written anew, without what is no result
    partial.truncate(0)
    for entry in [head, *done.values()]:
        partial.write(json.dumps(entry).encode() + b"\n")
    partial.flush()
    return done


def is_result(entry, items, task):
    """Whether an entry of a file of results is one of an item."""

    def is_finite(x):
        return isinstance(x, (int, float)) and math.isfinite(x)

    if not isinstance(entry, dict) or not is_finite(entry.get("seconds")):
        return False
    i = entry.get("item")
    if type(i) is not int or not 0 <= i < len(items):
        return False
    if task == "generate":
        return isinstance(entry.get("text"), str)
    scores = entry.get("scores")
    right_count = isinstance(scores, list) and len(scores) == len(items[i]["rows"])
    return right_count and all(map(is_finite, scores))


# -----------------------------------------------------------------------------
# what the results, one for each item, amount to


def summary(s, items, results, text_bytes):
    """The figures of a task.

    MMLU's groups and the whole are means over questions, as in the papers, in which large subjects
    weigh more."""
    if s.task == "perplexity":
        return perplexity(items, results, text_bytes)
    more = {
        "shots_dropped": sum(item["dropped"] for item in items),
        "prompts_cut": sum(item["cut"] for item in items),
    }
    answers = [item["answer"] for item in items]
    if s.task == "generate":
        texts = [result["text"] for result in results]
        given = [number(text) for text in texts]
        more["no_number"] = given.count(None)
        more["texts"] = texts
    else:
        scores = [result["scores"] for result in results]
        given = [int(np.argmax(of_item)) for of_item in scores]
        more["ties"] = sum(of_item.count(max(of_item)) > 1 for of_item in scores)  # the first wins
        names = list("ABCD") if s.task == "mmlu" else [x.strip() for x in s.labels.split(",")]
        more["answers_given"] = table(answers, given, names)
    # which are right; of MMLU by subject and group, too
    right = [a == b for a, b in zip(answers, given)]
    if s.task == "mmlu":
        subjects = [item["subject"] for item in items]
        groups = [GROUP_OF.get(subject, "Other") for subject in subjects]
        more["groups"] = shares(right, groups)
        more["subjects"] = shares(right, subjects)
    return share(right) | more


def perplexity(items, results, text_bytes):
    """Nats a token and a byte, over all tokens; the standard error is over windows."""
    n = len(items)
    tokens = np.array([len(item["rows"][0][0]) - 1 for item in items])
    nats = -np.array([result["scores"][0] for result in results])
    mean = float(nats.sum() / tokens.sum())
    error = None
    if n > 1:
        # of a ratio of sums: how far each window is from what its length lets expect
        error = (nats - mean * tokens).std(ddof=1) * n**0.5 / tokens.sum()
    return {
        "n": n,
        "tokens": int(tokens.sum()),
        "bytes": text_bytes,
        "nats_per_token": mean,
        "standard_error": error,
        "perplexity": float(np.exp(mean)) if mean < 700 else None,  # it would be infinite
        "nats_per_byte": nats.sum() / text_bytes if text_bytes else None,
    }


def table(answers, given, names):
    """{name of the right answer: {name of the given one: how often}}."""
    pairs = list(zip(answers, given))
    counts = {}
    for i, name in enumerate(names):
        counts[name] = {other: pairs.count((i, j)) for j, other in enumerate(names)}
    return counts


def share(right):
    """Accuracy of a list of bools, and its standard error."""
    n = len(right)
    p = sum(right) / n
    error = (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else None
    return {"n": n, "accuracy": p, "standard_error": error}


def shares(right, names):
    """{name: share of what has that name}, in the order in which they come."""
    of_name = {}
    for is_right, name in zip(right, names):
        of_name.setdefault(name, []).append(is_right)
    return {name: share(some) for name, some in of_name.items()}


if __name__ == "__main__":
    main(s)
