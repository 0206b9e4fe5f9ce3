"""
Hugging Face checkpoints in and out, of all that architectures.py lists.
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-tuned
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-int8 --int8=True
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-tuned.gguf
    python -m finetune.hf --export=smollm2-tuned --push=owner/name

The first makes a directory in bfloat16, for transformers and lm_eval. The second keeps the INT8
weights as they are, for hf.load(). The third makes a file for llama.cpp and Ollama. The fourth
uploads what was made to a repository of yours; with an --out_dir it makes it first.

load() is in hf_load.py, and save() here: at most 2 GiB are made float at a time. The file is
gguf_model.py's.
"""

import importlib.util
import os
import sys

from configurator import configure, one_of
from finetune.checkpoints.paths import check_new, is_hub_name, local
from finetune.checkpoints.push import ready, upload

# input and output
out_dir = "out"  # the run whose newest checkpoint to export
export = ""  # the directory to make, or the file, NAME.gguf
int8 = False  # a directory: the INT8 weights as they are. False: all in bfloat16, adapters merged
gguf: one_of("q8_0", "f16") = "q8_0"  # a file: what its matrices are in
# to the Hugging Face hub
push = ""  # owner/name of the repository that gets it. Empty: none
private = True  # of a repository that is made
push_over = False  # a repository that has files: those of the same names are replaced


def check(s):
    """Exit with one line for what can be said before torch is loaded, which takes seconds."""
    if not s.export:
        raise SystemExit("error: name what to make with --export=DIR, or --export=NAME.gguf")
    is_file = s.export.endswith(".gguf")
    try:
        if not is_made(s):
            check_new(s.export, "file" if is_file else "directory")
        if s.push:
            ready(s.push, s.push_over)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if is_file and s.int8:
        raise SystemExit("error: --int8=True is of a directory: a .gguf file has --gguf=q8_0")
    if not is_file and "gguf" in s.given:
        raise SystemExit(f"error: {s.given['gguf']}: the file to make is --export=NAME.gguf")
    if is_file and importlib.util.find_spec("gguf") is None:
        raise SystemExit("error: a .gguf file takes the gguf package: pip install gguf")


def is_made(s):
    """Whether what is to be uploaded is there already: nobody has named a run to make it of."""
    path = os.path.expanduser(s.export)
    if not s.push or "out_dir" in s.given or not os.path.lexists(path):
        return False
    if not os.path.isfile(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{s.export}: is no export: it has no config.json")
    return True


if __name__ == "__main__":
    s = configure(sys.modules[__name__], ignore_unknown=True)
    check(s)

import contextlib
import shutil
from functools import partial

import tiktoken
import torch
from safetensors import SafetensorError

from finetune.checkpoints import gguf_model
from finetune.checkpoints.architectures import ARCHITECTURES
from finetune.checkpoints.hf_config import config_json, described, settings  # noqa: F401
from finetune.checkpoints.hf_files import write_json, write_tensors
from finetune.checkpoints.hf_load import (INT8_NAMES, fused, hf_names, int8_names,  # noqa: F401
                                          load, load_weights, norm_offset)
from finetune.checkpoints.hf_tokenizer import copy_tokenizer, tokenizer_files, write_tokenizer
from model import QLinear, QMatrix, RMSNorm
from run.checkpoint import load_model
from run.encodings import get_encoding
from run.files import sweep, sync, sync_folder, temporary_folder
from run.text import first_line


@torch.no_grad()
def save(model, path, like=None, int8=False, dtype=torch.bfloat16, encoding=None):
    """Write a LLaMA as the directory `path`, which transformers loads.

    Weights are in `dtype`, adapters merged. like: the checkpoint directory that the model came
    from, whose tokenizer is copied. encoding: a tiktoken.Encoding, where there is none. int8: write
    the QMatrices' codes, scale and zero instead (NAME.q, NAME.scale, NAME.zero), which load() takes
    back bit for bit.

    The directory takes its name when it is complete. Raises ValueError if it exists, if int8 finds
    weights that are not INT8, if weights are not finite, or if no config.json can describe the
    model."""
    config = config_json(model.config, dtype, like)
    if encoding is not None:
        config["eos_token_id"] = encoding.eot_token
    if int8:
        group_size = _int8_group_size(model)
        quantized = {"quant_method": "qgalore", "bits": 8, "group_size": group_size}
        config["quantization_config"] = quantized
    check = partial(_check_described, model.config, bool(like))
    tensors = fused(_tensors(model, int8, dtype), ARCHITECTURES[model.config.architecture])
    write(path, config, tensors, like, check, encoding)


def _int8_group_size(model):
    """The group size of a model whose blocks' matrices are all INT8, without anything beside."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    plain = all(layer.bits == 8 and layer.adapter is None for layer in layers)
    if not layers or not plain or model.config.low_rank:
        raise ValueError(
            "the model's weights are not INT8, or not they alone: export it with --int8=False"
        )
    return layers[0].group_size


def _check_described(config, longer_text, found):
    """Raise ValueError if `found`, what settings() reads of the new config.json, is not `config`.

    longer_text: block_size may differ, as config.json keeps that of the checkpoint before."""
    for key, value in found.items():
        ours = getattr(config, key)
        if ours != value and not (longer_text and key == "block_size"):
            raise ValueError(
                f"{config.architecture} has no {key} = {ours!r}: the model cannot be exported"
            )


def _tensors(model, int8, dtype):
    """(name, tensor) of all that save() writes, each made when its turn comes."""
    for name, (module, kind) in hf_names(model).items():
        if isinstance(module, QMatrix) and kind == "weight":
            if int8:  # the codes as they are
                for stored, part in zip(int8_names(name), INT8_NAMES):
                    yield stored, getattr(module, part)
            else:
                yield name, module.float_weight(dtype)  # with its adapter
        elif kind == "u":  # of a LowRank: the product of both factors
            yield name.removesuffix("u") + "weight", module.float_weight(dtype)
        elif kind != "v":  # an embedding, a norm, a bias
            t = getattr(module, kind).detach()
            if isinstance(module, RMSNorm):
                t = t - norm_offset(model)
            yield name, t if int8 else t.to(dtype)


def write(path, config, tensors, like=None, check=None, encoding=None):
    """Make the checkpoint directory `path`, which takes its name when it is complete.

    config: config.json's object. tensors: (name, tensor)s. like, encoding: as in save(). check: is
    called with the settings that the new config.json gives, before any tensor is written. Raises
    ValueError if `path` exists or cannot be written."""
    path = check_new(path)
    files = tokenizer_files(like) if like else []
    temporary = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        sweep(os.path.dirname(path), os.path.basename(path) + ".")
        temporary = temporary_folder(path)
        # read config.json back: does it say all that the model is?
        write_json(os.path.join(temporary, "config.json"), config)
        found = described(temporary)
        if check is not None:
            check(found)
        copy_tokenizer(files, temporary)
        if encoding is not None:
            why = write_tokenizer(encoding, temporary)
            if why:
                print(f"note: {path} has no tokenizer: {why}")
        write_tensors(temporary, tensors)
        for name in os.listdir(temporary):  # on the disk before the directory has its name
            with open(os.path.join(temporary, name), "rb+") as f:
                sync(f)
        os.rename(temporary, path)
        sync_folder(os.path.dirname(path))
        temporary = None
    except (OSError, SafetensorError) as e:
        raise ValueError(f"could not write {path}: {first_line(e)}")
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)


def _tokenizer(name):
    """(the checkpoint directory, the tiktoken.Encoding) whose tokenizer a run's encoding is; one of
    them None, or both, which is said."""
    path = os.path.expanduser(name)
    try:
        if os.path.isdir(path):  # a run on a checkpoint's own tokens names that checkpoint
            return path, None
        if not os.path.exists(path) and is_hub_name(name):
            return local(name, weights=False), None
        encoding = get_encoding(name)
        if isinstance(encoding, tiktoken.Encoding):
            return None, encoding
        if not os.path.basename(path).startswith("tokenizer"):
            raise ValueError(f"its file has a name of its own, {name}: copy it")
        return os.path.dirname(path) or ".", None
    except (ValueError, SystemExit) as e:
        print(f"note: the export has no tokenizer: {first_line(e).removeprefix('error: ')}")
        return None, None


def main(s):
    check(s)
    try:
        if not is_made(s):
            make(s)
        if s.push:
            path = os.path.expanduser(s.export)
            where = upload(path, s.push, ready(s.push, s.push_over), s.private)
            print(f"{where}: uploaded")
    except ValueError as e:
        raise SystemExit(f"error: {e}")


def make(s):
    """Export the run."""
    model, name = load_model(os.path.expanduser(s.out_dir), "cpu")
    like, encoding = _tokenizer(name)
    if s.export.endswith(".gguf"):
        gguf_model.save(model, s.export, s.gguf, like, encoding)
    else:
        save(model, s.export, like, s.int8, encoding=encoding)
    kind = "for transformers: AutoModelForCausalLM.from_pretrained"
    if s.export.endswith(".gguf"):
        kind = f"GGUF, {s.gguf}, for llama.cpp and Ollama"
    elif s.int8:
        kind = "INT8, for hf.load"
    print(f"{s.export}: {kind}")


if __name__ == "__main__":
    main(s)
