"""
Direct preference optimisation (arXiv 2305.18290): train.py's loss where dpo_beta is above 0.

Of a prompt x there are two answers, a chosen one y_w and a rejected one y_l. The loss, equation 7,
is that of telling them apart by how far the model pi has moved from its start pi_ref:

    L = -log sigmoid(r_w - r_l)        r = beta * log(pi(y | x) / pi_ref(y | x)), the reward of y

log pi(y | x) is a sum over y's tokens. Its gradient with respect to that sum is -beta *
sigmoid(r_l - r_w) for the chosen answer, and the same without the minus for the rejected one. Both
are needed before either can go back, so a row of a shard holds whole pairs. From there on it is an
ordinary loss: weights step in backward, and micro-batches add up.

pi_ref never changes. attach() takes its log-probabilities once, by the model as it is before its
first step, and leaves them beside the shards, 8 bytes a pair: no second model is in memory.
"""

import copy
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from kernels.loss import token_losses
from run.files import check_file, replacing
from run.show import Progress, say
from run.shards import open_shard
from run.text import first_line


class PreferenceLoss:
    """DPO's loss, to be called in the place of a LLaMA's loss().

    beta: how dearly the model pays for leaving pi_ref. reference: log pi_ref of all examples,
    (examples,) float32. ranks: run/ranks.py's."""

    def __init__(self, model, beta, reference, ranks):
        self.model = model
        self.beta = beta
        self.reference = reference
        self.ranks = ranks
        # of pairs since they were last asked for, in validation and in training: how many, how many
        # with r_w > r_l, the sums of r_w and of r_l
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=reference.device)

    def __call__(self, h, targets, documents):
        """The mean loss of a batch's pairs, ().

        h (B, T, C): the last norm's output. targets (B, T): -1 does not count. documents (B, T):
        the examples' numbers, as run/data.py counts them; on the host, as attention reads them."""
        examples, log_p = log_probabilities(self.model, h, targets, documents)  # (2 P,) each
        rewards = self.beta * (log_p - self.reference[examples - 1])
        chosen, rejected = rewards.view(-1, 2).unbind(1)  # (P,) each
        is_training = int(torch.is_grad_enabled())
        with torch.no_grad():
            of_pairs = torch.ones_like(chosen), chosen > rejected, chosen, rejected
            self.sums[is_training] += torch.stack([t.double() for t in of_pairs]).sum(1)
        return -F.logsigmoid(chosen - rejected).mean()

    def figures(self, prefix):
        """{name: number} of all ranks' pairs since the last call: the share of pairs whose chosen
        answer has the larger reward, and means of rewards. prefix: "" for those trained on, "val_"
        for those that were evaluated."""
        sums = self.sums[int(not prefix)]
        pairs, right, chosen, rejected = map(self.ranks.total, sums.tolist())  # a sync point
        sums.zero_()
        means = {"accuracy": right, "margin": chosen - rejected, "chosen": chosen,
                 "rejected": rejected}
        return {f"{prefix}reward_{name}": total / max(1, pairs) for name, total in means.items()}


def log_probabilities(model, h, targets, documents):
    """(numbers of the examples of a batch, in their order; log pi of their targets), (E,) each.

    Arguments: as for PreferenceLoss."""
    counts = targets >= 0  # (B, T)
    numbers = documents.to(h.device)[counts]  # (N,) of N targets
    softcap = model.config.logit_softcap
    log_p = -token_losses(h[counts], model.head_rows(), targets[counts], softcap)  # (N,)
    examples = numbers.unique()  # sorted
    # a sum in a fixed order, where index_add_ on a GPU has none
    return examples, torch.where(numbers == examples[:, None], log_p, 0.0).sum(1)


# -----------------------------------------------------------------------------
# the reference


def attach(run, checkpoint):
    """Give a run of train.py the loss of preferences; returns its figures(). checkpoint: that the
    run goes on from, or None.

    The reference is found beside the shards, or made: a run that goes on cannot make it, as its
    model has moved. Exits with one line if there is none."""
    s = run.s
    if checkpoint is None:
        s.reference = fingerprint(run.model, s.dtype)
    elif "reference" not in checkpoint["config"]:
        raise SystemExit(
            f"error: {checkpoint['path']} was trained without dpo_beta, and has no reference: "
            "export it (finetune.hf), and start from there with --init_from"
        )
    else:
        s.reference = checkpoint["config"]["reference"]
    # an example of validation has its number after those to train on
    train, val = run.train_data, run.val_data
    val.before = [before + train.examples for before in val.before]
    count = train.examples + val.examples

    shards = [*train.paths, *val.paths]
    path = os.path.join(s.data_dir, f"reference_{s.reference}_{contents_of(shards)}.npy")
    if run.ranks.any(not os.path.exists(path)):
        if checkpoint is not None:
            raise SystemExit(
                f"error: there is no {path}: log-probabilities of these pairs by the model that "
                f"{checkpoint['path']} started from; set data_dir to that run's, or bring them back"
            )
        write(path, of_all_pairs(run, count))
    reference = torch.from_numpy(read(path, count)).to(s.device)
    loss = PreferenceLoss(run.model, s.dpo_beta, reference, run.ranks)
    run.model.loss = loss
    return loss.figures


def fingerprint(model, dtype):
    """A text that tells a model's weights, as they are now, and the dtype it computes in."""
    digest = hashlib.blake2b(dtype.encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def contents_of(paths):
    """A text that tells what is in shards, in their order, whatever their names."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        shard = open_shard(path)
        digest.update(shard.tokens)
        digest.update(shard.flags)
    return digest.hexdigest()


@torch.no_grad()
def of_all_pairs(run, count):
    """log pi of all `count` examples of a run, (count,) float32, by its model as it is now.

    Each rank takes its share of the rows."""
    s, ranks = run.s, run.ranks
    reference = torch.zeros(count, device=s.device)
    say("the reference: log-probabilities of all pairs, by the model that training starts from")
    for windows in (run.train_data, run.val_data):
        windows = copy.copy(windows)
        windows.seed = None  # in the order of the files
        windows.epoch = None
        starts = range(ranks.rank * s.batch_size, windows.total, ranks.size * s.batch_size)
        progress = Progress("reference", len(starts), "batches", shown=ranks.rank == 0)
        for start in progress.over(starts):
            windows.position = start
            batch = windows.batch(min(s.batch_size, windows.total - start))
            x, y, documents = run.on_device(batch)
            with run.autocast:
                h = run.model.hidden(x, documents=documents)
                examples, log_p = log_probabilities(run.model, h, y, documents)
            reference[examples - 1] = log_p
    reference *= ranks.loss_scale  # a power of two, by which sum_ divides
    totals = []
    ranks.sum_(reference, totals.append)  # an example is one rank's, and 0 elsewhere
    ranks.land()
    return totals[0].cpu().numpy()


def write(path, reference):
    """Exits with one line if it cannot be written, or is not finite."""
    if not np.isfinite(reference).all():
        raise SystemExit(
            "error: log-probabilities by the starting model are not finite: is it whole?"
        )
    try:
        with replacing(path) as f:
            np.save(f, reference)
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}")


def read(path, count):
    """log pi_ref of `count` examples, (count,) float32. Exits with one line if the file is none."""
    try:
        check_file(path)
        with open(path, "rb") as f:
            reference = np.lib.format.read_array(f, allow_pickle=False)
        if reference.shape != (count,) or reference.dtype != np.float32:
            raise ValueError(f"{reference.dtype} {reference.shape}, not float32 ({count},)")
        if not np.isfinite(reference).all():
            raise ValueError("it has numbers that are not finite")
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}")
    except (ValueError, EOFError) as e:
        raise SystemExit(f"error: {path} is damaged: {first_line(e)}; delete it, and a new run "
                         "makes it again")
    return reference
