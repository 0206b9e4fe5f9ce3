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

from finetune.evaluation.questions import check, read_questions

if __name__ == "__main__":  # torch takes seconds to load: what is mistyped is said before
    check(s)

import glob
import hashlib
import itertools
import json
import os
import re
import time

import torch

from finetune.evaluation.figures import summary
from finetune.evaluation.items import make_items
from finetune.evaluation.results import finished, open_partial
from finetune.evaluation.scores import NotFinite, check_finite, greedy, loglikelihoods
from run.checkpoint import checkpoint_paths, load_model
from run.device import check_device, memory_peak, pick_device
from run.encodings import get_encoding
from run.files import check_file, parse_json, replacing
from run.finite import first_not_finite
from run.records import matching
from run.show import Progress
from run.text import first_line


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


if __name__ == "__main__":
    main(s)
