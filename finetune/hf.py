"""
Hugging Face checkpoints in and out: LLaMA, SmolLM2, Mistral, Gemma, Gemma 2 and Qwen2.
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-tuned
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-int8 --int8=True

The first makes a directory in bfloat16, for transformers and lm_eval. The second keeps the INT8
weights as they are, for hf.load().

load() is in hf_load.py, and save() here: at most 2 GiB are made float at a time.
"""

import contextlib
import glob
import os
import shutil
import sys
from functools import partial

import torch
from safetensors import SafetensorError

from configurator import configure
from finetune.hf_config import config_json, described, settings  # noqa: F401
from finetune.hf_files import read_tensor, tensor_files, write_json, write_tensors  # noqa: F401
from finetune.hf_load import (INT8_NAMES, hf_names, int8_names, is_gemma, load,  # noqa: F401
                              load_weights, local)
from model import QLinear, QMatrix, RMSNorm
from run.checkpoint import load_model
from run.text import first_line

# input and output
out_dir = "out"  # the run whose newest checkpoint to export
export = ""  # the directory to make
int8 = False  # the INT8 weights as they are. False: all in bfloat16, adapters merged

# what an exported directory takes over from the one that the model came from
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


@torch.no_grad()
def save(model, path, like=None, int8=False, dtype=torch.bfloat16):
    """Write a LLaMA as the directory `path`, which transformers loads.

    Weights are in `dtype`, adapters merged. like: the checkpoint directory that the model came
    from, whose tokenizer is copied. int8: write the QMatrices' codes, scale and zero instead
    (NAME.q, NAME.scale, NAME.zero), which load() takes back bit for bit.

    The directory takes its name when it is complete. Raises ValueError if it exists, if int8 finds
    weights that are not INT8, or if no config.json can describe the model."""
    config = config_json(model.config, dtype, like)
    if int8:
        group_size = _int8_group_size(model)
        quantized = {"quant_method": "qgalore", "bits": 8, "group_size": group_size}
        config["quantization_config"] = quantized
    check = partial(_check_described, model.config, bool(like))
    write(path, config, _tensors(model, int8, dtype), like, check)


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
            if isinstance(module, RMSNorm) and is_gemma(model):
                t = t - 1
            yield name, t if int8 else t.to(dtype)


def write(path, config, tensors, like=None, check=None):
    """Make the checkpoint directory `path`, which takes its name when it is complete.

    config: config.json's object. tensors: (name, tensor)s. like: a directory whose tokenizer is
    copied. check: is called with the settings that the new config.json gives, before any tensor is
    written. Raises ValueError if `path` exists or cannot be written."""
    path = path.rstrip("/")
    if os.path.exists(path):
        raise ValueError(f"{path}: exists; name a new directory")
    temporary = path + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what an earlier, killed run left
        os.makedirs(temporary)
        # read config.json back: does it say all that the model is?
        write_json(os.path.join(temporary, "config.json"), config)
        found = described(temporary)
        if check is not None:
            check(found)
        write_tensors(temporary, tensors)
        if like:
            _copy_tokenizer(like, temporary)
        os.rename(temporary, path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"could not write {path}: {first_line(e)}")
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            shutil.rmtree(temporary)


def _copy_tokenizer(source, folder):
    for pattern in TOKENIZER_FILES:
        for file in glob.glob(os.path.join(glob.escape(source), pattern)):
            shutil.copy(file, folder)


def main():
    s = configure(sys.modules[__name__], ignore_unknown=True)
    if not s.export:
        raise SystemExit("error: name the directory to make with --export=DIR")
    try:
        model, encoding = load_model(s.out_dir, "cpu")
        # a run on a checkpoint's own tokens names that checkpoint as its encoding
        like = None
        if os.path.isdir(encoding):
            like = encoding
        elif "/" in encoding and not os.path.exists(encoding):  # on the hub
            like = local(encoding)
        save(model, s.export, like, s.int8)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    kind = "for transformers: AutoModelForCausalLM.from_pretrained"
    if s.int8:
        kind = "INT8, for hf.load"
    print(f"{s.export}: {kind}")


if __name__ == "__main__":
    main()
