"""
What the results of a task amount to: a perplexity, or shares of right answers.
"""

import numpy as np

from finetune.evaluation.questions import GROUP_OF, number


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
