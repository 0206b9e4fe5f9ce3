"""
A run's checkpoints: ckpt.pt is the newest, ckpt-1.pt the one before it, and so on.

torch.save writes one tensor after the other and brings each from the GPU when its turn comes, so
that host memory never holds a second copy of the model: at 7B 10.1 GB go to disk, and the largest
tensor is 0.4.
"""

import os
import re
import zipfile
from dataclasses import fields
from functools import partial

import torch

from configurator import Settings
from methods.registry import find
from model import LLaMAConfig
from run import foreign
from run.files import replacing

FORMAT = 3  # raised when what a checkpoint holds changes
SHAPE_KEYS = ("method", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "vocab_size",
              "rope_theta", "tie_embedding", "weight_bits", "weight_group_size", "rank",
              "lora_alpha", "proj_bits", "moments", "freeze_embedding", "embed_bits",
              "proj_side")
OF_RUN = ("block_size", "checkpoint_activations", "checkpoint_bits")  # no checkpoint brings these


class Damaged(SystemExit):
    """A file that is no whole checkpoint; the one before it may be."""


def checkpoint_paths(out_dir):
    """The checkpoints of out_dir, newest first."""
    numbers = {}  # {file name: how many came after it}
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else []:
        match = re.fullmatch(r"ckpt(?:-(\d+))?\.pt", name)
        if match:
            numbers[name] = int(match[1] or 0)
    return [os.path.join(out_dir, name) for name in sorted(numbers, key=numbers.get)]


def save_checkpoint(out_dir, checkpoint, keep=1):
    """Write ckpt.pt, of which `keep` are kept.

    It is written and synced under another name; only then do the ones before it make room.
    Whatever happens, those that are there are whole."""
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        with replacing(path) as f:
            torch.save(checkpoint | {"format": FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
            # it is whole on disk: now the others move back by one
            older = [os.path.join(out_dir, f"ckpt-{i}.pt") for i in range(1, keep)]
            numbered = [path, *older]
            for newer, older in reversed(list(zip(numbered, numbered[1:]))):
                if os.path.exists(newer):
                    os.replace(newer, older)
    except (OSError, RuntimeError) as e:
        kept = "; the one before it is whole" if checkpoint_paths(out_dir) else ""
        raise SystemExit(f"error: could not save {path}: {e}{kept}")


def whole_state(model, optimizer):
    """What all ranks of a run hold alike, {name: tensor, number or container of them}."""
    state = dict(model.state_dict())
    for part, of in optimizer.state_dict().items():
        if isinstance(of, dict):
            state |= {f"{part} of {name}": value for name, value in of.items()}
    return state


def read_checkpoint(path):
    """A checkpoint of train.py, memory-mapped; nothing in it is run.

    Exits with one line if it is anything else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch writes checksums, and does not look at them
            damaged = file.testzip()  # the first entry that does not match, or None
        if damaged is not None:
            raise ValueError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        made = checkpoint.get("format")
        for part in ("config", "model", "optimizer", "iter", "position"):
            checkpoint[part]  # KeyError: of something else
    except FileNotFoundError:
        raise SystemExit(f"error: {path} does not exist: name a run's folder with --out_dir")
    except Exception as e:  # zipfile and torch raise many kinds on a damaged or foreign file
        kind = type(e).__name__
        raise Damaged(f"error: {path} is damaged or not a checkpoint of train.py ({kind})")
    if made != FORMAT:
        why = ""
        if made == 2:
            why = "; there the optimizer's state lay otherwise: go on with the version that made it"
        raise SystemExit(f"error: {path} was made by another version of train.py: "
                         f"format {made}, not {FORMAT}{why}")
    return checkpoint


def load_checkpoint(out_dir):
    """The newest whole checkpoint of out_dir, with its "path", and newer ones under "damaged".

    Exits with one line if there is none."""
    # none at all: the error names the newest that there would be
    candidates = checkpoint_paths(out_dir) or [os.path.join(out_dir, "ckpt.pt")]
    for i, path in enumerate(candidates):
        try:
            return read_checkpoint(path) | {"path": path, "damaged": candidates[:i]}
        except Damaged as e:
            if path == candidates[-1]:
                raise
            print(f"{e}; going back to the one before it")


def check_same_model(checkpoint, s):
    """Exit with one line if a checkpoint is of another model or method than settings s."""
    for key in (*SHAPE_KEYS, *find(s.method).in_weights):
        now = getattr(s, key)
        before = checkpoint["config"].get(key, now)  # an older run may not have the key
        if before != now:
            raise SystemExit(
                f"error: {checkpoint['path']} was trained with {key} = {before!r}, "
                f"this run has {now!r}"
            )


def starting_model(s, checkpoint=None):
    """Put into s what the model that the run starts from brings; returns what fills it, or None.

    s gets the fields of LLaMAConfig that the model fixes, `pretrained`, the Hugging Face checkpoint
    that it comes from or "", and `encoding`. checkpoint: the run's own, where it is resumed."""
    s.pretrained = ""
    s.low_rank = ""
    fill = None
    found = {}  # LLaMAConfig's fields
    if checkpoint is not None:
        s.pretrained = checkpoint["config"].get("pretrained", "")
        found = checkpoint["config"] if s.pretrained else {}
    elif s.init_from != "scratch":
        hf = foreign.checkpoints()
        try:
            path = hf.local(s.init_from, weights=not s.dry_run)
            found = hf.settings(path)
        except ValueError as e:
            raise SystemExit(f"error: init_from: {e}")
        s.pretrained = s.init_from
        most = found["block_size"]
        if s.block_size > most:
            raise SystemExit(
                f"error: block_size {s.block_size}: {s.init_from} sees {most} tokens"
            )
        fill = partial(hf.load_weights, path=path)
    for field in fields(LLaMAConfig):
        if field.name in found and field.name not in OF_RUN:
            setattr(s, field.name, found[field.name])
    s.encoding = s.encoding or s.pretrained or "gpt2"
    return fill


def load_model(path, device, dtype=None, weight_bits=8):
    """(model, name of its encoding) of a run's folder, or of a Hugging Face directory or name.

    weight_bits: of the latter's matrices. dtype: of what is not quantised; None: as a run saved it,
    bfloat16 on a GPU and float32 on a CPU for Hugging Face's. Raises ValueError, or exits with one
    line, if it cannot be read."""
    native = torch.bfloat16 if str(device).startswith("cuda") else torch.float32  # slow on CPUs
    # a run's folder has a config.json, too, but also checkpoints or a log
    ours = checkpoint_paths(path) or os.path.exists(os.path.join(path, "log.jsonl"))
    theirs = os.path.exists(os.path.join(path, "config.json")) or not os.path.isdir(path)
    if theirs and not ours:
        hf = foreign.checkpoints()
        path = hf.local(path)
        return hf.load(path, weight_bits, dtype or native, device), path
    newest = (checkpoint_paths(path) or [os.path.join(path, "ckpt.pt")])[0]
    checkpoint = read_checkpoint(newest)
    weights = checkpoint["model"]
    saved = native
    if "embed.weight" in weights:  # an INT8 embedding has no say
        saved = weights["embed.weight"].dtype
    s = Settings(**checkpoint["config"], given={})
    model = find(s.method).build_model(s, device, dtype or saved)
    model.load_state_dict(weights)
    return model, s.encoding
