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
methods = ""  # with commas between them; "": the recipe's own; "galore": galore-torch, SVD left out
card = ""  # one of run/cards.py; "": all of them, and phases on an H100
sizes = False  # tokens/s of SIZES on CARDS, in place of one recipe

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

from collections import Counter as Multiset
from contextlib import contextmanager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.contenders import settled
from bench.peers import prepare_peer
from bench.settings import REPOSITORY
from kernels.count import UNITS, Counter
from methods.registry import find
from run.cards import CARDS, card_named
from run.roofline import (FEW, MORE, PHASES, Step, launches, of_blocks, phase_seconds, step,
                          step_on)

SIZES = ("60m", "350m", "1b", "7b")
SIDE_BY_SIDE = ("qgalore", "qmuon", "adamw", "adam8bit")
ON = ("H100", "RTX 4060 Ti")
PEER = "galore"  # of bench/peers.py: the only one that runs on tensors without data


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
        print_step(method, s, card, CARDS if not s.card else [card])


def step_of(method, s, card):
    """The Step of a method, or of PEER, by settings s as the user gave them."""
    return peer_step(s) if method == PEER else step_on(card, settled(s, method))


def print_step(method, s, card, cards):
    """One method's step: a table of its phases on `card`, then its speed on `cards`."""
    step = step_of(method, s, card)
    steps = {card.has_bf16: step}  # cards without bfloat16 take another
    heads = ("launches", *(f"{unit} Top" for unit in UNITS), "GB", "ms")
    print(f"{method} on {card.name}, predicted")
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
            steps[card.has_bf16] = step_of(method, s, card)
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
    cards = [card_named(name) for name in ON]
    print(f"tokens/s, predicted: {', then '.join(ON)}")
    print(f"{'':6s}{'sequences':>10s}" + "".join(f"{m:>10s}" for _ in ON for m in methods))
    for size in SIZES:
        recipe = configure(train_settings(), argv=[f"{REPOSITORY}/config/llama_{size}.py"])
        recipe.pretrained = recipe.low_rank = ""
        few = recipe.changed(batch_size=16, gradient_accumulation_steps=1)
        for s in (few, recipe):
            steps = [step_of(method, s, cards[0]) for method in methods]
            speeds = [step.tokens_per_second(card) for card in cards for step in steps]
            sequences = s.batch_size * s.gradient_accumulation_steps
            row = "".join(f"{speed:10,.0f}" for speed in speeds)
            print(f"{size:6s}{sequences:10d}{row}", flush=True)


# -----------------------------------------------------------------------------
# a published optimizer


class CountedPhases:
    """bench.contenders' Phases, for a counter."""

    def __init__(self):
        self.counter = Counter()

    @contextmanager
    def __call__(self, name):
        """A block of code as phase `name`."""
        before = self.counter.phase
        self.counter.phase = name
        yield
        self.counter.phase = before

    def wrap(self, owner, method, name, takes_basis=False):
        """Count owner.method as phase `name`."""
        plain = getattr(owner, method)

        def counted(*args, **kwargs):
            with self(name):
                return plain(*args, **kwargs)

        setattr(owner, method, counted)


def peer_step(s):
    """PEER's Step. It steps its weights in every backward, so that a step has one micro-batch."""
    s = settled(s, "adam8bit", weight_bits=0, gradient_accumulation_steps=1)
    few, more = (count_peer(s.changed(n_layer=blocks)) for blocks in (FEW, MORE))
    return Step(s, Multiset(), of_blocks(few, more, s.n_layer))


def count_peer(s):
    """{Kernel: launches} of PEER's second step: its first one makes its moments."""
    from bitsandbytes import functional

    phases = CountedPhases()
    attach = prepare_peer(PEER, "cpu", svd=False)
    # its tables need numbers, which fake tensors do not have
    tables = {signed: functional.create_dynamic_map(signed) for signed in (True, False)}
    plain = functional.create_dynamic_map
    functional.create_dynamic_map = lambda signed=True: tables[signed]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = find("adam8bit").build_model(s, "cpu", torch.bfloat16)
            attach(s, model, phases)
            for _ in range(2):
                phases.counter = Counter(compiles=s.compile)
                with phases.counter:
                    step(s, model, None, nullcontext(), phases.counter)
    finally:
        functional.create_dynamic_map = plain
    return phases.counter.launches


if __name__ == "__main__":
    main(s)
