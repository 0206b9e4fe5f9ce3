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

The result is a JSON file. Stop at any time: the same command goes on where it stopped.

What is not in 8 bits is as a run saved it (--dtype=auto). Of a Hugging Face model it is float32 on
a CPU and else bfloat16.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import at_least, configure, one_of
from finetune.prepare_sft import encode, prompt_and_completion, records, template
from finetune.tokenizer import Tokenizer
from run.checkpoint import checkpoint_paths, load_model
from run.device import check_device, memory_peak, pick_device
from run.encodings import fingerprint, get_encoding
from run.files import replacing
from run.shards import open_shard
from run.text import valid

# what to evaluate
model = "out"  # a run's folder, a Hugging Face directory or a hub name
task: one_of("perplexity", "choice", "mmlu", "generate") = "perplexity"  # see above
data = ""  # .txt or .bin files (a glob); .jsonl, .tsv, .csv records; MMLU's folder
out = ""  # JSON file for the result; '': eval-TASK.json in the run's folder, or here
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
device = "auto"  # cuda where there is one, else cpu
dtype: one_of("auto", "bfloat16", "float32") = "auto"  # of what is not in 8 bits; auto: see above
weight_bits: one_of(4, 8, 16) = 8  # of a Hugging Face model's matrices; 16: as they are, 4: NF4

LOSS_CHUNK = 512  # tokens whose logits exist at once: 512 x 32000 float32 is 62 MiB

# MMLU's own, categories.py of github.com/hendrycks/test. Unlike in lm-eval, anatomy is Other.
GROUPS = {
    "STEM": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "Social Sciences": """
        econometrics high_school_geography high_school_government_and_politics human_sexuality
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "Humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "Other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}

# (sign, digits): a minus that is no hyphen, a dollar, thousands with commas or without
NUMBER = re.compile(r"((?<![\w)])-\$?|\$-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def main():
    s = configure(sys.modules[__name__])
    try:
        evaluate(s)
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on where it stopped")


def evaluate(s):
    """Do what the settings describe: write the result, and print its figures."""
    if not os.path.exists(s.data) and not glob.glob(s.data):
        raise SystemExit(f"error: data={s.data}: no such file or folder")
    questions = read_questions(s)  # before the model, which takes longer to load

    # the model, and what it is to compute
    kind = pick_device(s.device)
    check_device(kind)
    model, encoding = load(s, kind)
    items, text_bytes = make_items(s, questions, encoding, model.config.block_size)

    # its answers; those of an interrupted run lie beside the result
    path = s.out
    if not path:
        of_run = checkpoint_paths(s.model)
        path = os.path.join(s.model if of_run else "", f"eval-{s.task}.json")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = path + ".partial.jsonl"
    results = answer_all(s, model, encoding, items, partial)

    # what they amount to
    result = summary(s, items, results, text_bytes)
    result["seconds"] = sum(r["seconds"] for r in results)
    result["peak_memory_gib"] = memory_peak(kind)
    result["settings"] = s.as_dict()
    with replacing(path) as f:
        f.write(json.dumps(result, indent=1).encode() + b"\n")
    os.unlink(partial)
    print_figures(path, result)
    for group, part in result.get("groups", {}).items():
        print_figures(group, part)


def load(s, kind):
    """(model, encoding) that the settings name."""
    dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
    try:
        model, name = load_model(s.model, kind, dtype, s.weight_bits)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    return model, get_encoding(name)


def print_figures(name, part):
    figures = [f"{key} {x:.6g}" for key, x in part.items() if isinstance(x, (int, float))]
    print(f"{name}: " + ", ".join(figures))


# -----------------------------------------------------------------------------
# questions: each has its text, the endings that it may have, the answer, and shots before it


def read_questions(s):
    """The questions of a task; of perplexity none."""
    if s.task == "perplexity":
        return []
    if s.task == "mmlu":
        return read_mmlu(s.data, s.shots, s.limit)
    return read_records(s)[: s.limit or None]


def read_records(s):
    """The questions of choice or generate."""
    words = []
    if s.task == "choice":
        words = [word.strip() for word in s.labels.split(",")]
    if words == [""]:
        raise SystemExit(f"error: task {s.task} needs --prompt and --labels")
    if not s.prompt:
        raise SystemExit(f"error: task {s.task} needs --prompt")
    prompt = template("prompt", s.prompt)
    completion = template("completion", s.completion or (" {label}" if words else " {answer}"))

    def questions(path):
        for where, record in records(path, s.columns):
            try:
                yield make_question(record, prompt, completion, words)
            except ValueError as e:
                raise SystemExit(f"error: {path}, {where}: {e}")

    # shots are of their own file, or the first of the questions
    asked = list(questions(s.data))
    if s.shots_data:
        known = list(itertools.islice(questions(s.shots_data), s.shots))
    else:
        known = asked[: s.shots]
        asked = asked[s.shots :]
    if len(known) < s.shots:
        source = s.shots_data or s.data
        raise SystemExit(f"error: {source}: {len(known)} records for {s.shots} shots")
    shots = [shot["text"] + shot["solution"] + "\n\n" for shot in known]
    return [question | {"shots": shots} for question in asked]


def make_question(record, prompt, completion, words):
    """The question in a record of choice, whose labels are `words`, or of generate.

    prompt, completion: templates. Raises ValueError if there is none in it."""
    if isinstance(record, ValueError):
        raise record
    (text, _), (solution, _) = prompt_and_completion(record, prompt, completion, words)
    question = {"text": text, "solution": solution}
    if not words:
        answer = number(solution)
        if answer is None:
            raise ValueError(f"no number in the answer {solution!r}")
        return question | {"endings": [""], "answer": answer}
    # each label's, by the same template
    endings = []
    for i in range(len(words)):
        pieces = prompt_and_completion(record | {"label": i}, prompt, completion, words)
        endings.append(pieces[1][0])
    if "label" not in record:
        raise ValueError("no field 'label'")
    return question | {"endings": endings, "answer": int(record["label"])}


def read_mmlu(folder, shots, limit=0):
    """MMLU's questions, with the benchmark's prompt, less its second space before the subject."""
    questions = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "test", "*_test.csv"))):
        subject = os.path.basename(path).removesuffix("_test.csv")
        if subject not in GROUP_OF:
            print(f"note: {subject} is none of MMLU's 57 subjects: counted under Other")
        # the examples before each question
        known = []
        if shots:
            dev = os.path.join(folder, "dev", f"{subject}_dev.csv")
            for text, letter in itertools.islice(mmlu_examples(dev), shots):
                known.append(f"{text} {letter}\n\n")
            if len(known) < shots:
                raise SystemExit(f"error: {dev}: {len(known)} examples for {shots} shots")
        # the questions
        head = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for text, letter in itertools.islice(mmlu_examples(path), limit or None):
            question = {
                "subject": subject,
                "head": head,
                "shots": known,
                "text": text,
                "answer": "ABCD".index(letter),
                "endings": [" A", " B", " C", " D"],
            }
            questions.append(question)
    return questions


def mmlu_examples(path):
    """Yield (question with its choices, the right letter) of one of MMLU's files."""
    for where, x in records(path, "question,A,B,C,D,answer"):
        why = None
        if isinstance(x, ValueError):
            why = x
        elif x["answer"] not in ("A", "B", "C", "D"):
            why = f"answer {x['answer']!r}, expected A, B, C or D"
        if why:
            raise SystemExit(f"error: {path}, {where}: {why}")
        choices = [f"{letter}. {x[letter]}" for letter in "ABCD"]
        yield "\n".join([x["question"], *choices, "Answer:"]), x["answer"]


def number(text):
    """The number after '####', on that line; else the text's last; else None."""
    marked = text.partition("####")[2].partition("\n")[0]
    found = NUMBER.findall(marked)[:1] or NUMBER.findall(text)[-1:]
    if not found:
        return None
    sign, digits = found[0]
    value = float(digits.replace(",", ""))
    return -value if "-" in sign else value


# -----------------------------------------------------------------------------
# items: what the model computes, each with its rows of tokens (see loglikelihoods)


def make_items(s, questions, encoding, block_size):
    """(items, bytes of perplexity's text): windows of text, or the questions with their rows.

    block_size: the model's."""
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

    Each token is predicted once; a file's first one after bos or end-of-text, as in lm-eval's
    rolling log-likelihood. limit: only so many windows, 0 = all."""
    items = []
    size = 0
    for path in filter(os.path.isfile, sorted(glob.glob(data))):
        tokens = read_tokens(path, encoding)
        first = with_bos(encoding, []) or [encoding.eot_token]
        ids = np.concatenate([first, tokens]).astype(np.int64)
        starts = range(0, len(ids) - 1, block_size)
        if limit:
            starts = starts[: limit - len(items)]
        for start in starts:
            # one token more: it is only predicted
            items.append({"rows": [(ids[start : start + block_size + 1], 1)]})
        size += count_bytes(ids[1 : len(starts) * block_size + 1], encoding)
    return items, size


def read_tokens(path, encoding):
    """The tokens of a text file, or of a shard."""
    if not path.endswith(".bin"):
        text = np.fromfile(path, np.uint8).tobytes().decode("utf-8", "replace")
        return encoding.encode_ordinary(text)
    shard = open_shard(path)
    other_size = shard.n_vocab not in (0, encoding.n_vocab)
    other_vocabulary = shard.fingerprint not in (0, fingerprint(encoding))
    if shard.row or other_size or other_vocabulary:
        raise SystemExit(
            f"error: {path}: made by finetune.prepare_sft, "
            "or with another encoding than the model's"
        )
    return shard.tokens


def count_bytes(ids, encoding):
    """Bytes of the text of ids (T,), end-of-text left out."""
    text = ids[ids != encoding.eot_token]
    size = 0
    for i in range(0, len(text), 10**6):  # lists of Python integers take memory
        size += len(encoding.decode(text[i : i + 10**6].tolist()).encode())
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
        idx = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
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


def answer(s, model, encoding, batch):
    """What the model says to each item of a batch: a "text", or "scores", one for each row."""
    if s.task == "generate":
        prompts = [ids for item in batch for ids, _ in item["rows"]]  # one row each
        stop = s.stop.replace(r"\n", "\n")
        texts = greedy(model, encoding, prompts, s.max_new_tokens, stop)
        return [{"text": text} for text in texts]
    rows = [row for item in batch for row in item["rows"]]
    scores = iter(loglikelihoods(model, rows))
    return [{"scores": list(itertools.islice(scores, len(item["rows"])))} for item in batch]


# -----------------------------------------------------------------------------
# all items, in as many runs of this script as it takes


def answer_all(s, model, encoding, items, path):
    """The result of each item, in order: [{"item", "seconds", and "scores" or "text"}].

    path: the file of results so far, of an interrupted run; each batch is appended to it."""
    done = finished(path, hash_of(s))
    todo = [i for i in range(len(items)) if i not in done]
    bar = tqdm(total=len(items), initial=len(done), desc=s.task, mininterval=1)
    with open(path, "a") as f, bar:
        for numbers in batches(items, todo, s.batch_size):
            start = time.time()
            answers = answer(s, model, encoding, [items[i] for i in numbers])
            seconds = (time.time() - start) / len(numbers)
            for i, found in zip(numbers, answers):
                done[i] = {"item": i, "seconds": seconds} | found
                f.write(json.dumps(done[i]) + "\n")
            f.flush()
            bar.update(len(numbers))
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


def finished(path, key):
    """{item: result} of an interrupted run, in a file that is then ready to append to.

    There is none if its settings' hash is not `key`."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # a torn last line
                entries.append(json.loads(line))
    head = {"settings": key}  # the file's first line
    if entries and entries[0] != head:
        print(
            f"{path} is of other settings, or the model or the data have changed: starting anew"
        )
        entries = []
    # written anew, without a torn line
    entries = entries or [head]
    with replacing(path) as f:
        f.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
    return {entry["item"]: entry for entry in entries[1:]}


def hash_of(s):
    """A hash of what the result depends on.

    That is settings, and sizes and times of the data's and the model's files."""
    files = []
    for pattern in (s.data, f"{s.data}/*/*.csv", s.shots_data, f"{s.model}/*.safetensors"):
        files += sorted(glob.glob(pattern))
    files += checkpoint_paths(s.model)[:1]
    stats = []
    for path in filter(os.path.isfile, files):
        stats.append((path, os.path.getsize(path), os.stat(path).st_mtime_ns))
    settings = s.as_dict() | {"out": "", "batch_size": 0, "device": ""}
    return hashlib.sha256(json.dumps([settings, stats]).encode()).hexdigest()[:16]


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
        given = [int(np.argmax(result["scores"])) for result in results]
        names = list("ABCD") if s.task == "mmlu" else s.labels.split(",")
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
    mean = nats.sum() / tokens.sum()
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
        "perplexity": float(np.exp(mean)),
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
    main()
