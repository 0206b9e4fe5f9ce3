r"""
Evaluate a model: a run's folder, a Hugging Face directory or a hub name:
    python eval.py --model=out --task=perplexity --data=wiki.test.txt     # nats a token and a byte; or 'x_val_*.bin'
    python eval.py --model=out --task=choice --data=sst2/dev.tsv --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:'
    python eval.py --model=out --task=mmlu --data=mmlu --shots=5          # its dev/*_dev.csv and test/*_test.csv
    python eval.py --model=out --task=generate --data=gsm8k.jsonl --shots=8 --prompt='Question: {question}\nAnswer:'

The result is a JSON file. Stop at any time: the same command goes on where it stopped.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels import layers
from run.checkpoint import load_model, paths
from configurator import configure
from run.device import memory_peak
from run.shards import open_shard, replacing
from finetune.prepare_sft import encode, prompt_and_completion, records, template
from run.encodings import fingerprint, get_encoding, valid

# -----------------------------------------------------------------------------
model = "out"  # a run's folder, a Hugging Face directory or a hub name
task = "perplexity"  # of text; choice: the likeliest of some labels; mmlu; generate: a number, as in GSM8K
data = ""  # .txt or .bin files (a glob); .jsonl, .tsv, .csv records; MMLU's folder
out = ""  # JSON file for the result; '': eval-TASK.json in the run's folder, or here
limit = 0  # only the first n items (windows; records; questions of each subject), 0 = all
batch_size = 8  # items at once; changes speed and memory alone
block_size = 0  # the context's tokens, 0 = the model's
columns = ""  # names of a headerless .tsv's or .csv's columns; '': its first line names them
prompt = ""  # of choice and generate, over a record's fields as in prepare_sft.py, like 'Question: {question}\nAnswer:'
completion = ""  # what follows it; '': ' {label}' in choice, ' {answer}' in generate
labels = ""  # the words of choice's field `label` 0, 1, ..., like negative,positive
shots = 0  # examples before each question: of MMLU's dev/, else the first of shots_data
shots_data = ""  # '': the first records of data, which are then not asked
max_new_tokens = 256  # of an answer of generate
stop = "Question:"  # it ends before this; '': at end-of-text alone
device = "auto"
dtype = "auto"  # of what is not in 8 bits; auto: as a run saved it; for Hugging Face's float32 on a CPU, else bfloat16
weight_bits = 8  # of a Hugging Face model's linear layers: 8, or 16: as they are
# -----------------------------------------------------------------------------

# MMLU's own (categories.py of github.com/hendrycks/test), where, unlike in lm-eval, anatomy is Other
GROUPS = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics
        high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "Social Sciences": """econometrics high_school_geography high_school_government_and_politics human_sexuality
        high_school_macroeconomics high_school_microeconomics high_school_psychology professional_psychology
        public_relations security_studies sociology us_foreign_policy""",
    "Humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "Other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"""}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}
_number = re.compile(r"((?<![\w)])-\$?|\$-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


@torch.inference_mode()
def loglikelihoods(model, rows):
    """log p(ids[start:] | ids[:start]) in nats, a float for each of rows, (ids (T,) int64 array, start >= 1).

    Rows with one input are computed once (choices of one token), and so is what all inputs begin with (MMLU's
    examples): in a cache, which the rest of each follows, padded on the right, where causal attention does not look.
    Logits exist for ids[start:] alone, layers.LOSS_CHUNK tokens at a time."""
    device, caches = model.norm.weight.device, None
    inputs = {ids[:-1].tobytes(): ids[:-1] for ids, _ in rows}
    line_of, inputs = {key: i for i, key in enumerate(inputs)}, list(inputs.values())
    shared, length = min(start - 1 for _, start in rows) if len(inputs) > 1 else 0, max(map(len, inputs))
    shared = len(os.path.commonprefix([ids[:shared].tolist() for ids in inputs]))  # of any lists
    if shared:
        caches = [{} for _ in model.blocks]
        model.hidden(torch.from_numpy(inputs[0][None, :shared]).to(device), caches=caches)
    idx = torch.from_numpy(np.array([np.pad(ids[shared:], (0, length - len(ids))) for ids in inputs])).to(device)
    wanted = np.array([(n, line_of[ids[:-1].tobytes()], t - 1 - shared, ids[t])
                       for n, (ids, start) in enumerate(rows) for t in range(start, len(ids))])
    row, line, place, target = torch.from_numpy(wanted).to(device).T
    h = model.hidden(idx, caches=caches, position=shared)[line, place]  # (N, C)
    losses = torch.cat([F.cross_entropy(model.logits(x), t, reduction="none")  # logits (chunk, V) float32
                        for x, t in zip(h.split(layers.LOSS_CHUNK), target.split(layers.LOSS_CHUNK))])
    return np.bincount(row.cpu().numpy(), -losses.cpu().numpy()).tolist()  # sums in float64


@torch.inference_mode()
def greedy(model, encoding, prompts, max_new_tokens, stop=""):
    """The likeliest tokens, one by one, after each of prompts ((T,) int64 arrays), as text: up to max_new_tokens, to
    end-of-text, or to the string `stop`, neither included. Prompts are padded on the left, and the padding is another
    document, which the text does not see."""
    device, length = model.norm.weight.device, max(map(len, prompts))
    idx = torch.tensor(np.array([np.pad(ids, (length - len(ids), 0)) for ids in prompts]), device=device)  # (B, T)
    documents = torch.tensor([[int(t >= length - len(ids)) for t in range(length)] for ids in prompts], device=device)
    documents = None if documents.all() else documents  # no padding, no mask
    caches, position, new, ended = [{} for _ in model.blocks], 0, [[] for _ in prompts], [False] * len(prompts)
    tail = len(stop.encode()) + 1  # a token is a byte at least, so that these hold a stop that the last one completes
    for _ in range(max_new_tokens):
        h = model.hidden(idx, caches=caches, position=position, documents=documents)
        position += idx.shape[1]
        idx = model.logits(h[:, -1])[:, : encoding.n_vocab].argmax(dim=-1, keepdim=True)  # vocab_size may be padded
        documents = None if documents is None else torch.ones_like(idx)
        for i, token in enumerate(idx[:, 0].tolist()):
            if not ended[i]:
                new[i].append(token)
                ended[i] = token == encoding.eot_token or stop != "" and stop in encoding.decode(new[i][-tail:])
        if all(ended):
            break
    texts = [encoding.decode([token for token in ids if token != encoding.eot_token]) for ids in new]
    return [text.partition(stop)[0] if stop else text for text in texts]


def number(text):
    """The number after '####', on that line; else the text's last; else None."""
    found = _number.findall(text.partition("####")[2].partition("\n")[0])[:1] or _number.findall(text)[-1:]
    return float("-" * ("-" in found[0][0]) + found[0][1].replace(",", "")) if found else None


def read_records(config):
    """The questions of choice or generate."""
    words = [word.strip() for word in config["labels"].split(",")] if config["task"] == "choice" else []
    if not config["prompt"] or words == [""]:
        raise SystemExit(f"error: task {config['task']} needs --prompt" + " and --labels" * (words == [""]))
    prompt = template("prompt", config["prompt"])
    completion = template("completion", config["completion"] or (" {label}" if words else " {answer}"))

    def questions(path):
        for where, record in records(path, config["columns"]):
            try:
                if isinstance(record, ValueError):
                    raise record
                (text, _), (solution, _) = prompt_and_completion(record, prompt, completion, words)
                endings = [prompt_and_completion(record | {"label": i}, prompt, completion, words)[1][0]
                           for i in range(len(words))]
                answer = int(record["label"]) if words else number(solution)
                if answer is None:
                    raise ValueError(f"no number in the answer {solution!r}")
            except (ValueError, KeyError) as e:
                raise SystemExit(f"error: {path}, {where}: {'no field ' * isinstance(e, KeyError)}{e}")
            yield {"text": text, "solution": solution, "endings": endings or [""], "answer": answer}

    asked, n, source = list(questions(config["data"])), config["shots"], config["shots_data"]
    shots = list(itertools.islice(questions(source), n)) if source else asked[:n]
    if len(shots) < n:
        raise SystemExit(f"error: {source or config['data']}: {len(shots)} records for {n} shots")
    shots = [shot["text"] + shot["solution"] + "\n\n" for shot in shots]
    return [x | {"shots": shots} for x in asked[0 if source else n :]]


def read_mmlu(folder, shots, limit=0):
    """MMLU's questions, with the benchmark's prompt, less its second space before the subject."""
    def examples(path):
        for where, x in records(path, "question,A,B,C,D,answer"):
            if isinstance(x, ValueError) or x["answer"] not in ("A", "B", "C", "D"):
                why = x if isinstance(x, ValueError) else f"answer {x['answer']!r}, expected A, B, C or D"
                raise SystemExit(f"error: {path}, {where}: {why}")
            yield "\n".join([x["question"], *(f"{letter}. {x[letter]}" for letter in "ABCD"), "Answer:"]), x["answer"]

    questions = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "test", "*_test.csv"))):
        subject = os.path.basename(path).removesuffix("_test.csv")
        if subject not in GROUP_OF:
            print(f"note: {subject} is none of MMLU's 57 subjects: counted under Other")
        dev = os.path.join(folder, "dev", f"{subject}_dev.csv")
        known = [f"{text} {answer}\n\n" for text, answer in itertools.islice(examples(dev), shots)] if shots else []
        if len(known) < shots:
            raise SystemExit(f"error: {dev}: {len(known)} examples for {shots} shots")
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        questions += [{"subject": subject, "head": head, "shots": known, "text": text, "answer": "ABCD".index(answer),
                       "endings": [" A", " B", " C", " D"]}
                      for text, answer in itertools.islice(examples(path), limit or None)]
    return questions


def fit(question, encoding, room):
    """Give a question its rows (see loglikelihoods), an ending each, of up to `room` tokens: shots are dropped, the
    first ones first, then the text is cut on the left."""
    for dropped in range(len(question["shots"]) + 1):
        text = question.get("head", "") + "".join(question["shots"][dropped:]) + question["text"]
        pairs = [encode(encoding.encode_ordinary, [(valid(text), False), (valid(ending), True)])
                 for ending in question["endings"]]
        rows = [(np.array(getattr(encoding, "with_bos", list)(ids), np.int64), sum(flags)) for ids, flags in pairs]
        over = max(len(ids) for ids, _ in rows) - room
        if over <= 0:
            break
    rows = [(ids[-room:], min(len(ids), room) - count) for ids, count in rows]
    if any(start < 1 or start == len(ids) and ending for (ids, start), ending in zip(rows, question["endings"])):
        raise SystemExit(f"error: {text[-60:]!r}: an empty prompt, or its completion has more than {room} tokens")
    return question | {"rows": rows, "dropped": dropped, "cut": over > 0}


def windows(data, encoding, block_size, limit=0):
    """(items, bytes of text) of perplexity: windows of block_size tokens, stride block_size, so that each token is
    predicted once; a file's first one after bos or end-of-text, as in lm-eval's rolling log-likelihood."""
    items, size, mark = [], 0, fingerprint(encoding)
    for path in filter(os.path.isfile, sorted(glob.glob(data))):
        if path.endswith(".bin"):
            shard = open_shard(path)
            if shard.row or shard.n_vocab not in (0, encoding.n_vocab) or shard.fingerprint not in (0, mark):
                raise SystemExit(f"error: {path}: made by prepare_sft.py, or with another encoding than the model's")
            tokens = shard.tokens
        else:
            tokens = encoding.encode_ordinary(np.fromfile(path, np.uint8).tobytes().decode("utf-8", "replace"))
        ids = np.concatenate([getattr(encoding, "with_bos", list)([]) or [encoding.eot_token], tokens]).astype(np.int64)
        starts = range(0, len(ids) - 1, block_size)[: limit - len(items) if limit else None]
        items += [{"rows": [(ids[s : s + block_size + 1], 1)]} for s in starts]
        text = ids[1 : len(starts) * block_size + 1]
        text = text[text != encoding.eot_token]
        size += sum(len(encoding.decode(text[i : i + 10**6].tolist()).encode()) for i in range(0, len(text), 10**6))
    return items, size


def batches(items, todo, size):
    """Lists of up to `size` of the items' numbers todo, by subject and count of shots, then the longest first."""
    start = {i: (items[i].get("subject", ""), items[i].get("dropped", 0)) for i in todo}
    todo = sorted(todo, key=lambda i: (start[i], -max(len(ids) for ids, _ in items[i]["rows"])))
    for _, alike in itertools.groupby(todo, key=start.get):
        while batch := list(itertools.islice(alike, size)):
            yield batch


def finished(path, key):
    """{item: result} of an interrupted evaluation, none if its settings' hash is not `key`, in a file to append to."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        for line in f:
            with contextlib.suppress(ValueError):  # a torn last line
                entries.append(json.loads(line))
    if entries and entries[0] != {"settings": key}:
        print(f"{path} is of other settings, or the model or the data have changed: starting anew")
        entries = []
    with replacing(path) as f:
        f.writelines(json.dumps(entry).encode() + b"\n" for entry in entries or [{"settings": key}])
    return {entry["item"]: entry for entry in entries[1:]}


def hash_of(config):
    """A hash of what the result depends on: settings, and sizes and times of the model's and the data's files."""
    names = "{data}", "{data}/*/*.csv", "{shots_data}", "{model}/*.safetensors"
    files = [path for name in names for path in sorted(glob.glob(name.format_map(config)))] + paths(config["model"])[:1]
    stats = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files if os.path.isfile(path)]
    chosen = config | {"out": "", "batch_size": 0, "device": ""}
    return hashlib.sha256(json.dumps([chosen, stats]).encode()).hexdigest()[:16]


def share(right):
    """Accuracy of a list of bools, and its standard error."""
    n, p = len(right), sum(right) / len(right)
    return {"n": n, "accuracy": p, "standard_error": (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else None}


def summary(task, items, results, size=0, labels=""):
    """What the results, one for each item, amount to. size: bytes of perplexity's text. MMLU's groups and the whole are
    means over questions, as in the papers, in which large subjects weigh more."""
    if task == "perplexity":
        tokens = np.array([len(item["rows"][0][0]) - 1 for item in items])
        nats, n = -np.array([result["scores"][0] for result in results]), len(items)
        mean = nats.sum() / tokens.sum()
        error = (nats - mean * tokens).std(ddof=1) * n**0.5 / tokens.sum() if n > 1 else None
        return {"n": n, "tokens": int(tokens.sum()), "bytes": size, "nats_per_token": mean, "standard_error": error,
                "perplexity": float(np.exp(mean)), "nats_per_byte": nats.sum() / size if size else None}
    more = {"shots_dropped": sum(item["dropped"] for item in items), "prompts_cut": sum(item["cut"] for item in items)}
    if task == "generate":
        found = [number(result["text"]) for result in results]
        right = [x == item["answer"] for x, item in zip(found, items)]
        more |= {"no_number": found.count(None), "texts": [result["text"] for result in results]}
    else:
        pairs = [(item["answer"], int(np.argmax(result["scores"]))) for item, result in zip(items, results)]
        right, names = [a == b for a, b in pairs], list("ABCD") if task == "mmlu" else labels.split(",")
        more["answers_given"] = {name: {other: pairs.count((i, j)) for j, other in enumerate(names)}
                                 for i, name in enumerate(names)}
    for kind in ("group", "subject") if task == "mmlu" else ():
        of = [GROUP_OF.get(item["subject"], "Other") if kind == "group" else item["subject"] for item in items]
        more[f"{kind}s"] = {name: share([r for r, x in zip(right, of) if x == name]) for name in dict.fromkeys(of)}
    return share(right) | more


def main():
    config = configure(globals())
    for name, known in (("task", "perplexity choice mmlu generate"), ("dtype", "auto bfloat16 float32")):
        if config[name] not in known.split():
            raise SystemExit(f"error: {name} {config[name]!r}: there are {known}")
    if min(batch_size, max_new_tokens) < 1 or min(limit, shots, block_size) < 0:
        raise SystemExit("error: batch_size and max_new_tokens are at least 1; limit, shots and block_size at least 0")
    if not os.path.exists(data) and not glob.glob(data):
        raise SystemExit(f"error: data={data}: no such file or folder")
    items = []  # before the model, which takes longer to load
    if task != "perplexity":
        items = read_mmlu(data, shots, limit) if task == "mmlu" else read_records(config)[: limit or None]
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        net, name = load_model(model, kind, None if dtype == "auto" else getattr(torch, dtype), weight_bits)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    encoding, window, size = get_encoding(name), block_size or net.config.block_size, 0
    room = window - max_new_tokens if task == "generate" else window + 1  # whose last token is only predicted
    if window > net.config.block_size or room < 1:
        raise SystemExit(f"error: block_size {window}: the model's is {net.config.block_size}; max_new_tokens is less")
    if task == "perplexity":
        items, size = windows(data, encoding, window, limit)
    items = [fit(item, encoding, room) if "rows" not in item else item for item in items]
    if not items:
        raise SystemExit(f"error: data={data}: there is nothing in it for task {task}")
    path = out or os.path.join(model if paths(model) else "", f"eval-{task}.json")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    done = finished(partial := path + ".partial.jsonl", hash_of(config))
    todo = [i for i in range(len(items)) if i not in done]
    with open(partial, "a") as f, tqdm(total=len(items), initial=len(done), desc=task, mininterval=1) as bar:
        for batch in batches(items, todo, batch_size):
            start, rows = time.time(), [items[i]["rows"] for i in batch]
            if task == "generate":
                prompts, end = [ids for ((ids, _),) in rows], stop.replace(r"\n", "\n")
                answers = [{"text": text} for text in greedy(net, encoding, prompts, max_new_tokens, end)]
            else:
                scores = iter(loglikelihoods(net, list(itertools.chain(*rows))))
                answers = [{"scores": list(itertools.islice(scores, len(x)))} for x in rows]
            for i, answer in zip(batch, answers):
                done[i] = {"item": i, "seconds": (time.time() - start) / len(batch)} | answer
                f.write(json.dumps(done[i]) + "\n")
            f.flush()
            bar.update(len(batch))
    results = [done[i] for i in range(len(items))]
    result = summary(task, items, results, size, labels) | {
        "seconds": sum(r["seconds"] for r in results), "peak_memory_gib": memory_peak(kind), "settings": config}
    with replacing(path) as f:
        f.write(json.dumps(result, indent=1).encode() + b"\n")
    os.unlink(partial)
    for name, part in {path: result, **result.get("groups", {})}.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.6g}" for k, v in part.items() if isinstance(v, (int, float))))


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on where it stopped")
