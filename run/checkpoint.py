"""
A run's checkpoints: ckpt.pt is the newest, ckpt-1.pt the one before it, and so on.

torch.save writes one tensor after the other and brings each from the GPU when its turn comes, so
that host memory never holds a second copy of the model: at 7B 10.1 GB go to disk, and the largest
tensor is 0.4.
"""

import contextlib
import errno
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from dataclasses import fields
from functools import partial

import torch

from configurator import Settings
from methods.registry import find
from model import LLaMAConfig
from run import foreign
from run.files import check_file, replacing, sync, temporary_file
from run.text import first_line

FORMAT = 3  # raised when what a checkpoint holds changes
PARTS = {"config": dict, "model": dict, "optimizer": dict, "iter": int, "position": int}
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
    Whatever happens, those that are there are whole, and once there is a ckpt.pt there is one."""
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        with replacing(path) as f:
            torch.save(checkpoint | {"format": FORMAT}, f)
            sync(f)
            make_room(path, [os.path.join(out_dir, f"ckpt-{i}.pt") for i in range(1, keep)])
    except (OSError, RuntimeError) as e:
        why = getattr(e, "strerror", None)
        if why is None:  # torch's writer does not say what the system said
            free = shutil.disk_usage(out_dir or ".").free
            why = f"writing failed, with {free / 2**30:.2f} GiB free on that disk"
        kept = "; the one before it is whole" if checkpoint_paths(out_dir) else ""
        raise SystemExit(f"error: could not save {path}: {why}{kept}")


def make_room(path, older):
    """Move checkpoints back by one: `path` becomes older[0], that older[1], and the last goes."""
    numbered = [path, *older]
    for newer, place in reversed(list(zip(numbered[1:], numbered[2:]))):
        if os.path.exists(newer):
            os.replace(newer, place)
    if older and os.path.exists(path):
        second = temporary_file(older[0])  # a second name for the same file
        second.close()
        os.unlink(second.name)
        try:
            os.link(path, second.name)
        except OSError:  # a file system with one name a file: for a moment there is no `path`
            os.replace(path, older[0])
        else:
            os.replace(second.name, older[0])
            with contextlib.suppress(FileNotFoundError):  # two names of one file are left alone
                os.unlink(second.name)


def whole_state(model, optimizer):
    """What all ranks of a run hold alike, {name: tensor, number or container of them}."""
    state = dict(model.state_dict())
    for part, of in optimizer.state_dict().items():
        if isinstance(of, dict):
            state |= {f"{part} of {name}": value for name, value in of.items()}
    return state


def read_checkpoint(path):
    """A checkpoint of train.py, memory-mapped; nothing in it is run.

    Raises Damaged if its checksums do not match, or its end is missing. Exits with one line for
    any other reason: that file may be good."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as file:  # torch writes checksums, and does not look at them
            damaged = file.testzip()  # the first entry that does not match, or None
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
    except FileNotFoundError:
        raise SystemExit(f"error: {path} does not exist: name a run's folder with --out_dir")
    except MemoryError:
        raise SystemExit(f"error: {path} cannot be read: there is not enough memory")
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError,
            RuntimeError, ValueError) as e:  # headers, too, may be what is damaged
        # EINVAL: a damaged header sends the reader to a place before the file
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise SystemExit(f"error: {path} cannot be read: {e.strerror}")
        raise Damaged(f"error: {path} is damaged, or not a checkpoint at all: {first_line(e)}")

    # it is as it was written: whatever is wrong now, was so from the beginning
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, MemoryError, ValueError, KeyError,
            TypeError, AttributeError, IndexError, EOFError, ImportError) as e:
        raise SystemExit(f"error: {path} is not a checkpoint of train.py: {first_line(e)}")
    check_parts(path, checkpoint)
    return checkpoint


def check_parts(path, checkpoint):
    """Exit with one line unless what was read is a checkpoint of this version, with all parts."""
    if not isinstance(checkpoint, dict):
        raise SystemExit(f"error: {path} is not a checkpoint of train.py: no dictionary")
    made = checkpoint.get("format")
    if made != FORMAT and "config" in checkpoint:
        why = ""
        if made == 2:
            why = "; there the optimizer's state lay otherwise: go on with the version that made it"
        raise SystemExit(f"error: {path} was made by another version of train.py: "
                         f"format {made!r}, not {FORMAT}{why}")
    for part, kind in PARTS.items():
        found = checkpoint.get(part)
        negative = kind is int and isinstance(found, int) and found < 0
        if not isinstance(found, kind) or isinstance(found, bool) or negative:
            raise SystemExit(f"error: {path} is not a checkpoint of train.py: its {part!r} is "
                             f"{type(found).__name__}, not {kind.__name__}")
    names = checkpoint["model"]
    if not all(isinstance(name, str) for name in (*checkpoint["config"], *names)):
        raise SystemExit(f"error: {path} is not a checkpoint of train.py: names that are no text")
    if not all(isinstance(tensor, torch.Tensor) for tensor in names.values()):
        raise SystemExit(f"error: {path} is not a checkpoint of train.py: weights that are none")


@contextlib.contextmanager
def restoring(path):
    """Around what takes a checkpoint's state: exits with one line if that does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"  # torch's takes many lines
        raise SystemExit(f"error: {path} does not fit this run: {why}")


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
        if checkpoint_paths(os.path.expanduser(s.init_from)):
            raise SystemExit(f"error: init_from: {s.init_from} is a run's folder: --out_dir="
                             f"{s.init_from} --init_from=resume goes on with it")
        hf = foreign.checkpoints()
        try:
            path = hf.local(s.init_from, weights=not s.dry_run)
            found = hf.settings(path)
        except ValueError as e:
            raise SystemExit(f"error: init_from: {e}")
        # a folder is found from another working directory, too
        folder = os.path.expanduser(s.init_from)
        s.pretrained = os.path.abspath(folder) if os.path.isdir(folder) else s.init_from
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
    if not os.path.exists(path) and "/" not in path:
        raise ValueError(
            f"there is no folder {path}: name a run's, a Hugging Face directory, or owner/name"
        )
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
    with restoring(newest):
        s = Settings(**checkpoint["config"], given={})
        if not isinstance(s.encoding, str):
            raise ValueError(f"encoding is {s.encoding!r}, and no text")
        model = find(s.method).build_model(s, device, dtype or saved)
        model.load_state_dict(weights)
    return model, s.encoding
