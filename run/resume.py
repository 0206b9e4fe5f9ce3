"""
A run that goes on: what of its settings must agree, may change, or follows its checkpoint.

Each setting of train.py is of one of three kinds:

    OF_START     of this start alone: where and how long it runs, what it shows. As given now
    MUST_AGREE   what weights, moments and the place in the data mean. Refused if it differs
    all others   may change: taken as given now, and said

What the user gives neither by flag nor by file follows the checkpoint, so that
`python train.py --out_dir=out --init_from=resume` is enough.
"""

import os

from methods.registry import find
from run.checkpoint import checkpoint_paths, load_checkpoint, restoring
from run.show import say

OF_START = ("out_dir", "init_from", "eval_only", "dry_run", "max_minutes", "device",
            "rank_timeout", "sample_tokens", "data_input", "keep_checkpoints", "wandb_log",
            "tensorboard_log", "project")
MUST_AGREE = ("method", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "vocab_size",
              "rope_theta", "tie_embedding", "weight_bits", "weight_group_size", "embed_bits",
              "freeze_embedding", "rank", "lora_alpha", "proj_gap", "proj_bits", "proj_side",
              "proj_svd", "moments", "block_size", "encoding", "dtype", "seed")
IN_GROUPS = ("betas", "eps", "weight_decay")  # of the settings, those in an optimizer's groups


def checkpoint_to_resume(s):
    """The checkpoint that a run goes on from, or None. s.init_from "auto" becomes what is meant.

    Without init_from, an evaluation alone is of the run that is there."""
    start, _, otherwise = s.init_from.partition(":")
    if start == "auto" or s.eval_only and "init_from" not in s.given:
        s.init_from = "resume" if checkpoint_paths(s.out_dir) else otherwise or "scratch"
        if s.eval_only and s.init_from == "scratch":  # nobody asks for random weights
            raise SystemExit(f"error: eval_only: there is no checkpoint in {s.out_dir}: name a "
                             "run's folder with --out_dir, or a model with --init_from")
    return load_checkpoint(s.out_dir) if s.init_from == "resume" else None


def follow(s, checkpoint):
    """Put into s what a checkpoint says of settings that the user did not give."""
    config = checkpoint["config"]
    followed = []
    for name, now in s.as_dict().items():
        before = config.get(name, now)  # a setting may be newer than the checkpoint
        if name in OF_START or name in s.given or before == now or name == "threads":
            continue  # threads: of this machine
        if type(before) is not type(now):
            raise SystemExit(
                f"error: {checkpoint['path']}: its {name} is {before!r}, nothing like {now!r}"
            )
        setattr(s, name, before)
        if now not in ("", "auto", 0):  # which stand for what the run then takes
            followed.append(f"{name} = {before}")
    if followed:
        say(f"note: as in the checkpoint: {', '.join(followed)}")
    refuse_other(s, checkpoint, ["method"])  # which settles the others


def agree(s, checkpoint):
    """Say which settings change. Exits with one line if one differs that must agree.

    s: settled settings."""
    refuse_other(s, checkpoint, [*MUST_AGREE, *find(s.method).in_weights])
    for name, now in s.as_dict().items():
        before = checkpoint["config"].get(name, now)
        if before != now and name not in OF_START:
            say(f"note: {name} = {now!r}; the checkpoint was trained with {before!r}")


def refuse_other(s, checkpoint, names):
    """Exit with one line if a setting of `names` is not the checkpoint's."""
    for name in names:
        now = getattr(s, name)
        before = checkpoint["config"].get(name, now)
        if before != now:
            raise SystemExit(
                f"error: {checkpoint['path']} was trained with {name} = {before!r}, this run has "
                f"{now!r}: leave it out to go on, or train from scratch in another out_dir"
            )


def restore(run, checkpoint):
    """Go on where a checkpoint was made, with the optimizer's settings of now."""
    path = checkpoint["path"]
    fresh = [dict(group) for group in run.optimizer.param_groups]
    with restoring(path):
        run.model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        # torch's optimizers take these from the state, too
        for group, now in zip(run.optimizer.param_groups, fresh):
            group.update({name: now[name] for name in IN_GROUPS if name in now})
    run.it = checkpoint["iter"]
    run.saved = f"{path} has step {run.it}"
    say(f"{path}: goes on at step {run.it:,} of {run.s.max_iters:,}")
    # the place in the data is a number of windows, of these shards
    run.train_data.position = checkpoint["position"]
    if checkpoint.get("shards", shards_of(run.train_data)) != shards_of(run.train_data):
        run.train_data.position = 0
        say(f"note: {run.s.data_dir} holds other shards than those that the checkpoint's run "
                 "read: reading begins anew")


def shards_of(windows):
    """[[file's name, its windows]]: what tells data sets apart, wherever they lie."""
    names = map(os.path.basename, windows.paths)
    return [list(pair) for pair in zip(names, windows.sizes)]
