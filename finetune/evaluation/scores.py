"""
What a model says of rows of tokens: how likely their ends are, or what it would write itself.
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F

LOSS_CHUNK = 512  # tokens whose logits exist at once: 512 x 32000 float32 is 62 MiB


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
