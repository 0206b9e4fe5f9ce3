"""
The number formats of Q-GaLore: INT8 weights, packed INT4 projections, stochastic rounding.

Both formats are group-wise and affine. A row is cut into groups of `group_size` along its last
dimension (the last group may be short; 0: all of it), and each keeps two float32 numbers:

    value = scale * code + zero         code in -128..127 (INT8) or -8..7 (INT4)

The group's smallest and largest values, low and high, fall exactly on the end codes:

    scale = (high - low) / 255          zero = low + 128 * scale          (INT4: 15 and 8)

No value is clipped. So with stochastic rounding the quantiser is unbiased, and a group that is
quantised again unchanged keeps its codes. (An integer zero point, as in the paper's code, clamps
one end of almost every group: repeated at every step it is a hidden weight decay.) The cost is
8 bytes a group: a row of a weight, or 256 elements of a moment, basis or activation. Group sizes
are powers of two: they follow from the shapes of codes and scales.

Steps in place, such as add_low_rank_int8_, dequantise, add, round and quantise again. Their random
numbers are counted (kernels/random.py), so that a resumed run, a CPU and a GPU round alike.

Plain torch is the reference. Under `@with_kernel(...)` a CUDA tensor goes on to a Triton kernel.
"""

import torch

from kernels import adam, quantized
from kernels.launch import chunks, group_width, on_gpu, with_kernel
from kernels.nf4 import bitsandbytes, dequantize_nf4, quantize_nf4  # noqa: F401, for `from quant`
from kernels.random import random_int16, random_key, rounding_key, uniform  # noqa: F401

GROUP_SIZE = 256  # the paper's (section 3.1)
BLOCK = 2**19  # weights updated at once: six float32 temporaries of 2 MiB each stay in cache
STEP = 2**24  # on a GPU: 32 MiB of the step in bfloat16
CHUNK = 2**22  # elements made float32 at once, where no kernel keeps them in registers


@with_kernel(quantized.quantize_int8)
def quantize_int8(w, group_size=GROUP_SIZE):
    """Quantise a matrix to 8 bits, to the nearest code.

    w: (rows, cols) float, finite. At most CHUNK elements, or a row, are float32 at a time.
    Returns q int8 (rows, cols); scale, zero float32 (rows, ceil(cols / group_size)).
    Raises ValueError if group_size is not 0 (a row is one group) or a power of two.
    """
    group_size = _columns(group_size, w.shape[1])
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(len(w), -(-w.shape[1] // group_size), device=w.device)
    zero = torch.empty_like(scale)
    for at, _ in _blocks(w, CHUNK):
        part = w[at].to(torch.float32, copy=True)
        q[at], scale[at], zero[at] = _quantize_(part, 8, group_size)
    return q, scale, zero


@with_kernel(quantized.dequantize_int8)
def dequantize_int8(q, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int8: (rows, cols) in `dtype`, computed in it (kernels: float32)."""
    out = q.to(dtype)
    group_size = group_width(q.shape[1], scale.shape[1])
    for view, group in _groups(out, group_size):  # (rows, n, group_size), n columns of scale
        view.mul_(scale[:, group, None]).add_(zero[:, group, None])
    return out


def quantize_int4(w, group_size=GROUP_SIZE):
    """Quantise a matrix to 4 bits, two values a byte; arguments as for quantize_int8.

    Returns packed uint8, ceil(rows * cols / 2) bytes, the earlier value in a byte's low half:
    (rows, cols / 2) for even cols, else flat, as bytes then span two rows. scale, zero as above.
    """
    q, scale, zero = _quantize_(w.to(torch.float32, copy=True), 4, _columns(group_size, w.shape[1]))
    flat = q.add_(8).view(torch.uint8).flatten()  # codes 0..15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])  # the last byte's high half is filling
    packed = flat[0::2] | flat[1::2] << 4  # (ceil(rows * cols / 2),)
    if w.shape[1] % 2 == 0:
        packed = packed.view(w.shape[0], -1)
    return packed, scale, zero


@with_kernel(quantized.dequantize_int4)
def dequantize_int4(packed, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int4: (rows, cols) in `dtype`, as the shapes of its codes tell."""
    rows, cols = quantized.int4_shape(packed, scale)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1)  # 0..15, low half and high half
    q = codes.flatten()[: rows * cols].view(torch.int8).sub_(8).view(rows, cols)
    return dequantize_int8.plain(q, scale, zero, dtype)


def encode(p, bits):
    """The tensors that keep a matrix p, float32, in 4 or 8 bits, or for 16 as it is."""
    if bits == 16:
        return (p.contiguous(),)
    if bits == 4:
        return quantize_int4(p)
    return quantize_int8(p)


def decode(codes, dtype=torch.float32):
    """The matrix in `dtype` of (packed, scale, zero), of (q, scale, zero), or of (matrix,)."""
    if len(codes) == 1:
        return codes[0].to(dtype)
    if codes[0].dtype == torch.int8:
        return dequantize_int8(*codes, dtype=dtype)
    return dequantize_int4(*codes, dtype=dtype)


def _quantize_(t, bits, group_size, u=None):
    """(codes, scale, zero) of t (rows, cols) float32, which is overwritten.

    Codes are floor(t + u) for u (rows, cols) between 0 and 1, or the nearest with None.
    """
    levels = 2**bits - 1  # 255 or 15 steps from the lowest code to the highest
    lowest = -(2 ** (bits - 1))  # -128 or -8
    scale = torch.empty(t.shape[0], -(-t.shape[1] // group_size), device=t.device)
    zero = torch.empty_like(scale)
    for view, group in _groups(t, group_size):
        low, high = view.aminmax(dim=-1, keepdim=True)  # (rows, n, 1)
        s = high / levels - low / levels  # high - low may overflow
        z = low - lowest * s
        # a group of equal values has scale 0, codes 0, and its value in zero
        view.sub_(z).div_(s.where(s > 0, 1))
        scale[:, group] = s.squeeze(-1)
        zero[:, group] = z.squeeze(-1)
    t = t.round_() if u is None else t.add_(u).floor_()
    t.clamp_(lowest, lowest + levels)  # this meets nothing but float error at the ends
    return t.to(torch.int8), scale, zero


def _groups(x, group_size):
    """Views of x (rows, cols) by group: the whole groups as (rows, n, group_size), then the short
    last one, each with the slice of scale's columns that belongs to it."""
    n = x.shape[1] // group_size
    if n:
        yield x[:, : n * group_size].unflatten(1, (n, group_size)), slice(0, n)
    if x.shape[1] % group_size:
        yield x[:, n * group_size :].unsqueeze(1), slice(n, n + 1)


def _columns(group_size, cols):
    if group_size < 0 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be 0 or a power of two, not {group_size}")
    return group_size or max(1, cols)


# --- Steps in place: float32 in between, rounded stochastically ---


def add_low_rank_int8_(q, scale, zero, left, right, shrink=1.0, key=None, poison=False):
    """W <- round(shrink * W + left @ right^T), a block of rows at a time (Q-GaLore, section 3.4).

    left (rows, r), right (cols, r): of one float dtype, in which they are multiplied; with right
    None, left (rows, cols) is the step. The rest as for add_int8_.
    """
    if right is None:
        return add_int8_(q, scale, zero, left, shrink, key, poison=poison)
    for at, start in _blocks(q, STEP if on_gpu(q) else BLOCK):
        add_int8_(q[at], scale[at], zero[at], left[at] @ right.T, shrink, key, start, poison)


@with_kernel(quantized.add_int8_)
def add_int8_(q, scale, zero, step, shrink=1.0, key=None, start=0, poison=False):
    """W <- round(shrink * W + step), the sum formed in float32.

    q int8 (rows, cols), scale, zero float32 (rows, n_groups): overwritten. step: (rows, cols) any
    float dtype. key: a rounding_key for stochastic rounding, where element (i, j) draws number
    start + i * cols + j; None rounds to nearest. A group with a new value that is not finite stays;
    with poison it becomes NaN, by its scale and zero.
    """
    for at, first in _blocks(q):
        w = dequantize_int8.plain(q[at], scale[at], zero[at]).mul_(shrink).add_(step[at])
        _requantize_int8_(q[at], scale[at], zero[at], w, key, start + first, poison)


@with_kernel(adam.add_bfloat16_)
def add_bfloat16_(p, delta, alpha, key):
    """p <- round(p + alpha * delta), the sum formed in float32 and rounded stochastically.

    p, delta: bfloat16, contiguous, of one shape. key: as above. Rounding to nearest would lose each
    step below p's half last bit, 0.2 to 0.4 % of p: an embedding stands still as the rate decays.
    """
    p = p.view(-1)
    delta = delta.view(-1)
    for start in chunks(p, len(p), CHUNK):
        at = slice(start, start + CHUNK)
        # a bfloat16 is the upper half of a float32: add a random lower half, then cut that off
        bits = p[at].float().add_(delta[at], alpha=alpha).view(torch.int32)
        bits += random_int16(key, start, len(bits), p.device).int().bitwise_and_(0xFFFF)
        p[at] = bits.bitwise_and_(-65536).view(torch.float32)  # -65536: 0xFFFF0000


def _blocks(x, size=BLOCK):
    """Slices of x's rows of `size` elements, or of a row, each with its first element's number."""
    rows, cols = x.shape
    step = max(1, size // max(1, cols))  # rows
    return ((slice(i, min(i + step, rows)), i * cols) for i in chunks(x, rows, step))


def _requantize_int8_(q, scale, zero, w, key, start, poison=False):
    """Quantise w, which is overwritten, into q, scale and zero. Groups that are not finite stay."""
    group_size = group_width(q.shape[1], scale.shape[1])
    u = None
    if key is not None:
        u = uniform(key, start, w.numel(), w.device).view(w.shape)
    new, s, z = _quantize_(w, 8, group_size, u)  # int8 (rows, cols), float32 (rows, n_groups)
    finite = (s + z).isfinite()  # (rows, n_groups): an inf or NaN in w is in its group's s or z
    scale.copy_(s.where(finite, torch.nan if poison else scale))
    zero.copy_(z.where(finite, torch.nan if poison else zero))
    for (view, group), (old, _) in zip(_groups(new, group_size), _groups(q, group_size)):
        old.copy_(view.where(finite[:, group, None], old))
