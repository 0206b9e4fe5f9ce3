"""
A run's own folder, out_dir: who trains there now, and the runs that were there before.

One process trains in a folder: it holds a lock, which the system opens however it ends. Reading
(evaluation, samples, plots) asks for no lock and writes nothing.

A run from scratch in the folder of an earlier one loses nothing of that. It begins in the folder
STARTING within. When its first checkpoint is whole there, the earlier run's files move into a
folder of their own, EARLIER-N, which is an out_dir in turn; only then do the new ones take their
places.
"""

import contextlib
import itertools
import os
import socket
import time

from run.checkpoint import checkpoint_paths
from run.files import lock, sweep

LOCK = "lock"  # a file that says who holds it
STARTING = "starting"
EARLIER = "earlier"
CHECKPOINT = "ckpt.pt"
FILES = ("log.jsonl", "config.json", "loss.png", "subspaces.png")  # of a run, beside checkpoints


class Folder:
    """out_dir, for the process that trains in it.

    path: out_dir. now: where the run's files are, path itself or STARTING within."""

    def __init__(self, path):
        if not path:
            raise SystemExit("error: out_dir is empty: name a folder for the run")
        self.path = path
        self.now = path
        self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        held = self.lock is not None
        self.release()
        if kind is KeyboardInterrupt:
            saved = "nothing was saved"
            if held and checkpoint_paths(self.now):
                saved = "not saved: --init_from=resume takes the last checkpoint"
            raise SystemExit(f"error: stopped, {saved}")
        if isinstance(error, OSError):  # a full disk, most likely
            raise SystemExit(f"error: {error.filename or self.path}: {error.strerror or error}")

    # ------------------------------------------------------------------
    # who trains here

    def hold(self):
        """Lock the folder, if it exists, and put in order what a killed process left there.

        Exits with one line if another process trains there."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise SystemExit(f"error: out_dir {self.path}: is a file; name a folder")
        if self.lock is not None or not os.path.isdir(self.path):
            return
        name = os.path.join(self.path, LOCK)
        while True:
            f = open(name, "a+")
            if lock(f) is False:
                f.seek(0)
                holder = f.read().strip() or "another process"
                raise SystemExit(
                    f"error: out_dir {self.path}: {holder} trains there now: stop it, or set "
                    "another --out_dir"
                )
            # whoever held it may have deleted it since it was opened
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(f.fileno()), os.stat(name)):
                    break
            f.close()
        f.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M")
        f.write(f"process {os.getpid()} on {socket.gethostname()}, since {since},\n")
        f.flush()
        self.lock = f
        sweep(self.path)
        sweep(self.starting)
        if os.path.exists(os.path.join(self.starting, CHECKPOINT)):  # killed while it took places
            self.take_place()

    def release(self):
        if self.lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.lock.name)
            self.lock.close()
        self.lock = None

    # ------------------------------------------------------------------
    # earlier runs

    @property
    def starting(self):
        return os.path.join(self.path, STARTING)

    def begin(self, goes_on):
        """Make the folder for a run that goes on from a checkpoint there, or for a new one."""
        os.makedirs(self.path, exist_ok=True)
        self.hold()
        if os.path.isdir(self.starting):  # of a start that ended before its first checkpoint
            move_run(self.starting, self.path)
            with contextlib.suppress(OSError):  # it holds something of the user's
                os.rmdir(self.starting)
        if goes_on or not run_files(self.path):
            return
        os.makedirs(self.starting, exist_ok=True)
        self.now = self.starting
        print(f"note: {self.path} holds an earlier run, which stays there until this one's first "
              f"checkpoint; until then this one is in {self.starting}")

    def settle(self, log):
        """The run's first checkpoint is whole: take the earlier run's place, if there is one."""
        if self.now == self.starting:
            self.take_place()
            log.reopen(self)

    def take_place(self):
        """The run in STARTING has a checkpoint: the earlier run makes room for it."""
        # ckpt.pt moves last on both ways: one that is there tells what a kill interrupted
        if checkpoint_paths(self.path):
            move_run(self.path, self.path)
        for path in run_files(self.starting):
            place = os.path.join(self.path, os.path.basename(path))
            if os.path.exists(place):
                move_run(self.path, self.path)
            os.replace(path, place)
        with contextlib.suppress(OSError):
            os.rmdir(self.starting)
        self.now = self.path


def run_files(folder):
    """The paths of a run's files in a folder; its checkpoints are the last, ckpt.pt very last."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name in FILES or name.startswith("events.out.tfevents"):
            found.append(os.path.join(folder, name))
    return found + checkpoint_paths(folder)[::-1]


def move_run(source, folder):
    """Move a run's files from `source` into a new folder EARLIER-N of `folder`, and say so."""
    files = run_files(source)
    if not files:
        return
    has_checkpoint = bool(checkpoint_paths(source))
    for n in itertools.count(1):
        place = os.path.join(folder, f"{EARLIER}-{n}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(place)
            break
    for path in files:
        os.rename(path, os.path.join(place, os.path.basename(path)))
    how = ", which ended before its first checkpoint"
    if has_checkpoint:
        how = f": --out_dir={place} --init_from=resume goes on with it"
    print(f"note: set aside in {place} an earlier run{how}")
