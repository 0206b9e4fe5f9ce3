"""
The safetensors files of a checkpoint directory: one, or several and an index that lists them.

Tensors are read from memory-mapped files and checked, and are written as they are made.
"""

import glob
import json
import os
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune.checkpoints.fields import Fields, read_json, shown
from run.files import check_file
from run.text import first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which tensor is in which file, where there are several
SHARD_BYTES = 2 * 2**30  # of a file that is written
# the types that a float tensor may have
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# the two that may be one
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Place(NamedTuple):
    """Where a tensor is: file, the name that it has there, and, if it is there as some rows of
    another one, its first row, its last but one, and how many rows there are."""

    file: str
    name: str
    rows: tuple | None = None


def has_weights(path):
    """Whether a checkpoint directory has its tensors' files: a download may be without them."""
    if os.path.exists(os.path.join(path, SINGLE)):
        return True
    if not os.path.exists(os.path.join(path, INDEX)):
        return False
    return any(os.path.exists(os.path.join(path, name)) for name in _read_index(path).values())


def tensor_files(path):
    """{tensor: its Place} of a checkpoint directory.

    The text part of a model of text and images has the names that it has alone. Raises ValueError
    for a file that is missing or damaged, and for an index that is not true."""
    # one file, or those that the index names
    index = os.path.join(path, INDEX)
    listed = {}
    files = [SINGLE]
    if not os.path.exists(os.path.join(path, SINGLE)):
        listed = _read_index(path)
        files = sorted(set(listed.values()))

    # what they hold, by their own headers
    held = {}
    for name in files:
        file = os.path.join(path, name)
        if not os.path.exists(file):
            raise ValueError(f"{file}: is missing, and {index} names it")
        with _open(file) as f:
            for tensor in f.keys():
                if tensor in held:
                    raise ValueError(f"{file}: tensor {shown(tensor)} is in {held[tensor]}, too")
                held[tensor] = file

    # and whether that is what the index says
    for name, file in listed.items():
        if held.get(name) != os.path.join(path, file):
            raise ValueError(f"{index}: says that {shown(name)} is in {file}, where it is not")
    return {name.replace("language_model.", "", 1): Place(held[name], name) for name in held}


def _read_index(path):
    """{tensor: file's name} that a checkpoint in several files lists."""
    index = os.path.join(path, INDEX)
    if not os.path.exists(index):
        pickled = glob.glob(f"{glob.escape(path)}/*.bin")
        hint = " (.bin files hold pickled code: convert them)" if pickled else ""
        raise ValueError(f"{path}: there is no model.safetensors{hint}")
    listed = Fields(read_json(path, INDEX), index).object("weight_map")
    if not listed.found:
        raise ValueError(f"{index}: has no weight_map")
    for name in listed.found:
        file = listed.text(name)
        # a plain name: a path would lead out of the directory
        leads_out = file in ("", ".", "..") or any(sign in file for sign in "/\\:")
        if leads_out or not file.isprintable():
            listed.refuse(name, "the name of a file in the directory")
    return listed.found


def _open(file):
    """A safetensors file, memory-mapped.

    It is opened anew for each tensor, so that what was read does not stay resident."""
    try:
        check_file(file)  # a pipe would never end
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        why = getattr(e, "strerror", None) or f"damaged or truncated: {first_line(e)}"
        raise ValueError(f"{file}: {why}")


def shapes(held, names):
    """{name: its shape, a list} of tensors of `held`, by the files' headers."""
    found = {}
    for name in names:
        with _open(held[name].file) as f:
            found[name] = f.get_slice(held[name].name).get_shape()
    return found


def alike(held, a, b):
    """Whether two tensors of `held` have the same values."""
    tensors = []
    for name in (a, b):
        with _open(held[name].file) as f:
            tensors.append(f.get_tensor(held[name].name))
    first, second = tensors
    if first.dtype != second.dtype:
        first, second = first.float(), second.float()
    return torch.equal(first, second)


def read_tensor(held, name, shape, dtype=None):
    """Tensor `name` of `held`, checked.

    It lies in the file's own memory: copy it to keep it. held: as of tensor_files(). shape: None
    in it is any length. dtype: None is any float. Raises ValueError for anything else, and for
    values that are not finite."""
    file, stored_name, rows = held[name]
    with _open(file) as f:
        t = f.get_tensor(stored_name)
    if rows is not None:
        first, last, total = rows
        shape = (total, *shape[1:])
    fits = all(expected in (None, n) for expected, n in zip(shape, t.shape))
    if t.ndim != len(shape) or not fits:
        raise ValueError(f"{file}: tensor {stored_name} is {list(t.shape)}, expected {list(shape)}")
    if rows is not None:
        t = t[first:last]
    allowed = FLOATS if dtype is None else (dtype,)
    if t.dtype not in allowed:
        expected = dtype or "floats of 16 or 32 bits"
        raise ValueError(f"{file}: tensor {stored_name} is {t.dtype}, expected {expected}")
    if not is_finite(t):
        raise ValueError(f"{file}: tensor {stored_name} has values that are not finite")
    return t


def is_finite(t):
    """Whether all values of a tensor are finite; without a copy of it."""
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = t.aminmax()  # both are NaN where there is one
    return bool(low.isfinite() and high.isfinite())


def write_tensors(folder, tensors):
    """Write (name, tensor)s as model.safetensors, or as several files and an index."""
    names = []  # of each file's tensors
    total = 0
    for shard in _shards(tensors):
        # how many files there are, which is a part of their names, is known at the end
        numbered = os.path.join(folder, str(len(names)))
        save_file(shard, numbered, metadata={"format": "pt"})
        names.append(list(shard))
        total += sum(t.nbytes for t in shard.values())

    # give the files their names
    n = len(names)
    files = [SINGLE]
    if n > 1:
        files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    weight_map = {}
    for i, file in enumerate(files):
        os.rename(os.path.join(folder, str(i)), os.path.join(folder, file))
        weight_map.update(dict.fromkeys(names[i], file))
    if n > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(folder, INDEX), index)


def _shards(tensors):
    """Yield {name: tensor} of at most SHARD_BYTES each, on the CPU.

    Each is emptied when the next is asked for."""
    shard = {}
    size = 0
    for name, t in tensors:
        if shard and size + t.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()  # a new one would leave the caller with this one's tensors
            size = 0
        if not is_finite(t):
            raise ValueError(f"tensor {name} has values that are not finite: it is not written")
        shard[name] = t.cpu().contiguous()
        size += t.nbytes
    yield shard


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
