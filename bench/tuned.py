r"""
Fine-tune by what people use, and by ours: each at its own best rate, over seeds, in one table.
    python -m bench.tuned config/finetune_smollm2.py --contenders=qgalore,qlora,peft_qlora
    python -m bench.tuned config/finetune_smollm2_gsm8k.py --contenders=adam8bit,peft_lora
    # with accuracies, of finetune.evaluate by these flags
    python -m bench.tuned config/finetune_smollm2.py --evaluate="--task=choice --data=test.tsv \
        --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:'"

A contender's rate starts at a guess. It doubles and halves until the best has a worse one on either
side, by the loss of the first seed. Then the other seeds run at the best.

Each run is a process, train.py's or bench.by_peft's, in a folder of its own in out_dir. The same
command goes on where it was stopped, and shows what is done already. A run whose figures are all
taken leaves its log alone: its weights are deleted.
"""

import glob
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
from statistics import mean, median

from bench.settings import TRAIN, train_settings
from configurator import Allowed, configure

BY_PEFT = ["-m", "bench.by_peft"]
ADAPTERS = "--rank=16 --method=lora --weight_bits"
CONTENDERS = {  # {name: (program, its flags, the rate to start at)}
    "adam8bit": (TRAIN, "--method=adam8bit", 2e-4),  # in backward, as torchtune does it
    "peft_lora": (BY_PEFT, f"{ADAPTERS}=16", 1e-3),
    "peft_lora8": (BY_PEFT, f"{ADAPTERS}=8", 1e-3),  # LLM.int8(), by Linear8bitLt
    "peft_qlora": (BY_PEFT, f"{ADAPTERS}=4", 1e-3),
    "lora": (TRAIN, f"{ADAPTERS}=16", 1e-3),
    "lora8": (TRAIN, f"{ADAPTERS}=8", 1e-3),  # QLoRA on an 8-bit base
    "qlora": (TRAIN, f"{ADAPTERS}=4", 1e-3),
    "qgalore": (TRAIN, "--method=qgalore", 1.5e-3),
    "qmuon": (TRAIN, "--method=qmuon", 1e-3),
}

KNOWN = Allowed(
    f"some of {', '.join(CONTENDERS)}",
    lambda text: {name.strip() for name in text.split(",")} <= set(CONTENDERS),
)

# what to compare: several, with commas between them
contenders: KNOWN = ",".join(CONTENDERS)
seeds = "1337,1,2"  # the first one's losses choose the rate
evaluate = ""  # flags of finetune.evaluate, for the runs at the best rate; "": no accuracy
out_dir = "out-tuned"
OWN = ("contenders", "seeds", "evaluate", "out_dir")  # the rest is for the runs
CHOSEN = ("method", "rank", "weight_bits", "learning_rate", "seed", "init_from")  # here, for them

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

from bench.contest import last_line, outcome, refuse_other_settings, train
from run.show import say


def main(s, argv):
    names = split(s.contenders)
    check(names)
    runs = Runs(s, [arg for arg in argv if arg[2:].partition("=")[0] not in OWN])
    first, *others = split(s.seeds)
    rows = []
    errors = []
    for name in names:
        start = CONTENDERS[name][2]
        best, losses = best_rate(start, lambda rate: runs.loss(name, rate, first))
        for rate in losses:
            if rate != best:
                runs.discard(name, rate, first)
        at_best = [runs.outcome(name, best, seed) for seed in (first, *others)]
        if s.evaluate:
            for found, seed in zip(at_best, (first, *others)):
                found["accuracy"] = runs.accuracy(name, best, seed)
                runs.discard(name, best, seed)
        errors += [run["error"] for run in at_best if "error" in run]
        rows.append(row(name, best, losses, at_best))
        say(rows[-1])
    print(f"| | rate: loss, seed {first} | loss, seeds {s.seeds} | accuracy | GiB | tokens/s |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    if errors:
        raise SystemExit(1)


def split(text):
    return [part.strip() for part in text.split(",")]


def check(names):
    """Exit with one line if the package of one of them is not there."""
    for name in names:
        if CONTENDERS[name][0] is BY_PEFT and importlib.util.find_spec("peft") is None:
            raise SystemExit(f"error: {name} needs peft: pip install transformers peft accelerate")


def best_rate(rate, loss_at):
    """(the best rate, {rate: loss}): `rate` times powers of two, up to a worse one on either side.

    loss_at(rate): inf where it diverges."""
    losses = {}
    best = rate
    while True:
        for near in (best / 2, best, best * 2):
            if near not in losses:
                losses[near] = loss_at(near)
        if losses[best] <= min(losses.values()):
            return best, losses
        best = min(losses, key=losses.get)


class Runs:
    """The runs in s.out_dir: each is made when its figures are first asked for.

    flags: of the command line, for all runs."""

    def __init__(self, s, flags):
        self.s = s
        self.flags = flags
        self.out_dir = os.path.expanduser(s.out_dir)

    def folder(self, name, rate, seed):
        return os.path.join(self.out_dir, f"{name}-{rate:g}-{seed}")

    def loss(self, name, rate, seed):
        return self.outcome(name, rate, seed).get("val_loss", math.inf)

    def outcome(self, name, rate, seed):
        """contest.outcome() of a run, or {"error": its last line}."""
        folder = self.folder(name, rate, seed)
        refuse_other_settings(folder, self.s, {*CHOSEN, *OWN})
        found = outcome(folder, self.s.max_iters) or diverged(folder)
        if found is None:
            program, own, _ = CONTENDERS[name]
            more = [f"--learning_rate={rate:g}", f"--seed={seed}",
                    f"--init_from=auto:{self.s.init_from.removeprefix('auto:')}"]
            error = train([*self.flags, *own.split(), *more], folder, program)
            found = outcome(folder, self.s.max_iters) or {"error": error}
            say(f"{os.path.basename(folder)}: {found.get('error') or found['val_loss']}")
        return found

    def accuracy(self, name, rate, seed):
        """The share of right answers that finetune.evaluate finds, or None."""
        folder = self.folder(name, rate, seed)
        path = f"{folder}-accuracy.json"
        if not os.path.exists(path):
            merged = os.path.join(folder, "merged")
            model = merged if os.path.isdir(merged) else folder
            command = [sys.executable, "-m", "finetune.evaluate", f"--model={model}",
                       "--weight_bits=16", f"--out={path}", *shlex.split(self.s.evaluate)]
            line = last_line(command, f"{folder}-accuracy.txt")
            say(f"{os.path.basename(folder)}: {line}")
        if not os.path.exists(path):
            return None
        with open(path) as f:
            return json.load(f)["accuracy"]

    def discard(self, name, rate, seed):
        """Delete a run's weights."""
        folder = glob.escape(self.folder(name, rate, seed))
        for path in glob.glob(f"{folder}/ckpt*.pt"):
            os.unlink(path)
        for path in glob.glob(f"{folder}/merged"):
            shutil.rmtree(path)


def diverged(folder):
    """{"error": the last line} of a run that ended since it was not finite, or None."""
    try:
        with open(f"{folder}.txt") as f:
            last = f.read().strip().rpartition("\n")[2]
    except FileNotFoundError:
        return None
    return {"error": last} if "is not finite: training stopped" in last else None


def row(name, best, losses, at_best):
    """A line of the table, in Markdown. at_best: what outcome() found, for each seed."""
    rates = []
    for rate, loss in sorted(losses.items()):
        figure = f"{loss:.4f}" if loss < math.inf else "-"
        rates.append(f"{rate:g}: **{figure}**" if rate == best else f"{rate:g}: {figure}")
    done = [run for run in at_best if "val_loss" in run]
    speed = f"{median(run['tokens_per_s'] for run in done):,.0f}" if done else ""
    memory = f"{max(run['peak_memory_gb'] for run in done):.2f}" if done else ""
    loss = figures([run["val_loss"] for run in done], 4)
    accuracy = figures([run["accuracy"] for run in done if run.get("accuracy") is not None], 3)
    return f"| `{name}` | {'; '.join(rates)} | {loss} | {accuracy} | {memory} | {speed} |"


def figures(found, digits):
    """Their mean, and each of them."""
    if not found:
        return ""
    each = ", ".join(f"{x:.{digits}f}" for x in found)
    return f"{mean(found):.{digits}f} ({each})"


if __name__ == "__main__":
    main(s, sys.argv[1:])
