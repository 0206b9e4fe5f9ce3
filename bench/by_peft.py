"""
LoRA and QLoRA by transformers, peft and bitsandbytes, for what train.py's `lora` is compared with.
    python -m bench.by_peft config/finetune_smollm2.py --method=lora --rank=16
    python -m bench.by_peft config/finetune_smollm2.py --method=lora --rank=16 --weight_bits=4

The first is LoRA, the second QLoRA; with --weight_bits=8 the matrices are bitsandbytes' LLM.int8().
The command line is train.py's. So are the loop, the schedule, the evaluation, the log, and the
batches in their order. Theirs are the model, its loss, the quantised layers and the adapters, on
all linear layers of the blocks. The optimizer is torch's AdamW for both.

Packed examples are attended to one by one: transformers takes position_ids that start anew for
that, and makes a mask of T x T.

At its end the run writes out_dir/merged, a float32 model that computes what the tuned one does.
finetune.evaluate reads it.
"""

import os
import time

from bench.settings import train_settings
from configurator import configure

if __name__ == "__main__":
    s = configure(train_settings())

import torch
import torch.nn as nn

from methods.registry import shape
from quant import bitsandbytes
from run.data import make_data, open_windows
from run.device import flops_per_token, memory_peak
from run.finite import check_finite
from run.folder import Folder
from run.log import Log
from run.ranks import Ranks
from run.settle import settle
from run.show import say
from run.stop import Stop
from train import Run

METHODS = ("lora", "qlora")
# what only ours can do: these settings stay as they are
ONLY_OURS = {"embed_bits": 16, "matmul": "float", "by_block": False, "checkpoint_bits": 16,
             "compile": False, "dpo_beta": 0.0, "eval_only": False, "dry_run": False}


def main(s):
    began = time.perf_counter()
    s.out_dir = os.path.expanduser(s.out_dir)
    check(s)
    bitsandbytes()  # before others import it, without its warnings
    try:
        import peft  # noqa
        import transformers
    except ImportError as e:
        raise SystemExit(f"error: there is no {e.name}: pip install transformers peft accelerate")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with Folder(s.out_dir) as folder:
        train(s, folder, began)


def check(s):
    """Exit with one line if the settings ask for what is not theirs."""
    if s.method not in METHODS:
        raise SystemExit(f"error: method {s.method!r}: peft's are {' and '.join(METHODS)}")
    if s.init_from.removeprefix("auto:") in ("scratch", "resume", "auto"):
        raise SystemExit(f"error: init_from={s.init_from}: peft tunes a Hugging Face checkpoint: "
                         "name one, a path or owner/name")
    for name, value in ONLY_OURS.items():
        if getattr(s, name) != value:
            raise SystemExit(f"error: {s.given[name]}: {name} is ours alone: here it is {value}")


def train(s, folder, began):
    method, _, _, weight_dtype, compute_dtype = settle(s, folder)
    ranks = Ranks(s.device)
    make_data(s, ranks)
    train_data = open_windows(s, "train", seed=s.seed)
    val_data = open_windows(s, "val", seed=None)
    torch.manual_seed(s.seed)
    model = Theirs(build(s, weight_dtype, compute_dtype), shape(s))
    run = PeftRun(s, method, model, method.build_optimizer(model, s), train_data, val_data, ranks)
    if compute_dtype != weight_dtype:
        run.autocast = torch.autocast(s.device, compute_dtype)
    folder.begin(goes_on=False)
    run.folder = folder
    run.log = Log(s, folder, None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"peft on {s.device}: {trained:,} weights of adapters, {s.weight_bits} bits below them; "
        f"{memory_peak(s.device):.2f} GiB so far")
    run.stop = Stop(s.max_minutes, True, began)
    if run.loop():
        merge(model.model, s.pretrained, os.path.join(folder.now, "merged"))


def build(s, weight_dtype, compute_dtype):
    """peft's model of the checkpoint s.pretrained: adapters on frozen matrices in s.weight_bits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if s.weight_bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif s.weight_bits == 4:  # as QLoRA's authors have it
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        s.pretrained,
        dtype=weight_dtype,
        device_map={"": s.device},
        quantization_config=quantization,
        attn_implementation="sdpa",
    )
    if quantization is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if s.checkpoint_activations:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = LoraConfig(
        r=s.rank,
        lora_alpha=s.lora_alpha,
        target_modules="all-linear",  # but for the head
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, adapters).train()


class Theirs(nn.Module):
    """transformers' model, called as train.py calls ours. config: its LLaMAConfig."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, x, y, documents=None):
        """The mean loss of targets y (B, T), where -1 does not count, as x sees its own example."""
        labels = y.masked_fill(y < 0, -100)
        positions = None if documents is None else positions_in(documents)
        found = self.model(input_ids=x, position_ids=positions, labels=labels,
                           shift_labels=labels, use_cache=False)
        return found.loss


def positions_in(documents):
    """Each token's place in its example, (B, T) int64, from 0. documents (B, T): its number."""
    T = documents.shape[1]
    place = torch.arange(T, device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = (place * starts).cummax(dim=1).values  # where a token's example starts
    return place - first


class PeftRun(Run):
    def figures(self, prefix):
        """What else a loss tells: nothing."""
        return {}

    def save(self):
        """No checkpoint: such a run is short. What it has learned is merged at its end."""
        check_finite(self)
        self.folder.settle(self.log)
        self.saved = "nothing was saved"


@torch.no_grad()
def merge(model, pretrained, folder):
    """Write the model that the adapters make of the matrices as they are in few bits, in float32.

    peft's own merge rounds the sum to these bits again."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            weight = weight + layer.get_delta_weight("default").float()
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(folder)
    say(f"merged: {folder}")


if __name__ == "__main__":
    main(s)
