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

import glob
import math
import os
import sys
import time
from contextlib import nullcontext

# blocks of freed memory can grow and be reused at any size: else fragments count against the card
# (torch 2.8 to 2.11 say that the name is deprecated; 2.9 does not listen to the new one)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from tqdm import tqdm

from configurator import above, at_least, between, configure, one_of
from kernels.moments import ACCUMULATION, MOMENTS
from methods.registry import find
from prepare_c4 import prepare
from qgalore import SIDES
from run.checkpoint import check_same_model, load_checkpoint, save_checkpoint, starting_model
from run.data import Windows
from run.device import GIB, check_device, memory_free, memory_peak, peak_flops, pick_device, pick_dtype
from run.encodings import fingerprint, get_encoding
from run.log import Log
from run.memory import memory_plan, print_plan, refuse_what_does_not_fit
from run.plot import plot_loss
from run.ranks import IN_FLIGHT, Ranks
from run.stop import Stop
from sample import stream

# -----------------------------------------------------------------------------
# output
out_dir = "out"  # config.json, log.jsonl, ckpt.pt, loss.png
keep_checkpoints: at_least(1) = 2  # ckpt.pt, and before it ckpt-1.pt ...
eval_interval: at_least(1) = 500  # steps between evaluations; each is followed by a checkpoint
eval_iters: at_least(1) = 40  # batches an evaluation reads, always the same ones
log_interval: at_least(1) = 10  # steps between lines of log.jsonl
eval_only = False  # evaluate once and leave, writing nothing
init_from = "scratch"  # "resume": out_dir's newest checkpoint; or a Hugging Face directory or repository
max_minutes: at_least(0) = 0.0  # save and leave after so many; 0 = never
sample_tokens: at_least(0) = 0  # tokens to generate and show at the end
wandb_log = False
tensorboard_log = False
project = "qgalore"  # name of the W&B project
dry_run = False  # print the memory that this run would take, and leave
# data
data_dir = "data/c4"  # *_train_*.bin and *_val_*.bin, as prepare_c4.py and llm.c write them
data_input = ""  # what to make data_dir's shards of if it has none: "docs", or text files
encoding = ""  # of the shards, see run/encodings.py; "": gpt2, or the Hugging Face checkpoint's own
batch_size: at_least(1) = 16  # sequences a micro-batch
block_size: at_least(1) = 256  # tokens a sequence
gradient_accumulation_steps: at_least(1) = 1  # micro-batches a step, of all ranks together
# model (a Hugging Face checkpoint brings its own)
n_layer: at_least(1) = 8
n_head: at_least(1) = 8
n_kv_head: at_least(0) = 0  # key/value heads, 0 = n_head
n_embd: at_least(1) = 512
ffn_dim: at_least(1) = 1376
vocab_size: at_least(1) = 50304  # GPT-2's 50257, padded to a multiple of 64
rope_theta: above(0) = 10000.0
tie_embedding = False
checkpoint_activations = False  # make each block's forward again in backward; keep only its input
checkpoint_bits: one_of(8, 16) = 16  # of those inputs: 16, as they are; 8, in INT8
compile = False  # torch.compile what lies between the matrices: norms, RoPE, SwiGLU
# method
method = "qgalore"  # or "adamw", "galore", "lora" ...: see docs/methods.md
rank: at_least(1) = 128  # of the projections, or of LoRA's adapters
proj_gap: at_least(1) = 200  # steps between a layer's refreshes, at first; or relora's restarts
gap_growth: at_least(0) = 0.0  # the gap before refresh i is longer by gap_growth^i (loqt: 1.2)
proj_threshold = 0.4  # mean similarity at which a layer's gap doubles; over 1: never
proj_k: at_least(1) = 5  # refreshes in that mean
proj_bits: one_of(4, 8, 16) = 4  # of the bases; 16: not quantised
proj_side: one_of(*SIDES) = "auto"  # of a weight, that is projected: the smaller; or the inputs: right
proj_svd = False  # exact singular vectors of the formed gradient, in place of the range finder
residual_blocks: at_least(1) = 1  # muon, fira: a step sees each such row of the gradient itself
galore_scale = 0.25  # projected weights move at learning_rate * galore_scale
weight_bits: one_of(0, 4, 8, 16, 32) = 0  # of the blocks' matrices; 0: the method's own, 4: NF4
weight_group_size: at_least(1) = 256
freeze_embedding = False  # embedding and head stay: saves their gradients and moments in fine-tuning
embed_bits: one_of(8, 16) = 16  # of a frozen embedding and head: 8 (INT8), 16 (in `dtype`)
lora_alpha: at_least(1) = 32.0  # adapters count alpha / rank times
matmul: one_of("float", "int8") = "float"  # int8: x and dy rounded to 8 bits, on INT8 tensor cores
stochastic_rounding = True  # False: INT8 weights round to nearest
moments: one_of(*MOMENTS) = "factored"  # Adam's: see kernels/moments.py; 8bit: the paper's
accumulation: one_of(*ACCUMULATION) = "int8"  # what low-rank gradients of micro-batches add up in
# optimizer
learning_rate: at_least(0) = 0.01
max_iters: at_least(0) = 10000  # steps
weight_decay: at_least(0) = 0.0  # decoupled, on matrices
beta1: between(0, 1) = 0.9
beta2: between(0, 1) = 0.999
adam_eps: at_least(0) = 1e-8
grad_clip: at_least(0) = 0.0  # the norm of all gradients, see QGaLore; 0 = off
decay_lr = True  # cosine from learning_rate to min_lr
warmup_iters: at_least(0) = 1000
lr_decay_iters: at_least(0) = 0  # 0 = max_iters
min_lr = -1.0  # negative = a tenth of learning_rate
# system
device: one_of("auto", "cuda", "cpu") = "auto"  # cuda where there is one, else cpu
dtype: one_of("auto", "bfloat16", "float32") = "auto"  # bfloat16 where the GPU has it, else float32
seed = 1337
rank_timeout: above(0) = 600.0  # seconds that ranks wait for each other, and for a checkpoint
# -----------------------------------------------------------------------------


def main():
    began = time.perf_counter()
    s = configure(sys.modules[__name__])
    method, checkpoint, fill = settle(s)
    weight_dtype, compute_dtype = choose_floats(s)
    ranks = find_ranks(s)
    if not plan_memory(s, ranks, weight_dtype, compute_dtype):
        return
    train_data, val_data = open_data(s, ranks)

    torch.manual_seed(s.seed)
    try:
        model, optimizer = method.build(s, s.device, weight_dtype, ranks, fill)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        train_data.position = checkpoint["position"]
    if s.compile:
        model.compile_pointwise()
    run = Run(s, method, model, optimizer, train_data, val_data, ranks)
    if compute_dtype != weight_dtype:
        run.autocast = torch.autocast(s.device, compute_dtype)
    if s.eval_only:
        tell(ranks, f"--- {s.init_from}: val loss {run.evaluate():.4f}")
        return

    run.it = checkpoint["iter"] if checkpoint else 0
    windows = {"training windows": train_data.total, "validation windows": val_data.total}
    ranks.agree(windows | {"step": run.it})
    run.log = Log(s, checkpoint, writes=ranks.rank == 0)
    run.stop = Stop(s.max_minutes, ranks.size == 1, began)
    tell_clamped(s, optimizer, ranks)
    del checkpoint
    finished = run.loop()
    ranks.leave()
    if ranks.rank == 0:
        end(s, run, finished)


# -----------------------------------------------------------------------------
# before the first step


def settle(s):
    """Let a checkpoint, a starting model and the method say what is theirs of the settings.

    Returns (Method, the run's checkpoint or None, what fills the model or None)."""
    method = find(s.method)
    checkpoint = load_checkpoint(s.out_dir) if s.init_from == "resume" else None
    fill = starting_model(s, checkpoint)
    method.settle(s)
    method.check_model(s)
    s.lr_decay_iters = s.lr_decay_iters or s.max_iters
    if s.min_lr < 0:
        s.min_lr = s.learning_rate / 10
    if checkpoint is not None:
        check_same_model(checkpoint, s)
    return method, checkpoint, fill


def choose_floats(s):
    """(dtype of float weights, dtype of computation); s.device and s.dtype become what is meant."""
    s.device = pick_device(s.device)
    if not s.dry_run:
        check_device(s.device)
    compute_dtype = pick_dtype(s.dtype, s.device)
    s.dtype = str(compute_dtype).removeprefix("torch.")
    weight_dtype = torch.float32 if s.weight_bits == 32 else compute_dtype
    return weight_dtype, compute_dtype


def find_ranks(s):
    """The other ranks, if torchrun started this one; all have to have the same settings."""
    facts = None if s.dry_run else s.as_dict()
    return Ranks(s.device, facts, s.rank_timeout, s.gradient_accumulation_steps)


def plan_memory(s, ranks, weight_dtype, compute_dtype):
    """Count what the run takes before anything is allocated; False if that is all that is asked."""
    held = s.gradient_accumulation_steps  # micro-batches whose gradients a rank sums up
    if not s.grad_clip:
        held //= ranks.size
    try:
        plan = memory_plan(s.changed(gradient_accumulation_steps=held), weight_dtype, compute_dtype)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if ranks.size > 1:
        plan["sums in flight"] = 2 * IN_FLIGHT  # as they are sent, and in float32
    here = s.device == "cpu" or torch.cuda.is_available()
    free = memory_free(s.device) if here else None
    if s.dry_run:
        print_plan(plan, free, s.device)
        return False
    refuse_what_does_not_fit(plan, free, s.device)
    return True


def open_data(s, ranks):
    """Windows of the training and of the validation shards, which are made if need be."""
    shards = os.path.join(s.data_dir, "*_{}_*.bin")
    if ranks.rank == 0 and s.data_input and not glob.glob(shards.format("train")):
        prepare(input=s.data_input, out_dir=s.data_dir, encoding=s.encoding)
    ranks.agree({})  # the others wait for the shards
    vocabulary = {}
    if s.pretrained:  # the tokenizer's numbers are the rows of the embedding
        tokenizer = get_encoding(s.encoding)
        vocabulary = {"n_vocab": tokenizer.n_vocab, "fingerprint": fingerprint(tokenizer)}
    sizes = s.block_size, s.vocab_size
    train_data = Windows(shards.format("train"), *sizes, seed=s.seed, **vocabulary)
    val_data = Windows(shards.format("val"), *sizes, seed=None, **vocabulary)
    return train_data, val_data


def tell(ranks, text):
    if ranks.rank == 0:
        tqdm.write(text)


def tell_clamped(s, optimizer, ranks):
    """Say which weights are too small for the rank."""
    clamped = [w.name for w in getattr(optimizer, "weights", ()) if w.projection.rank < s.rank]
    if clamped:
        tell(ranks, f"note: rank {s.rank} is larger than the smaller side of {len(clamped)} "
             f"matrices, {clamped[0]} among them: these train at full rank")


# -----------------------------------------------------------------------------
# training


def learning_rate_at(it, s, method):
    """Linear warm-up, then a cosine to min_lr, then min_lr."""
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    lr = s.learning_rate
    if s.decay_lr:
        progress = (it - s.warmup_iters) / max(1, s.lr_decay_iters - s.warmup_iters)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        lr = s.min_lr + cosine * (s.learning_rate - s.min_lr)
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
        self.in_backward = hasattr(optimizer, "accumulating")  # else torch's own steps
        self.autocast = nullcontext()
        self.tokens_per_step = s.batch_size * s.block_size * s.gradient_accumulation_steps
        self.it = 0  # steps taken
        self.val_loss = None
        self.log = self.stop = None

    def loop(self):
        """Train to the end; False if the run was stopped before."""
        s = self.s
        self.ranks.check_identical(self.state(), "at the start")
        bar = tqdm(total=s.max_iters, initial=self.it, unit="step", dynamic_ncols=True,
                   disable=None if self.ranks.rank == 0 else True)
        start = self.it
        stopping = False
        self.start_clock()
        while True:
            if self.it % s.eval_interval == 0 or self.it >= s.max_iters:
                self.val_loss = self.evaluate()
                tokens = self.it * self.tokens_per_step
                self.log.write({"iter": self.it, "val_loss": self.val_loss, "tokens": tokens})
                tell(self.ranks, f"step {self.it}: val loss {self.val_loss:.4f}")
                if self.it > start:
                    self.save()
                self.start_clock()
            if self.it >= s.max_iters:
                break
            lr = learning_rate_at(self.it, s, self.method)
            loss = self.step(lr)
            bar.update()
            stopping = self.ranks.any(self.stop.asked())
            if (self.it - 1) % s.log_interval == 0 or stopping:
                entry = self.report(loss, lr)
                bar.set_postfix(
                    loss=f"{entry['loss']:.3f}", tokens_per_s=f"{entry['tokens_per_s']:.0f}"
                )
            if stopping:
                self.save()
                break
        bar.close()
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
        shares = self.shares(batches)
        loss = torch.zeros((), device=s.device)
        for i, batch in enumerate(batches):
            x, y, documents = self.on_device(batch)
            optimizer.accumulating = i < len(batches) - 1
            with self.autocast:
                micro_loss = self.model(x, y, documents=documents) * shares[i]
            micro_loss.backward()  # where weights step in backward, this is most of the step, too
            loss += micro_loss.detach()
        if not self.in_backward:
            self.sum_and_clip()
        optimizer.step()
        if not self.in_backward:
            optimizer.zero_grad()
        self.it += 1
        return loss

    def shares(self, batches):
        """What each micro-batch's mean loss counts in the step's.

        Micro-batches of examples have unequal numbers of targets, and each target counts alike."""
        if not self.train_data.rows:
            return [1 / self.s.gradient_accumulation_steps] * len(batches)
        targets = [(y >= 0).sum().item() for _, y, _ in batches]
        of_step = max(1, self.ranks.total(sum(targets)))
        return [n / of_step for n in targets]

    def sum_and_clip(self):
        """For an optimizer of torch's: sum gradients over ranks, clip them by their norm."""
        for p in self.model.parameters():
            if p.grad is not None:
                self.ranks.sum_(p.grad, lambda grad: None)
        self.ranks.land()
        limit = self.s.grad_clip or math.inf
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def on_device(self, batch):
        return [t if t is None else t.to(self.s.device, non_blocking=True) for t in batch]

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
            weight = (y >= 0).sum().item() if data.rows else 1  # examples' targets count alike
            counted += weight
            if i % self.ranks.size == self.ranks.rank:
                with self.autocast:
                    loss += self.model(x, y, documents=documents).item() * weight
        return self.ranks.total(loss) / max(1, counted)

    def start_clock(self):
        self.clock = time.perf_counter()
        self.clock_it = self.it
        self.ranks.sent = 0

    def report(self, loss, lr):
        """Log the step that was just taken; returns the entry."""
        s, ranks = self.s, self.ranks
        entry = {"iter": self.it - 1, "loss": ranks.total(loss.item()), "lr": lr}  # a sync point
        entry["tokens"] = self.it * self.tokens_per_step
        steps = self.it - self.clock_it
        seconds = time.perf_counter() - self.clock
        entry["tokens_per_s"] = steps * self.tokens_per_step / seconds
        if ranks.size > 1:  # what a rank hands to torch.distributed
            entry["sent_mb"] = ranks.sent / steps / 1e6
        entry["peak_memory_gb"] = memory_peak(s.device)
        if s.device == "cuda":  # with what lies in fragments
            entry["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / GIB
        if self.in_backward:
            entry |= self.optimizer.pop_stats()
            if refreshes := self.optimizer.pop_refreshes():
                entry["subspaces"] = refreshes
        else:
            entry["grad_norm"] = self.norm.item()
        if peak := peak_flops(s.device):
            flops = entry["tokens_per_s"] * self.model.flops_per_token()
            entry["mfu"] = flops / (peak * ranks.size)
        self.log.write(entry)
        self.start_clock()
        return entry

    def state(self):
        """What all ranks hold alike, by name."""
        state = dict(self.model.state_dict())
        for part, of in self.optimizer.state_dict().items():
            if isinstance(of, dict):
                state |= {f"{part} of {name}": value for name, value in of.items()}
        return state

    def save(self):
        self.ranks.check_identical(self.state(), f"at step {self.it}")
        if self.ranks.rank == 0:
            self.log.sync()
            checkpoint = {
                "config": self.s.as_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "iter": self.it,
                "position": self.train_data.position,
            }
            save_checkpoint(self.s.out_dir, checkpoint, self.s.keep_checkpoints)


# -----------------------------------------------------------------------------
# after the last step


def end(s, run, finished):
    """Draw loss.png, show a sample, say what to do next."""
    plot_loss(s.out_dir)
    if not finished:
        print(f"{run.stop.reason()}: saved step {run.it}; "
              "go on with the same command and --init_from=resume")
        return
    if s.sample_tokens:
        prompt = run.val_data.batch(1)[0][:, :32].to(s.device)
        print("--- a sample: the prompt, then what the model makes of it")
        stream(run.model, get_encoding(s.encoding), prompt, s.sample_tokens, temperature=0.7,
               top_k=40, top_p=1.0, seed=s.seed)
    print(f"--- {s.out_dir}: val loss {run.val_loss:.4f}, peak memory "
          f"{memory_peak(s.device):.2f} GiB; see {s.out_dir}/loss.png")
    print(f"next: python sample.py --out_dir={s.out_dir} --prompt='The function'")
    if s.pretrained:
        print(f"      python -m finetune.hf --out_dir={s.out_dir} --export={s.out_dir}-hf"
              "     # for transformers")
    else:
        print("      python prepare_c4.py --shards=1 && python train.py config/llama_60m.py")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("error: stopped at once, without saving: --init_from=resume goes on from "
                         "the last checkpoint")
    except OSError as e:  # a full disk, most likely
        raise SystemExit(f"error: {e}")
