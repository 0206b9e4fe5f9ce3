"""
Random numbers from a counter, not from a generator's state: element k of stream `key` is
uniform(key, k). So a resumed run, a CPU and a GPU round alike, and nothing has to be saved.
"""

import hashlib

import torch

GOLDEN = 40503  # 2^16 / golden ratio


def random_key(*parts):
    """A whole number of 32 bits, the same on every machine for the same numbers and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def rounding_key(step, *parts):
    """A key of 48 bits to round one tensor at `step`: random_key, above it step / golden ratio.

    Each element has a random number of its own, to which a step adds that fraction, modulo 1
    (Weyl's sequence, of the lowest discrepancy). At one step the numbers are as random as any, but
    those of a few steps in a row are spread evenly. Momentum makes such steps alike. Of n equal
    steps by a part f of a grid unit, n f are rounded up, give or take a few, where independent
    numbers leave an error of sqrt(n f (1 - f)).
    """
    return random_key(*parts) | (step * GOLDEN & 0xFFFF) << 32


def uniform(key, start, n, device=None):
    """Numbers start .. start + n - 1 of stream `key`: (n,) float32, odd multiples of 2^-17 below 1.

    Their mean is 1/2. floor(x + u) rounds x up with probability x - floor(x), so that its mean is x
    (Q-GaLore, equation 3). A whole x of -128..127 stays: float32 keeps x + u below x + 1.
    """
    return random_int16(key, start, n, device).float().mul_(2.0**-16).add_(0.5 + 2.0**-17)


def random_int16(key, start, n, device):
    """The same as int16 (n,): 2k and 2k + 1 are a hash of k in halves, plus key >> 32."""
    first = start // 2  # number 2k is the lower half
    x = torch.arange(first, (start + n + 1) // 2, dtype=torch.int32, device=device)
    x.mul_(_int32(0x9E3779B9)).add_(_int32(key & 0xFFFFFFFF))  # k * 2^32 / golden ratio + key
    # "lowbias32" of C. Wellons' hash-prospector; masks clear the sign bits that a shift copies in
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x.mul_(_int32(0x7FEB352D))
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x.mul_(_int32(0x846CA68B))
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x.view(torch.int16)[start % 2 :][:n].add_(_int32(key >> 32 << 16) >> 16)


def _int32(x):
    """The int32 of the same bits as a whole number of 32 bits."""
    return x - 2**32 if x >= 2**31 else x
