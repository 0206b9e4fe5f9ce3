"""
A run's checkpoints: ckpt.pt is the newest, ckpt-1.pt the one before it, and so on.

torch.save writes one tensor after the other and brings each from the GPU when its turn comes, so that host memory never
holds a second copy of the model: at 7B 10.1 GB go to disk, and the largest tensor is 0.4.
"""

import os
import re
import zipfile

import torch

from finetune import hf
from model import LLaMA
from run.shards import replacing

FORMAT = 2  # raised when what a checkpoint holds changes
SHAPE_KEYS = ("method", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "vocab_size", "tie_embedding",
              "weight_bits", "weight_group_size", "rank", "lora_alpha", "proj_bits", "moments",
              "freeze_embedding", "embed_bits", "proj_side")


def paths(out_dir):
    """The checkpoints of out_dir, newest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    numbers = {name: int(match[1] or 0) for name in names if (match := re.fullmatch(r"ckpt(?:-(\d+))?\.pt", name))}
    return [os.path.join(out_dir, name) for name in sorted(numbers, key=numbers.get)]


def save_checkpoint(out_dir, checkpoint, keep=1):
    """Write ckpt.pt and sync it under another name; only then do the ones before it make room. Whatever happens, those
    that are there are whole."""
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        with replacing(path) as f:
            torch.save(checkpoint | {"format": FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
            numbered = [path, *(os.path.join(out_dir, f"ckpt-{i}.pt") for i in range(1, keep))]
            for newer, older in reversed(list(zip(numbered, numbered[1:]))):
                if os.path.exists(newer):
                    os.replace(newer, older)
    except (OSError, RuntimeError) as e:
        kept = "; the one before it is whole" if paths(out_dir) else ""
        raise SystemExit(f"error: could not save {path}: {e}{kept}")


def read_checkpoint(path):
    """A checkpoint of train.py, memory-mapped; nothing in it is run. Exits with one line if it is anything else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch writes checksums, and does not look at them
            if (name := file.testzip()) is not None:
                raise ValueError(name)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        made = checkpoint.get("format")
        checkpoint["config"], checkpoint["model"], checkpoint["optimizer"], checkpoint["iter"], checkpoint["position"]
    except FileNotFoundError:
        raise SystemExit(f"error: {path} does not exist: name a run's folder with --out_dir")
    except Exception as e:  # zipfile and torch raise many kinds on a damaged or foreign file
        raise SystemExit(f"error: {path} is damaged or not a checkpoint of train.py ({type(e).__name__})")
    if made != FORMAT:
        raise SystemExit(f"error: {path} was made by another version of train.py: format {made}, not {FORMAT}")
    return checkpoint


def load_checkpoint(out_dir):
    """The newest whole checkpoint of out_dir, with its "path", and the paths of newer ones under "damaged". Exits with
    one line if there is none."""
    candidates = paths(out_dir) or [os.path.join(out_dir, "ckpt.pt")]
    for path in candidates:
        try:
            return read_checkpoint(path) | {"path": path, "damaged": candidates[: candidates.index(path)]}
        except SystemExit as e:
            if path == candidates[-1]:
                raise
            print(f"{e}; going back to the one before it")


def check_same_model(checkpoint, config):
    """Exit with one line if a checkpoint is of another model or method than `config`."""
    for key in (*SHAPE_KEYS, *["galore_scale"] * (config["method"] == "loqt")):  # there a part of the weights
        if checkpoint["config"].get(key, config[key]) != config[key]:
            raise SystemExit(f"error: {checkpoint['path']} was trained with {key} = {checkpoint['config'][key]!r}, "
                             f"this run has {config[key]!r}")


def load_model(path, device, dtype=None, weight_bits=8):
    """(model, name of its encoding) of `path`: a run's folder, as it was trained, or a Hugging Face directory or
    repository, its matrices in weight_bits. dtype: of what is not quantised; None: as a run saved it, bfloat16 on a GPU
    and float32 on a CPU for Hugging Face's. Raises ValueError, or exits with one line, if it cannot be read."""
    native = torch.bfloat16 if str(device).startswith("cuda") else torch.float32  # slow on CPUs
    ours = paths(path) or os.path.exists(os.path.join(path, "log.jsonl"))
    if not ours and (os.path.exists(os.path.join(path, "config.json")) or not os.path.isdir(path)):
        path = hf.local(path)
        return hf.load(path, weight_bits, dtype or native, device), path
    checkpoint = read_checkpoint((paths(path) or [os.path.join(path, "ckpt.pt")])[0])
    config, weights = checkpoint["config"], checkpoint["model"]
    saved = weights["embed.weight"].dtype if "embed.weight" in weights else native  # an INT8 embedding has no say
    model = LLaMA.from_settings(config, device, dtype or saved)
    model.load_state_dict(weights)
    return model, config["encoding"]
