"""
Train a LLaMA on token shards by Q-GaLore, or by a sister method (--method=...), on GPUs or the CPU:
    python train.py config/demo.py                          # minutes on any machine, no download
    python train.py config/llama_7b.py --dry_run=True       # what it takes, before it takes it
    python train.py config/llama_7b.py                      # LLaMA-7B on one card of 16 GB
    python train.py config/llama_7b.py --init_from=resume   # go on after a stop
    python train.py config/finetune_smollm2.py              # fine-tune a Hugging Face checkpoint
    torchrun --standalone --nproc_per_node=2 train.py config/llama_7b.py    # on two GPUs
    python train.py --help                                  # every setting
"""

import math
import os
import sys
import time
from contextlib import nullcontext

from configurator import at_least, between, configure, from_below, one_of, zero_or_power_of_two

# -----------------------------------------------------------------------------
# output
out_dir = "out"  # config.json, log.jsonl, ckpt.pt, loss.png
keep_checkpoints: between(1, 1000) = 2  # ckpt.pt, and before it ckpt-1.pt ...
eval_interval: at_least(1) = 500  # steps between evaluations; each is followed by a checkpoint
eval_iters: at_least(1) = 40  # batches an evaluation reads, always the same ones
log_interval: at_least(1) = 10  # steps between lines of log.jsonl
eval_only = False  # evaluate once and leave: nothing is written to out_dir
init_from = "scratch"  # "resume": out_dir's newest checkpoint; a Hugging Face one, path or name;
# "auto": resume if there is one, else from scratch; "auto:NAME": else from that Hugging Face one
max_minutes: at_least(0) = 0.0  # save and leave after so many; 0 = never
sample_tokens: at_least(0) = 0  # tokens to generate and show at the end
wandb_log = False
tensorboard_log = False
project = "qgalore"  # name of the W&B project
dry_run = False  # print the memory that this run would take, and leave
# data
data_dir = "data/c4"  # *_train_*.bin and *_val_*.bin, as prepare_c4.py and llm.c write them
data_input = ""  # text to tokenise into data_dir, if that has no shards: "docs", or files
encoding = ""  # of the shards, see run/encodings.py; "": gpt2, or the Hugging Face checkpoint's own
batch_size: between(1, 2**20) = 16  # sequences a micro-batch
block_size: between(1, 2**24) = 256  # tokens a sequence
gradient_accumulation_steps: between(1, 10**6) = 1  # micro-batches a step, of all ranks together
# model (a Hugging Face checkpoint brings its own)
n_layer: between(1, 10_000) = 8
n_head: between(1, 2**16) = 8
n_kv_head: between(0, 2**16) = 0  # key/value heads, 0 = n_head
n_embd: between(1, 2**17) = 512
ffn_dim: between(1, 2**20) = 1376
vocab_size: between(1, 2**24) = 50304  # GPT-2's 50257, padded to a multiple of 64
rope_theta: between(1, 1e15) = 10000.0
tie_embedding = False
checkpoint_activations = False  # recompute each block in backward; keep only its input
checkpoint_bits: one_of(8, 16) = 16  # of those inputs: 16, as they are; 8, in INT8
by_block = False  # micro-batches pass one block after another, whose inputs wait in host memory
compile = False  # torch.compile what lies between the matrices and has no kernel of its own: SwiGLU
# method
method = "qmuon"  # or "qgalore", "adamw", "lora" ...: see docs/methods.md
rank: between(1, 2**20) = 128  # of the projections, or of LoRA's adapters
proj_gap: between(1, 2**31) = 200  # steps between refreshes of a layer, at first; relora's restarts
gap_growth: between(0, 10) = 0.0  # the gap before refresh i is longer by gap_growth^i (loqt: 1.2)
proj_threshold = 0.4  # mean similarity at which a layer's gap doubles; over 1: never
proj_k: between(1, 10**6) = 5  # refreshes in that mean
proj_bits: one_of(4, 8, 16) = 4  # of the bases; 16: not quantised
proj_side: one_of("auto", "left", "right") = "auto"  # side of W to project; auto: the smaller
proj_svd = False  # exact singular vectors of the formed gradient, in place of the range finder
galore_scale: between(1e-6, 1e6) = 0.25  # projected weights move at learning_rate * galore_scale
weight_bits: one_of(0, 4, 8, 16, 32) = 0  # of the blocks' matrices; 0: the method's own, 4: NF4
weight_group_size: zero_or_power_of_two = 256  # columns of W that share a scale; 0: a whole row
freeze_embedding = False  # embedding and head stay: saves their gradients and moments
embed_bits: one_of(8, 16) = 16  # of a frozen embedding and head: 8 (INT8), 16 (in `dtype`)
lora_alpha: between(1, 1e6) = 32.0  # adapters are scaled by alpha / rank
matmul: one_of("float", "int8") = "float"  # int8: x, dy in 8 bits; weight_group_size 0 alone
stochastic_rounding = True  # False: INT8 weights round to nearest
moments: one_of("factored", "8bit", "float32") = "factored"  # Adam's; 8bit: the paper's
accumulation: one_of("int8", "bfloat16", "float32") = "int8"  # sums of micro-batches' gradients;
# by_block, where one block's exist at a time, bfloat16 unless it is set
dpo_beta: between(0, 1e6) = 0.0  # above 0: DPO's, on the pairs of finetune/prepare_dpo.py
# optimizer
learning_rate: between(0, 100) = 0.01
max_iters: at_least(0) = 10000  # steps
weight_decay: between(0, 1e6) = 0.0  # decoupled, on matrices
beta1: from_below(0, 1) = 0.9
beta2: from_below(0, 1) = 0.999
adam_eps: at_least(1e-20) = 1e-8
grad_clip: at_least(0) = 0.0  # the norm of all gradients, see QGaLore; 0 = off
decay_lr = True  # cosine from learning_rate to min_lr
warmup_iters: at_least(0) = 1000
lr_decay_iters: at_least(0) = 0  # 0 = max_iters
min_lr: between(-1, 100) = -1.0  # negative = a tenth of learning_rate
# system
device: one_of("auto", "cuda", "cpu") = "auto"  # cuda where there is one, else cpu
dtype: one_of("auto", "bfloat16", "float16", "float32") = "auto"  # GPU: bfloat16, or else float16
threads: between(0, 4096) = 0  # of the CPU; 0: OMP_NUM_THREADS, or by the model's size
seed: between(0, 2**63 - 1) = 1337
rank_timeout: between(0.001, 1e6) = 600.0  # seconds that ranks wait for one another
# -----------------------------------------------------------------------------

if __name__ == "__main__":  # torch takes seconds to load: what is mistyped is said before
    s = configure(sys.modules[__name__])

# fragments of fixed segments waste the card's memory (torch 2.9 listens to this name only)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from kernels.launch import compile_fused
from run.by_block import forward_backward
from run.checkpoint import save_checkpoint, whole_state
from run.data import make_data, open_windows, shares_of
from run.device import flops_per_token, loss_scale
from run.finite import check_finite
from run.folder import Folder
from run.foreign import special_loss
from run.log import Clock, Log, begin, end
from run.memory import fits
from run.ranks import Ranks
from run.resume import restore, shards_of
from run.settle import settle
from run.show import Progress, in_words, say
from run.stop import Stop


def main(s):
    """Train in out_dir, while no other process does."""
    s.out_dir = os.path.expanduser(s.out_dir)
    with Folder(s.out_dir) as folder:
        start(s, folder, began=time.perf_counter())


def start(s, folder, began):
    method, checkpoint, fill, weight_dtype, compute_dtype = settle(s, folder)
    agreed = None if s.dry_run else s.as_dict()  # what all ranks of torchrun must have alike
    ranks = Ranks(s.device, agreed, s.rank_timeout, s.gradient_accumulation_steps)
    if s.dry_run:
        return fits(s, ranks, weight_dtype, compute_dtype)
    make_data(s, ranks)
    train_data = open_windows(s, "train", seed=s.seed)
    val_data = open_windows(s, "val", seed=None)  # in file order
    fits(s, ranks, weight_dtype, compute_dtype)

    torch.manual_seed(s.seed)
    try:
        model, optimizer = method.build(s, s.device, weight_dtype, ranks, fill)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if s.compile:
        compile_fused(s.device)
    run = Run(s, method, model, optimizer, train_data, val_data, ranks)
    ranks.loss_scale = loss_scale(s, compute_dtype)
    if compute_dtype != weight_dtype:
        run.autocast = torch.autocast(s.device, compute_dtype)
    run.figures = special_loss(run, checkpoint)
    if checkpoint is not None:
        restore(run, checkpoint)
    if s.eval_only:
        loss = run.evaluate()
        check_finite(run, loss)
        say(f"--- {s.init_from}: val loss {loss:.4f}{in_words(run.figures('val_'))}")
        return ranks.leave()

    windows = {"training windows": train_data.total, "validation windows": val_data.total}
    ranks.agree(windows | {"step": run.it})
    if ranks.rank == 0:
        folder.begin(goes_on=checkpoint is not None)
        run.folder = folder
        run.log = Log(s, folder, checkpoint)
        begin(run)
    run.stop = Stop(s.max_minutes, ranks.size == 1, began)
    del checkpoint
    finished = run.loop()
    ranks.leave()
    if ranks.rank == 0:
        end(run, finished)


# -----------------------------------------------------------------------------
# training


def learning_rate_at(it, s, method):
    """Linear warm-up, then a cosine to min_lr, then min_lr."""
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    lr = s.learning_rate
    if s.decay_lr:
        steps = (s.lr_decay_iters or s.max_iters) - s.warmup_iters
        progress = min(1.0, (it - s.warmup_iters) / max(1, steps))
        min_lr = s.min_lr if s.min_lr >= 0 else s.learning_rate / 10
        lr = min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - min_lr)
    return method.rate(s, it) * lr


class Run:
    """A model in training, and all that its loop needs."""

    def __init__(self, s, method, model, optimizer, train_data, val_data, ranks):
        self.s = s
        self.method = method
        self.model = model
        self.optimizer = optimizer
        self.train_data = train_data
        self.val_data = val_data
        self.ranks = ranks
        self.autocast = nullcontext()
        self.clock = Clock(s, ranks, flops_per_token(model.config))
        self.it = 0  # steps taken
        self.saved = "there is no checkpoint"
        self.val_loss = self.folder = self.log = self.stop = None

    def loop(self):
        """Train to the end; False if the run was stopped before."""
        s = self.s
        self.check_ranks("at the start")
        progress = Progress(total=s.max_iters, unit="steps", done=self.it,
                            shown=self.ranks.rank == 0)
        start = self.it
        stopping = False
        self.clock.start(self.it)
        while True:
            if self.it % s.eval_interval == 0 or self.it >= s.max_iters:
                self.val_loss = self.evaluate()
                tokens = self.it * self.clock.tokens_per_step
                more = self.figures("val_")
                self.write({"iter": self.it, "val_loss": self.val_loss, "tokens": tokens} | more)
                check_finite(self, self.val_loss)
                say(f"step {self.it}: val loss {self.val_loss:.4f}{in_words(more)}")
                if self.it > start:
                    self.save()
                self.clock.start(self.it)
            if self.it >= s.max_iters:
                break
            lr = learning_rate_at(self.it, s, self.method)
            loss = self.step(lr)
            figures = None
            stopping = self.ranks.any(self.stop.asked())
            if (self.it - 1) % s.log_interval == 0 or stopping:
                entry = self.report(loss, lr)
                figures = f"loss {entry['loss']:.3f}, {entry['tokens_per_s']:,.0f} tokens/s"
            progress.advance(figures=figures)
            if stopping:
                self.save()
                break
        progress.close()
        return not stopping

    def step(self, lr):
        """One step: all micro-batches of this rank. Returns their loss, () on the device."""
        s, optimizer = self.s, self.optimizer
        self.method.before_step(self.model, optimizer, s, self.it)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = []
        for _ in range(s.gradient_accumulation_steps // self.ranks.size):
            batches.append(self.train_data.batch(s.batch_size, self.ranks.rank, self.ranks.size))
        shares = shares_of(batches, self.train_data, s, self.ranks)
        batches = [self.on_device(batch) for batch in batches]
        if s.by_block:
            loss = forward_backward(self.model, batches, shares, optimizer, self.autocast)
        else:
            loss = torch.zeros((), device=s.device)
            for i, (x, y, documents) in enumerate(batches):
                optimizer.accumulating = i < len(batches) - 1
                with self.autocast:
                    micro_loss = self.model(x, y, documents=documents) * shares[i]
                micro_loss.backward()  # in-backward methods also update the weights here
                loss += micro_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        self.it += 1
        return loss / self.ranks.loss_scale

    def on_device(self, batch):
        x, y, documents = batch  # documents are read on the host
        return *(t.to(self.s.device, non_blocking=True) for t in (x, y)), documents

    @torch.no_grad()
    def evaluate(self):
        """The mean loss of the validation set's first eval_iters batches, divided among ranks."""
        s, data = self.s, self.val_data
        data.position = 0
        batches = min(s.eval_iters, data.total // s.batch_size)
        batches = max(1, batches)  # a validation set smaller than a batch still counts
        loss = 0.0
        counted = 0
        for i in range(batches):
            x, y, documents = self.on_device(data.batch(s.batch_size))
            weight = data.weight(y, documents)
            counted += weight
            if i % self.ranks.size == self.ranks.rank:
                with self.autocast:
                    loss += self.model(x, y, documents=documents).item() * weight
        return self.ranks.total(loss) / (counted or math.nan)  # nan: there is no target

    def report(self, loss, lr):
        """Log the step that was just taken; returns the entry."""
        loss = self.ranks.total(loss.item())  # a sync point
        if not math.isfinite(loss):
            check_finite(self)
        entry = {"iter": self.it - 1, "loss": loss, "lr": lr} | self.clock.lap(self.it)
        entry |= self.optimizer.pop_stats() | self.figures("")
        if refreshes := self.optimizer.pop_refreshes():
            entry["subspaces"] = refreshes
        self.write(entry)
        return entry

    def write(self, entry):
        if self.ranks.rank == 0:
            self.log.write(entry)

    def check_ranks(self, when):
        self.ranks.check_identical(whole_state(self.model, self.optimizer), when)

    def save(self):
        check_finite(self)
        self.check_ranks(f"at step {self.it}")
        if self.ranks.rank > 0:
            return
        self.log.sync()
        checkpoint = {
            "config": self.s.as_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iter": self.it,
            "position": self.train_data.position,
            "shards": shards_of(self.train_data),
            "wandb_id": self.log.wandb_id,
        }
        save_checkpoint(self.folder.now, checkpoint, self.s.keep_checkpoints)
        self.folder.settle(self.log)
        self.saved = f"{self.folder.path}/ckpt.pt has step {self.it}"


if __name__ == "__main__":
    main(s)
