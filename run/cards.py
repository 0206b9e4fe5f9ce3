"""
Cards, as NVIDIA's papers describe them: the one table of their rates.

Operations a second are dense (not "with sparsity"), at the boost clock. A multiplication and an
addition are two.
"""

import re
from dataclasses import dataclass

import torch

T = 1e12
G = 1e9


@dataclass(frozen=True)
class Card:
    name: str
    memory: float  # GB, 10^9 bytes of 2^30, as it is sold
    bf16: float  # operations a second, on tensor cores with float32 sums; T4: float16
    int8: float  # on tensor cores
    float32: float  # off the tensor cores
    bandwidth: float  # bytes a second of its memory
    bus: float  # bytes a second from host memory, each way
    has_bf16: bool = True


# Sources:
# RTX 30: "NVIDIA Ampere GA102 GPU Architecture", V2.1, appendix A; RTX 3060 and 3060 Ti by its
#     rates an SM and the product pages' SMs and boost clocks (28 at 1.777 GHz, 38 at 1.665)
# RTX 40: "NVIDIA Ada GPU Architecture", V2.1, appendix A; RTX 4060 Ti: 34 SMs at 2.535 GHz
# RTX 50: "NVIDIA RTX Blackwell GPU Architecture", V1.1, appendix A
# The bus: PCIe 3.0, 4.0 or 5.0 of 16 lanes, an RTX 4060 Ti's of 8
# T4: "NVIDIA T4 Tensor Core GPU", data sheet. A100, H100, H200: their data sheets, SXM
CARDS = (
    Card("RTX 3060 Ti", 8, 32 * T, 130 * T, 16.2 * T, 448 * G, 32 * G),
    Card("RTX 3080", 10, 59.5 * T, 238 * T, 29.8 * T, 760 * G, 32 * G),
    Card("RTX 3060", 12, 25.5 * T, 102 * T, 12.7 * T, 360 * G, 32 * G),
    Card("RTX 4060 Ti", 16, 44 * T, 176 * T, 22.1 * T, 288 * G, 16 * G),
    Card("T4", 16, 65 * T, 130 * T, 8.1 * T, 320 * G, 16 * G, has_bf16=False),
    Card("RTX 3090", 24, 71 * T, 284 * T, 35.6 * T, 936 * G, 32 * G),
    Card("RTX 4090", 24, 165 * T, 660 * T, 82.6 * T, 1008 * G, 32 * G),
    Card("RTX 5090", 32, 209.5 * T, 838 * T, 104.8 * T, 1792 * G, 64 * G),
    Card("A100", 80, 312 * T, 624 * T, 19.5 * T, 2039 * G, 32 * G),
    Card("H100", 80, 989 * T, 1979 * T, 66.9 * T, 3352 * G, 64 * G),
    Card("H200", 141, 989 * T, 1979 * T, 66.9 * T, 4800 * G, 64 * G),
)


def card_named(name):
    """The Card whose name is in `name`, as torch or a user gives it; the longest, or None."""
    found = [c for c in CARDS if re.search(rf"\b{c.name.removeprefix('RTX ')}\b", name, re.I)]
    return max(found, key=lambda card: len(card.name), default=None)


def card_here():
    """The Card of this machine's GPU; None without one, or if it is not in the table."""
    return card_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
