"""
What a run shows: its output folder, with config.json and log.jsonl, an object a logged step; and at
its end loss.png, a sample, and what to do next.
"""

import glob
import json
import os
import time

import torch

from run.checkpoint import checkpoint_paths
from run.device import GIB, memory_peak, peak_flops
from run.encodings import get_encoding
from run.files import replacing
from run.plot import plot_loss, read_log
from sample import stream


class Log:
    """The log of a run whose output folder is made ready, on other ranks than the first nothing.

    s: settings. checkpoint: of the run that goes on, or None."""

    def __init__(self, s, checkpoint, writes):
        self.writes = writes
        self.wandb = self.tensorboard = None
        if not writes:
            return
        path = os.path.join(s.out_dir, "log.jsonl")
        try:
            os.makedirs(s.out_dir, exist_ok=True)
            # a run that was here before is not overwritten; one that goes on keeps its log
            if checkpoint is None:
                set_aside(s.out_dir, [*checkpoint_paths(s.out_dir), *glob.glob(glob.escape(path))],
                          "previous_")
            else:
                set_aside(s.out_dir, checkpoint["damaged"], "damaged_")
                cut_log(path, checkpoint["iter"])
            with replacing(os.path.join(s.out_dir, "config.json")) as f:
                f.write(json.dumps(s.as_dict(), indent=1).encode())
            # a line is on its way to disk as soon as it is written
            self.file = open(path, "a", buffering=1)
        except OSError as e:
            raise SystemExit(f"error: cannot write to out_dir {s.out_dir}: {e.strerror}")
        try:
            if s.wandb_log:
                import wandb

                wandb.init(project=s.project, name=s.out_dir, config=s.as_dict())
                self.wandb = wandb
            if s.tensorboard_log:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(s.out_dir)
        except ImportError as e:
            raise SystemExit(
                f"error: wandb_log or tensorboard_log is set, but there is no {e.name}: "
                f"pip install {e.name}"
            )

    def write(self, entry):
        """entry: {"iter": step, name: number ...}, and "subspaces" where some were refreshed."""
        if not self.writes:
            return
        self.file.write(json.dumps(entry) + "\n")  # the only one that a resume reads
        numbers = {key: value for key, value in entry.items() if key != "subspaces"}
        if self.wandb is not None:
            self.wandb.log(numbers, step=entry["iter"])
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, entry["iter"])

    def sync(self):
        """Before a checkpoint: the lines up to it are never written again."""
        os.fsync(self.file.fileno())


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
        seconds = time.perf_counter() - self.since
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


def set_aside(out_dir, paths, prefix):
    """Rename files of a folder: a run that was there before is not overwritten."""
    for path in paths:
        aside = os.path.join(out_dir, prefix + os.path.basename(path))
        os.replace(path, aside)
        print(f"note: {path} is set aside as {aside}")


def cut_log(path, step):
    """Drop what was logged after the checkpoint of `step`: those steps come again."""
    before = read_log(path) if os.path.exists(path) else []
    kept = [json.dumps(entry) + "\n" for entry in before if entry["iter"] < step]
    with replacing(path) as f:
        f.write("".join(kept).encode())


def end(run, finished):
    """Draw loss.png, show a sample, say what to do next."""
    s = run.s
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
        print(f"      python -m finetune.hf --out_dir={s.out_dir} --export={s.out_dir}-hf")
    else:
        print("      python prepare_c4.py --shards=1 && python train.py config/llama_60m.py")
