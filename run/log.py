"""
What a run shows: its output folder, with config.json and log.jsonl, an object a logged step; and at
its end loss.png, a sample, and what to do next.
"""

import json
import math
import os
import shlex
import time

import torch

from model import QMatrix
from run import counts
from run.device import GIB, memory_peak, peak_flops
from run.encodings import get_encoding
from run.files import check_file, parse_json, replacing, sync, unused
from run.plot import plot_loss
from run.text import first_line
from sample import PROMPT_END, stream


class Log:
    """log.jsonl of a run, and what else is told of it: W&B, TensorBoard. Rank 0's alone."""

    def __init__(self, s, folder, checkpoint):
        """s: settings. folder: run/folder.py's. checkpoint: of the run that goes on, or None."""
        self.path = os.path.join(folder.now, "log.jsonl")
        self.wandb_id = checkpoint.get("wandb_id") if checkpoint else None
        self.told = set()  # services' errors that were shown
        self.file = None
        # all that may fail comes before anything there is changed
        self.start_services(s, folder)
        try:
            if checkpoint is not None:
                for path in checkpoint["damaged"]:
                    aside = unused(os.path.join(folder.now, f"damaged_{os.path.basename(path)}"))
                    os.rename(path, aside)
                    print(f"note: {path} is set aside as {aside}")
                cut_log(self.path, checkpoint["iter"])
            with replacing(os.path.join(folder.now, "config.json")) as f:
                f.write(json.dumps(s.as_dict(), indent=1).encode())
            self.reopen(folder)
        except OSError as e:
            raise SystemExit(f"error: cannot write to {e.filename or folder.now}: {e.strerror}")

    def start_services(self, s, folder):
        self.wandb = self.tensorboard = None
        try:
            if s.wandb_log:
                import wandb

                self.wandb = wandb.init(project=s.project, name=s.out_dir, config=s.as_dict(),
                                        id=self.wandb_id, resume="allow")
                self.wandb_id = self.wandb.id
            if s.tensorboard_log:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(folder.now)
        except ImportError as e:
            raise SystemExit(
                f"error: wandb_log or tensorboard_log is set, but there is no {e.name}: "
                f"pip install {e.name}"
            )
        except Exception as e:  # W&B's own, its HTTP client's: no key, no network
            raise SystemExit(f"error: wandb_log or tensorboard_log: {first_line(e)}")

    def reopen(self, folder):
        """Write on where the run's files are now."""
        if self.file is not None:
            self.file.close()
        self.path = os.path.join(folder.now, "log.jsonl")
        # a line is on its way to disk as soon as it is written
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")

    def write(self, entry):
        """entry: {"iter": step, name: number ...}, and "subspaces" where some were refreshed."""
        line = dict(entry)
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None  # JSON has no such number
        self.file.write(json.dumps(line) + "\n")  # the only one that a resume reads
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        try:
            if self.wandb is not None:
                self.wandb.log(numbers, step=entry["iter"])
            if self.tensorboard is not None:
                for key, value in numbers.items():
                    self.tensorboard.add_scalar(key, value, entry["iter"])
        except Exception as e:  # what is only shown does not end a run
            if type(e) not in self.told:
                print(f"note: W&B or TensorBoard: {first_line(e)}; log.jsonl goes on")
            self.told.add(type(e))

    def sync(self):
        """Before a checkpoint: the lines up to it are never written again."""
        sync(self.file)


class Clock:
    """Measures the steps between two lines of the log. flops: a token's, see LLaMA."""

    def __init__(self, s, ranks, flops):
        self.device = s.device
        self.ranks = ranks
        self.flops = flops
        self.tokens_per_step = s.batch_size * s.block_size * s.gradient_accumulation_steps
        self.start(0)

    def start(self, step):
        self.since = time.perf_counter()
        self.step = step  # steps taken until now
        self.ranks.sent = 0  # bytes

    def lap(self, step):
        """{name: number} of the steps since the last lap or start, before step number `step`."""
        steps = step - self.step
        seconds = max(time.perf_counter() - self.since, 1e-9)  # a clock may stand still
        found = {"tokens": step * self.tokens_per_step}
        found["tokens_per_s"] = steps * self.tokens_per_step / seconds
        if self.ranks.size > 1:  # what a rank hands to torch.distributed
            found["sent_mb"] = self.ranks.sent / steps / 1e6
        found["peak_memory_gb"] = memory_peak(self.device)
        if self.device == "cuda":  # with what lies in fragments
            found["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / GIB
        peak = peak_flops(self.device)  # None on a CPU, or of a card that is not listed
        if peak:
            found["mfu"] = found["tokens_per_s"] * self.flops / (peak * self.ranks.size)
        self.start(step)
        return found


def cut_log(path, step):
    """Drop what was logged after the checkpoint of `step`: those steps come again.

    A line that is no entry goes, too. One that a kill tore, at the end, is nothing; for others the
    log as it was is set aside."""
    if not os.path.exists(path):
        return
    check_file(path)
    with open(path, "rb") as f:
        lines = f.readlines()
    kept = []
    damaged = 0
    for line in lines:
        try:
            at = parse_json(line)["iter"]
            if at < step:
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            damaged += line.endswith(b"\n")
    if damaged:
        aside = unused(os.path.join(os.path.dirname(path), "damaged_log.jsonl"))
        os.rename(path, aside)
        print(f"note: {damaged} lines of {path} are damaged: it is set aside as {aside}")
    with replacing(path) as f:
        f.writelines(kept)


def begin(run):
    """Say what this run trains, on what, and by what."""
    s = run.s
    for line in counts.lines(s.data_dir, counts.counts_in(os.path.expanduser(s.data_dir))):
        print(line)
    weights = sum(p.numel() for p in run.model.parameters())
    for layer in run.model.modules():
        if isinstance(layer, QMatrix):  # its weight is no parameter
            weights += layer.in_features * layer.out_features
    print(f"{s.method} on {s.device}: {weights:,} weights, {run.clock.tokens_per_step:,} tokens a "
          f"step, {run.train_data.total:,} windows of {s.block_size} tokens to train on")
    projected = getattr(run.optimizer, "weights", ()) if "rank" in run.method.reads else ()
    clamped = [weight.name for weight in projected if weight.projection.rank < s.rank]
    if clamped:
        print(f"note: rank {s.rank} is larger than the smaller side of {len(clamped)} matrices, "
              f"{clamped[0]} among them: these train at full rank")


def end(run, finished):
    """Draw loss.png, show a sample, say what to do next. The run is saved: nothing here ends it."""
    s = run.s
    folder = run.folder.now
    try:
        plot_loss(folder)
    except Exception as e:  # matplotlib's own kinds, the file system's
        print(f"note: loss.png was not drawn: {first_line(e)}")
    if not finished:
        print(f"{run.stop.reason()}: saved step {run.it}; "
              "go on with the same command and --init_from=resume")
        return
    if s.sample_tokens:
        show_sample(run)
    print(f"--- {folder}: val loss {run.val_loss:.4f}, peak memory "
          f"{memory_peak(s.device):.2f} GiB; see {folder}/loss.png")
    print(f"next: python sample.py --out_dir={shlex.quote(folder)} --prompt='The function'")
    if s.pretrained:
        export = shlex.quote(f"{folder}-hf")
        print(f"      python -m finetune.hf --out_dir={shlex.quote(folder)} --export={export}")
    elif s.encoding == "bytes":  # the demo
        print("      python prepare_c4.py --shards=1 && python train.py config/llama_60m.py")


def show_sample(run):
    """Show what the model makes of the first validation window's beginning."""
    s = run.s
    prompt = run.val_data.batch(1)[0][:, :32].to(s.device)
    try:
        encoding = get_encoding(s.encoding)
    except SystemExit as e:  # its vocabulary could not be fetched
        print(f"note: no sample: {e}")
        return
    print(f"--- a sample: a prompt, {PROMPT_END}, what the model makes of it")
    stream(run.model, encoding, prompt, s.sample_tokens, temperature=0.7, top_k=40, top_p=1.0,
           seed=s.seed, mark=PROMPT_END)
