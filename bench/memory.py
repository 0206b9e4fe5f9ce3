"""
Draw what a recipe takes, part by part, by several methods: plans, not measurements.
    python -m bench.memory config/llama_7b.py                  # out-memory.png
    python -m bench.memory config/llama_1b.py --methods=qgalore,adam8bit --image=1b.png

Each bar is the method's own --dry_run plan (run/memory.py) in bfloat16; lines are cards.
"""

import sys

import torch

import train
from bench.contenders import settled
from configurator import configure
from run.device import GIB
from run.memory import memory_plan
from run.plot import pyplot

# the picture
methods = "qgalore,qmuon,loqt,galore8bit,adam8bit"  # with commas between them
image = "out-memory.png"

CARDS = {"12 GB": 12, "16 GB": 16, "24 GB": 24}  # a card's GB are GiB


def main():
    s = configure(train, sys.modules[__name__])
    s.pretrained = ""
    s.low_rank = ""
    plans = {}
    for name in s.methods.split(","):
        plans[name] = plan(settled(s, name))
        print(f"{name:12s} {sum(plans[name].values()) / GIB:6.2f} GiB", flush=True)
    sequences = s.batch_size * s.gradient_accumulation_steps
    draw(plans, f"{sequences} sequences of {s.block_size} tokens a step", s.image)
    print(s.image)


def plan(s):
    weight_dtype = torch.float32 if s.weight_bits == 32 else torch.bfloat16
    return memory_plan(s, weight_dtype, torch.bfloat16)


def draw(plans, title, path):
    """Bars of {method: {part: bytes}}."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.5 * len(plans)), layout="constrained")
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
    axes.set_xlabel("GiB, by plan")
    axes.set_title(title, pad=18)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.3))
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
