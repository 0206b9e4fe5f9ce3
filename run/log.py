"""
A run's output folder: config.json, and log.jsonl with one object a logged step.
"""

import glob
import json
import os

from run.checkpoint import checkpoint_paths
from run.plot import read_log
from run.shards import replacing


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
        self.file.write(json.dumps(entry) + "\n")
        numbers = {key: value for key, value in entry.items() if key != "subspaces"}
        if self.wandb is not None:
            self.wandb.log(numbers, step=entry["iter"])
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, entry["iter"])

    def sync(self):
        """Before a checkpoint: the lines up to it are never written again."""
        os.fsync(self.file.fileno())


def set_aside(out_dir, paths, prefix):
    """Rename files of a folder: a run that was there before is not overwritten."""
    for path in paths:
        os.replace(path, os.path.join(out_dir, prefix + os.path.basename(path)))


def cut_log(path, step):
    """Drop what was logged after the checkpoint of `step`: those steps come again."""
    before = read_log(path) if os.path.exists(path) else []
    kept = [json.dumps(entry) + "\n" for entry in before if entry["iter"] < step]
    with replacing(path) as f:
        f.write("".join(kept).encode())
