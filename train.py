"""
Train a LLaMA on token shards by Q-GaLore, or by full-rank Adam, GaLore, LoRA to compare, on GPUs, or the CPU:
    python train.py config/demo.py                          # minutes on any machine, nothing to download
    python train.py config/llama_7b.py --dry_run=True       # what it takes, before it takes it
    python train.py config/llama_7b.py --init_from=resume   # go on after a stop
    python train.py config/finetune_smollm2.py              # fine-tune a checkpoint from the Hugging Face hub
    torchrun --standalone --nproc_per_node=2 train.py config/llama_7b.py    # the same run on two GPUs
"""

import glob
import json
import math
import os
import signal
import time
from contextlib import nullcontext

# blocks of freed memory can grow and be reused at any size: without it, what lies in fragments counts against the card.
# (torch 2.8 to 2.11 say that the name is deprecated; 2.9 does not listen to the new one)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from tqdm import tqdm

from run.checkpoint import check_same_model, load_checkpoint, paths, save_checkpoint
from configurator import configure
from run.data import Windows
from run.device import GIB, PEAK_FLOPS, memory_free, memory_peak
from run.memory import memory_plan, print_plan, refuse_what_does_not_fit
from methods.registry import build, of_method, of_model, restart
from methods.moments import ACCUMULATION, AT_REFRESH, MOMENTS
from run.ranks import IN_FLIGHT, Ranks
from run.plot import plot_loss, read_log
from prepare_c4 import prepare
from run.shards import replacing
from sample import stream
from run.encodings import fingerprint, get_encoding

# -----------------------------------------------------------------------------
# output
out_dir = "out"  # config.json, log.jsonl, ckpt.pt, loss.png
keep_checkpoints = 2  # ckpt.pt, and before it ckpt-1.pt ...
eval_interval = 500  # steps between evaluations; each is followed by a checkpoint
eval_iters = 40  # batches an evaluation reads, always the same ones
log_interval = 10  # steps between lines of log.jsonl
eval_only = False  # evaluate once and leave
init_from = "scratch"  # "resume": out_dir's newest whole checkpoint; else a Hugging Face directory or repository
max_minutes = 0.0  # save and leave after so many; 0 = never
sample_tokens = 0  # tokens to generate and show at the end
wandb_log = False
tensorboard_log = False
project = "qgalore"  # name of the W&B project
dry_run = False  # print the memory that this run would take, and leave
# data
data_dir = "data/c4"  # *_train_*.bin and *_val_*.bin, as prepare_c4.py, prepare_sft.py and llm.c write them
data_input = ""  # what to make data_dir's shards of if it has none: "docs", or text files (prepare_c4.py's --input)
encoding = ""  # of the shards: what get_encoding (tokenizer.py) knows; "": gpt2, or the Hugging Face checkpoint's own
batch_size = 16  # sequences a micro-batch
block_size = 256  # tokens a sequence
gradient_accumulation_steps = 1  # micro-batches a step, of all ranks together
# model (a Hugging Face checkpoint brings its own)
n_layer = 8
n_head = 8
n_kv_head = 0  # key/value heads, 0 = n_head
n_embd = 512
ffn_dim = 1376
vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64
rope_theta = 10000.0
tie_embedding = False
checkpoint_activations = False  # compute each block's forward again in backward; keep only its input
checkpoint_bits = 16  # of those inputs: 16, as they are; 8, in INT8
compile = False  # torch.compile what lies between the matrices: norms, RoPE, SwiGLU
# method
method = "qmuon"  # Muon at Q-GaLore's memory; or "qgalore", the paper's, "adamw", "loqt", "lora" ...: see methods.py
rank = 128  # of the projections, or of LoRA's adapters
proj_gap = 200  # steps between a layer's refreshes, at first; between the restarts of relora
gap_growth = 0.0  # the gap before refresh i is longer by gap_growth^i (loqt: 1.2)
proj_threshold = 0.4  # mean similarity at which a layer's gap doubles; over 1: never
proj_k = 5  # refreshes in that mean
proj_bits = 4  # 4, 8 or 16 (not quantised)
proj_side = "auto"  # of a weight, that is projected: the smaller; or "right" (its inputs), "left"
proj_svd = False  # exact singular vectors of the formed gradient, in place of the range finder
residual_blocks = 1  # of (q)muon, (q)fira: a step sees each such row of the gradient itself; 2: half of its sums
galore_scale = 0.25  # projected weights move at learning_rate * galore_scale
moments_at_refresh = "keep"  # Adam's, when the subspace turns; or "reset", "rotate" into the new basis
weight_bits = 0  # of the blocks' matrices: 4 (NF4), 8, 16 (in `dtype`), 32 (float32); 0: the method's own
weight_group_size = 256
freeze_embedding = False  # embedding and head stay as they are: saves their gradients and moments in fine-tuning
embed_bits = 16  # of a frozen embedding and head: 8 (INT8), 16 (in `dtype`)
lora_alpha = 32.0  # adapters count alpha / rank times
matmul = "float"  # or "int8": forward and input gradient on the INT8 tensor cores, x and dy rounded to 8 bits
stochastic_rounding = True  # False: INT8 weights round to nearest
moments = "factored"  # Adam's: first in INT8, second as a row and a column; or "8bit" (bitsandbytes), "float32"
accumulation = "int8"  # what low-rank gradients of micro-batches add up in (muons': the momentum); or "bfloat16", "float32"
# optimizer
learning_rate = 0.01
max_iters = 10000  # steps
weight_decay = 0.0  # decoupled, on matrices
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 0.0  # the norm of all gradients, see QGaLore; 0 = off
decay_lr = True  # cosine from learning_rate to min_lr
warmup_iters = 1000
lr_decay_iters = 0  # 0 = max_iters
min_lr = -1.0  # negative = a tenth of learning_rate
# system
device = "auto"  # cuda where there is one, else cpu
dtype = "auto"  # bfloat16 where the GPU has it, else float32
seed = 1337
rank_timeout = 600.0  # seconds that torchrun's ranks wait for each other, and so for a checkpoint to be written
# -----------------------------------------------------------------------------

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "4060 Ti": 44e12,
              "3060 Ti": 32e12, "3060": 25e12}  # dense bf16, float32 accumulation (NVIDIA's data sheets)


def learning_rate_at(it):
    """Linear warm-up, then a cosine to min_lr, then min_lr."""
    low = min_lr if min_lr >= 0 else learning_rate / 10
    last = lr_decay_iters or max_iters
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    warm = min(1.0, (it % proj_gap + 1) / (proj_gap // 10 + 1)) if method == "relora" else 1.0  # again at each restart
    if not decay_lr:
        return warm * learning_rate
    progress = min(1.0, (it - warmup_iters) / max(1, last - warmup_iters))
    return warm * (low + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - low))


def main():
    began, config = time.perf_counter(), configure(globals())
    config["n_kv_head"] = n_kv_head or n_head
    config |= of_method(config)
    checkpoint = load_checkpoint(out_dir) if init_from == "resume" else None
    config |= of_model(config, checkpoint)
    config["encoding"] = encoding or config["pretrained"] or "gpt2"
    if checkpoint:
        check_same_model(checkpoint, config)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise SystemExit(f"error: device {device!r}: there are auto, cuda and cpu")
    for key in ("batch_size", "block_size", "gradient_accumulation_steps", "eval_interval", "eval_iters",
                "log_interval", "n_layer", "n_head", "n_embd", "ffn_dim", "vocab_size", "rank", "proj_gap", "proj_k",
                "residual_blocks", "keep_checkpoints", "lora_alpha"):
        if config[key] < 1:
            raise SystemExit(f"error: {key} must be at least 1, not {config[key]}")
    have_device = kind == "cpu" or torch.cuda.is_available()
    for key, choices in (("proj_bits", (4, 8, 16)), ("embed_bits", (8, 16)), ("checkpoint_bits", (8, 16)),
                         ("moments", MOMENTS), ("matmul", ("float", "int8")), ("accumulation", ACCUMULATION),
                         ("moments_at_refresh", AT_REFRESH), ("proj_side", ("auto", "left", "right"))):
        if config[key] not in choices:
            raise SystemExit(f"error: {key} is one of {choices}, not {config[key]!r}")
    if not have_device and not dry_run:
        raise SystemExit("error: device=cuda, but torch finds no CUDA GPU; use --device=cpu, or mend the driver")
    no_bf16 = kind == "cuda" and have_device and not torch.cuda.is_bf16_supported(including_emulation=False)
    name = dtype if dtype != "auto" else "bfloat16" if kind == "cuda" and not no_bf16 else "float32"
    if name not in ("float32", "bfloat16"):
        raise SystemExit(f"error: dtype {dtype!r}: there are auto, bfloat16 and float32")
    if no_bf16 and name == "bfloat16":
        raise SystemExit("error: this GPU has no bfloat16 (Ampere and later have): use --dtype=float32")
    if no_bf16:
        print("note: this GPU has no bfloat16: everything runs in float32, with twice the activations")
    compute_dtype = getattr(torch, name)
    weight_dtype = torch.float32 if config["weight_bits"] == 32 else compute_dtype

    # the other ranks, if torchrun started this one
    facts = None if dry_run else config | {"device": kind, "dtype": name, "load": ""}
    ranks = Ranks(kind, facts, rank_timeout, gradient_accumulation_steps)
    main_rank = ranks.rank == 0  # the one that writes
    micro_batches = gradient_accumulation_steps // ranks.size  # of this rank

    # memory, before anything is allocated
    try:
        held = gradient_accumulation_steps if grad_clip else micro_batches  # with grad_clip ranks keep all gradients
        plan = memory_plan(config | {"gradient_accumulation_steps": held, "load": ""}, build, weight_dtype,
                           compute_dtype)
        if ranks.size > 1:
            plan["sums in flight"] = 2 * IN_FLIGHT  # as they are sent, and in float32
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    free = memory_free(kind) if have_device else None
    if dry_run:
        print_plan(plan, free, kind)
        return
    refuse_what_does_not_fit(plan, free, kind)

    # data
    if main_rank and data_input and not glob.glob(os.path.join(data_dir, "*_train_*.bin")):
        prepare(input=data_input, out_dir=data_dir, encoding=config["encoding"])
    ranks.agree({})  # the others wait for the shards
    tokens = get_encoding(config["encoding"]) if config["pretrained"] else None  # its numbers are the embedding's rows
    vocabulary = {"n_vocab": tokens.n_vocab, "fingerprint": fingerprint(tokens)} if tokens else {}
    windows = lambda part, seed: Windows(os.path.join(data_dir, f"*_{part}_*.bin"), block_size, config["vocab_size"],
                                         seed, **vocabulary)
    train_data, val_data = windows("train", seed), windows("val", None)

    # model and optimizer, before anything is written: a checkpoint may turn out to be damaged
    torch.manual_seed(seed)
    try:
        model, optimizer = build(config, kind, weight_dtype, ranks)
    except ValueError as e:
        raise SystemExit(f"error: {e}")

    # output folder
    log_path = os.path.join(out_dir, "log.jsonl")
    start, train_data.position = (checkpoint["iter"], checkpoint["position"]) if checkpoint else (0, 0)
    ranks.agree({"training windows": train_data.total, "validation windows": val_data.total, "step": start})
    try:
        if main_rank:
            os.makedirs(out_dir, exist_ok=True)
            if checkpoint is None:  # a run that was here before is set aside, not overwritten
                for path in (*paths(out_dir), *glob.glob(glob.escape(log_path))):
                    os.replace(path, os.path.join(out_dir, "previous_" + os.path.basename(path)))
            else:  # drop what was logged after the checkpoint: those steps come again
                for path in checkpoint["damaged"]:
                    os.replace(path, os.path.join(out_dir, "damaged_" + os.path.basename(path)))
                log_before = read_log(log_path) if os.path.exists(log_path) else []
                kept = [json.dumps(entry) + "\n" for entry in log_before if entry["iter"] < start]
                with replacing(log_path) as f:
                    f.write("".join(kept).encode())
            with replacing(os.path.join(out_dir, "config.json")) as f:
                f.write(json.dumps(config, indent=1).encode())
            log_file = open(log_path, "a", buffering=1)  # a line is on its way to disk as soon as it is written
    except OSError as e:
        raise SystemExit(f"error: cannot write to out_dir {out_dir}: {e.strerror}")

    if compile:
        model.compile_pointwise()
    by_torch = isinstance(optimizer, torch.optim.Optimizer)
    clamped = [] if by_torch else [name for name, p in optimizer.projections.items() if p.rank < config["rank"]]
    if clamped and main_rank:
        print(f"note: rank {rank} is larger than the smaller side of {len(clamped)} matrices, {clamped[0]} among "
              f"them: these train at full rank")
    autocast = torch.autocast(kind, compute_dtype) if compute_dtype != weight_dtype else nullcontext()
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        del checkpoint

    def on_device(batch):
        return [t if t is None else t.to(kind, non_blocking=True) for t in batch]

    @torch.no_grad()
    def evaluate():
        val_data.position = 0
        n, loss, counted = max(1, min(eval_iters, val_data.total // batch_size)), 0.0, 0
        for i in range(n):
            x, y, documents = on_device(val_data.batch(batch_size))
            weight = (y >= 0).sum().item() if val_data.rows else 1  # by examples' targets, or all batches alike
            counted += weight
            if i % ranks.size == ranks.rank:
                with autocast:
                    loss += model(x, y, documents=documents).item() * weight
        return ranks.total(loss) / max(1, counted)

    def state():
        """What all ranks hold alike, by name."""
        parts = {part: of for part, of in optimizer.state_dict().items() if isinstance(of, dict)}
        return model.state_dict() | {f"{part} of {name}": t for part, of in parts.items() for name, t in of.items()}

    def save(it):
        ranks.check_identical(state(), f"at step {it}")
        if main_rank:
            os.fsync(log_file.fileno())  # the lines before a checkpoint are never written again
            save_checkpoint(out_dir, {"config": config, "model": model.state_dict(),
                                      "optimizer": optimizer.state_dict(), "iter": it,
                                      "position": train_data.position}, keep_checkpoints)

    try:
        if wandb_log and main_rank:
            import wandb

            wandb.init(project=project, name=out_dir, config=config)
        if tensorboard_log and main_rank:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
    except ImportError as e:
        raise SystemExit(f"error: wandb_log or tensorboard_log is set, but there is no {e.name}: pip install {e.name}")

    def log(entry):
        if not main_rank:
            return
        log_file.write(json.dumps(entry) + "\n")
        numbers = {key: value for key, value in entry.items() if key != "subspaces"}
        if wandb_log:
            wandb.log(numbers, step=entry["iter"])
        if tensorboard_log:
            for key, value in numbers.items():
                writer.add_scalar(key, value, entry["iter"])

    stopped = []  # the signals that asked us to stop

    def stop(number, frame):
        if stopped and ranks.size == 1:
            raise KeyboardInterrupt  # asked twice: at once, and without saving. (torchrun itself asks twice)
        stopped.append(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    # the loop
    gpu = torch.cuda.get_device_name() if kind == "cuda" else ""
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    tokens_per_step = batch_size * block_size * gradient_accumulation_steps
    bar = tqdm(total=max_iters, initial=start, unit="step", dynamic_ncols=True, disable=None if main_rank else True)
    ranks.check_identical(state(), "at the start")
    it, val_loss, clock, clock_it, late, stopping = start, None, time.perf_counter(), start, False, False
    while True:
        if it % eval_interval == 0 or it >= max_iters or eval_only:
            val_loss = evaluate()
            log({"iter": it, "val_loss": val_loss, "tokens": it * tokens_per_step})
            if main_rank:
                tqdm.write(f"step {it}: val loss {val_loss:.4f}")
            if it > start and not eval_only:
                save(it)
            clock, clock_it, ranks.sent = time.perf_counter(), it, 0
        if it >= max_iters or eval_only:
            break
        if method == "relora" and it and it % proj_gap == 0:
            restart(model, optimizer, seed, it)
        lr = learning_rate_at(it)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=kind)
        batches = [train_data.batch(batch_size, ranks.rank, ranks.size) for _ in range(micro_batches)]
        weights = [1 / gradient_accumulation_steps] * micro_batches  # of each micro-batch's mean loss in the step's
        if train_data.rows:  # micro-batches have unequal numbers of targets, and each target counts alike
            targets = [(y >= 0).sum().item() for _, y, _ in batches]
            of_step = max(1, ranks.total(sum(targets)))
            weights = [n / of_step for n in targets]
        for micro, batch in enumerate(batches):
            x, y, documents = on_device(batch)
            optimizer.accumulating = micro < micro_batches - 1
            with autocast:
                micro_loss = model(x, y, documents=documents) * weights[micro]
            micro_loss.backward()  # for qgalore and adam8bit this is most of the step, too
            loss += micro_loss.detach()
        if by_torch:
            for p in model.parameters():
                if p.grad is not None:
                    ranks.sum_(p.grad, lambda grad: None)
            ranks.land()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizer.step()
        if by_torch:
            optimizer.zero_grad()
        it += 1
        bar.update()
        late = max_minutes and time.perf_counter() - began > 60 * max_minutes
        stopping = ranks.any(stopped or late)
        if (it - 1) % log_interval == 0 or stopping:
            entry = {"iter": it - 1, "loss": ranks.total(loss.item()), "lr": lr}  # a sync point
            entry["tokens"] = it * tokens_per_step
            now = time.perf_counter()
            entry["tokens_per_s"] = (it - clock_it) * tokens_per_step / (now - clock)
            if ranks.size > 1:
                entry["sent_mb"] = ranks.sent / (it - clock_it) / 1e6  # a step, that a rank hands to torch.distributed
            clock, clock_it, ranks.sent = now, it, 0
            entry["peak_memory_gb"] = memory_peak(kind)
            if kind == "cuda":
                entry["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / GIB  # with what lies in fragments
            stats = {"grad_norm": norm.item()} if by_torch else optimizer.pop_stats()
            entry.update(stats)
            if not by_torch and (turns := optimizer.pop_turns()):
                entry["subspaces"] = turns
            if peak_flops:
                entry["mfu"] = entry["tokens_per_s"] * model.flops_per_token() / (peak_flops * ranks.size)
            log(entry)
            bar.set_postfix(loss=f"{entry['loss']:.3f}", tokens_per_s=f"{entry['tokens_per_s']:.0f}")
        if stopping:
            save(it)
            break
    bar.close()
    ranks.leave()
    if not main_rank:
        return
    plot_loss(out_dir)
    if stopping:
        reason = stopped[0] if stopped else "max_minutes" if late else "another rank"
        print(f"{reason}: saved step {it}; go on with the same command and --init_from=resume")
        return
    if sample_tokens:
        prompt = val_data.batch(1)[0][:, :32].to(kind)
        print("--- a sample: the prompt, then what the model makes of it")
        stream(model, get_encoding(config["encoding"]), prompt, sample_tokens, temperature=0.7, top_k=40, top_p=1.0,
               seed=seed)
    print(f"--- {out_dir}: val loss {val_loss:.4f}, peak memory {memory_peak(kind):.2f} GiB; see {out_dir}/loss.png")
    print(f"next: python sample.py --out_dir={out_dir} --prompt='The function'")
    print(f"      python hf.py --out_dir={out_dir} --export={out_dir}-hf     # for transformers" if config["pretrained"]
          else "      python prepare_c4.py --shards=1 && python train.py config/llama_60m.py")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("error: stopped at once, without saving: --init_from=resume goes on from the last checkpoint")
    except OSError as e:  # a full disk, most likely
        raise SystemExit(f"error: {e}")
