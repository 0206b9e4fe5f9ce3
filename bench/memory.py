"""
Draw what a recipe takes, part by part, by several methods: plans, not measurements.
    python -m bench.memory config/llama_7b.py                  # out-memory.png
    python -m bench.memory config/llama_1b.py --methods=qgalore,adam8bit --image=1b.png

Each bar is what torch reserves on a GPU by the method's own --dry_run plan (run/memory.py) in
bfloat16; lines are cards. CUDA's context comes on top.
"""

import os
import sys

from bench.settings import train_settings
from configurator import configure

# the picture
methods = "qgalore,qmuon,loqt,galore8bit,adam8bit"  # with commas between them
image = "out-memory.png"

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

import torch

from bench.contenders import settled
from run.device import GIB
from run.memory import Gpu, memory_plan
from run.plot import new_figure, save

CARDS = {"12 GB": 12, "16 GB": 16, "24 GB": 24}  # a card's GB are GiB


def main(s):
    s.pretrained = ""
    s.low_rank = ""
    sequences = s.batch_size * s.gradient_accumulation_steps
    title = f"{sequences} sequences of {s.block_size} tokens a step"
    if s.by_block:
        title += ", by block"
    named = [(name, settled(s, name)) for name in s.methods.split(",")]  # a mistype is said first
    plans = {}
    try:
        for name, of_method in named:
            plans[name] = plan(of_method)
            print(f"{name:12s} {sum(plans[name].values()) / GIB:6.2f} GiB", flush=True)
        draw(plans, title, os.path.expanduser(s.image))
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
    print(s.image)


def plan(s):
    weight_dtype = torch.float32 if s.weight_bits == 32 else torch.bfloat16
    return memory_plan(s, weight_dtype, torch.bfloat16, gpu=Gpu())


def draw(plans, title, path):
    """Bars of {method: {part: bytes}}."""
    figure = new_figure(8, 1.8 + 0.5 * len(plans))
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for of in plans.values() for part in of))
    left = [0.0] * len(plans)
    for part in parts:
        sizes = [of.get(part, 0) / GIB for of in plans.values()]
        axes.barh(list(plans), sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes)]
    for card, size in CARDS.items():
        axes.axvline(size, color="gray", lw=0.8, ls="--", zorder=0)
        above = axes.get_xaxis_transform()  # y in shares of the height
        axes.text(size, 1.02, card, ha="center", fontsize=8, color="gray", transform=above)
    for total, name in zip(left, plans):
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(total + 0.2, name, f"{total:.1f}", va="center", bbox=background)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("GiB that torch reserves, by plan")
    axes.set_title(title, pad=18)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    save(figure, path)


if __name__ == "__main__":
    main(s)
