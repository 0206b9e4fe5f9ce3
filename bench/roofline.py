"""
Predict what a step takes on a GPU, without one: its launches, operations, bytes, milliseconds.
    python -m bench.roofline config/llama_7b.py                     # of the recipe, all cards
    python -m bench.roofline config/llama_7b.py --card="4060 Ti" --methods=qgalore,adam8bit
    python -m bench.roofline --sizes=True                           # 60M to 7B, methods side by side

Figures are predicted: see run/roofline.py, and docs/roofline.md for how good they are.
"""

import sys

from bench.settings import train_settings
from configurator import configure

# predicting
methods = ""  # with commas between them; "": the recipe's own
card = ""  # one of run/cards.py; "": all of them, and phases on an H100
sizes = False  # tokens/s of SIZES on CARDS, in place of one recipe

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

from bench.contenders import settled
from bench.settings import REPOSITORY
from kernels.count import UNITS
from run.cards import CARDS, card_named
from run.roofline import PHASES, launches, phase_seconds, step_on

SIZES = ("60m", "350m", "1b", "7b")
SIDE_BY_SIDE = ("qgalore", "qmuon", "adamw", "adam8bit")
ON = ("H100", "RTX 4060 Ti")


def main(s):
    s.pretrained = ""
    s.low_rank = ""
    if s.sizes:
        return print_sizes(s.methods.split(",") if s.methods else SIDE_BY_SIDE)
    card = card_named(s.card or "H100")
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise SystemExit(f"error: card={s.card}: there is no such card; there are {known}")
    for method in (s.methods or s.method).split(","):
        print_step(settled(s, method), card, CARDS if not s.card else [card])


def print_step(s, card, cards):
    """One method's step: a table of its phases on `card`, then its speed on `cards`."""
    step = step_on(card, s)
    steps = {card.has_bf16: step}  # cards without bfloat16 take another
    heads = ("launches", *(f"{unit} Top" for unit in UNITS), "GB", "ms")
    print(f"{s.method} on {card.name}, predicted")
    print(f"{'':26s}" + "".join(f"{head:>13s}" for head in heads))
    parts = [("a micro-batch that sums", step.micro_batch)] if step.micro_batch else []
    for title, kernels in (*parts, ("a step's last micro-batch", step.last)):
        print(title)
        for phase in PHASES:
            row = phase_row(kernels, phase, card)
            name = "refresh of all weights" if phase == "refresh" else phase
            print(f"  {name:24s}" + "".join(f"{cell:>13s}" for cell in row))
        total = f"{launches(kernels):,}"
        print(f"  {'all but refreshes':24s}{total:>13s}")
    print(f"{'card':14s}{'tokens/s':>12s}{'ms a step':>12s}{'days':>10s}")
    for card in cards:
        if card.has_bf16 not in steps:
            steps[card.has_bf16] = step_on(card, s)
        step = steps[card.has_bf16]
        seconds = sum(step.seconds(card).values())
        row = f"{step.tokens / seconds:12,.0f}{1000 * seconds:12,.1f}{step.days(card):10,.1f}"
        print(f"{card.name:14s}{row}", flush=True)


def phase_row(kernels, phase, card):
    """The cells of a phase of {Kernel: launches}."""
    mine = {kernel: n for kernel, n in kernels.items() if kernel.phase == phase}
    operations = dict.fromkeys(UNITS, 0)
    for kernel, n in mine.items():
        for unit, number in kernel.operations:
            operations[unit] += n * number
    moved = sum(n * kernel.bytes for kernel, n in mine.items())
    return (
        f"{launches(mine, phase):,}",
        *(f"{operations[unit] / 1e12:.2f}" for unit in UNITS),
        f"{moved / 1e9:.1f}",
        f"{1000 * phase_seconds(mine, card)[phase]:.1f}",
    )


def print_sizes(methods):
    """Tokens/s of SIZES by several methods: 16 sequences a step, and the recipe's 512."""
    for name in ON:
        card = card_named(name)
        print(f"{card.name}, tokens/s, predicted")
        print(f"{'':8s}{'sequences':>10s}" + "".join(f"{method:>12s}" for method in methods))
        for size in SIZES:
            recipe = configure(train_settings(), argv=[f"{REPOSITORY}/config/llama_{size}.py"])
            recipe.pretrained = recipe.low_rank = ""
            few = recipe.changed(batch_size=16, gradient_accumulation_steps=1)
            for s in (few, recipe):
                speeds = []
                for method in methods:
                    step = step_on(card, settled(s, method))
                    speeds.append(f"{step.tokens_per_second(card):12,.0f}")
                sequences = s.batch_size * s.gradient_accumulation_steps
                print(f"{size:8s}{sequences:10d}" + "".join(speeds), flush=True)


if __name__ == "__main__":
    main(s)
