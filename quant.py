"""
The number formats of Q-GaLore: INT8 weights, packed INT4 projections, stochastic rounding. Plain torch, any device.

Both formats are group-wise and affine. A row is cut into groups of `group_size` along its last dimension (the last
group may be short), and each group keeps two float32 numbers:

    value = scale * code + zero         code in -128..127 (INT8) or -8..7 (INT4)

scale and zero are chosen so that the group's smallest and largest values fall exactly on the end codes. Nothing is
clamped, so with stochastic rounding the quantiser is unbiased, and a group that is quantised again unchanged keeps its
codes. (An integer zero point, as in the paper's code, clamps one end of almost every group: repeated at every step it
is a hidden weight decay.) Cost: 8 bytes a group, 3 % of INT8 weights at the paper's group of 256.

Group sizes are powers of two. That makes them readable from the shapes alone, so dequantising needs no extra argument.
"""

import torch

GROUP_SIZE = 256  # the paper's, for weights and projections (section 3.1)


def stochastic_round(x, generator=None):
    """Round up with probability x - floor(x), else down, so that the mean over draws is x (Q-GaLore, equation 3).

    x: float tensor. Returns a float tensor of whole numbers. Exact in float32: no draw can leave floor(x)..ceil(x).
    """
    floor = x.floor()
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return floor.add_(u < x - floor)


def quantize_int8(w, group_size=GROUP_SIZE, stochastic=False, generator=None):
    """Quantise a matrix to 8 bits.

    w: (rows, cols) float, finite. stochastic: unbiased rounding, drawn from `generator`; else to nearest.
    Returns q int8 (rows, cols); scale, zero float32 (rows, ceil(cols / group_size)).
    Raises ValueError if group_size is not a power of two.
    """
    return _quantize(w, 8, group_size, stochastic, generator)


def dequantize_int8(q, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int8: (rows, cols) in `dtype`, computed in `dtype`."""
    out = q.to(dtype)
    for view, group in _groups(out, _group_size(q.shape[1], scale.shape[1])):
        view.mul_(scale[:, group, None]).add_(zero[:, group, None])
    return out


def quantize_int4(w, group_size=GROUP_SIZE, stochastic=False, generator=None):
    """Quantise a matrix to 4 bits, two values a byte; arguments as for quantize_int8.

    Returns packed uint8, ceil(rows * cols / 2) bytes: (rows, cols / 2) for even cols, else flat, a byte then spanning
    two rows; the earlier value lies in the low half. scale, zero as for quantize_int8.
    """
    q, scale, zero = _quantize(w, 4, group_size, stochastic, generator)
    flat = q.add_(8).view(torch.uint8).flatten()  # codes 0..15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = flat[0::2] | flat[1::2] << 4
    return packed.view(w.shape[0], -1) if w.shape[1] % 2 == 0 else packed, scale, zero


def dequantize_int4(packed, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int4: (rows, cols) in `dtype`. The shape follows from those of packed and scale."""
    rows = scale.shape[0]
    cols = 2 * packed.numel() // rows
    if packed.ndim == 1 and cols % 2 == 0:  # one row of odd width: half of its last byte is filling
        cols -= 1
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[: rows * cols]
    return dequantize_int8(codes.view(torch.int8).sub_(8).view(rows, cols), scale, zero, dtype)


def _quantize(w, bits, group_size, stochastic, generator):
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two, not {group_size}")
    levels, lowest = 2**bits - 1, -(2 ** (bits - 1))
    t = w.to(torch.float32, copy=True)  # (rows, cols), becomes the codes
    n_groups = -(-w.shape[1] // group_size)
    scale = torch.empty(w.shape[0], n_groups, device=w.device)
    zero = torch.empty_like(scale)
    for view, group in _groups(t, group_size):
        low, high = view.aminmax(dim=-1, keepdim=True)
        s = high / levels - low / levels
        z = low - lowest * s
        view.sub_(z).div_(s.where(s > 0, 1))  # a group of equal values has scale 0, codes 0, and its value in zero
        scale[:, group], zero[:, group] = s.squeeze(-1), z.squeeze(-1)
    t = stochastic_round(t, generator) if stochastic else t.round_()
    return t.clamp_(lowest, lowest + levels).to(torch.int8), scale, zero  # the clamp only meets float error at the ends


def _groups(x, group_size):
    """Views of x (rows, cols) by group: the whole groups as (rows, n, group_size), then the short last one, each with
    the slice of scale's columns that belongs to it."""
    n = x.shape[1] // group_size
    if n:
        yield x[:, : n * group_size].unflatten(1, (n, group_size)), slice(0, n)
    if x.shape[1] % group_size:
        yield x[:, n * group_size :].unsqueeze(1), slice(n, n + 1)


def _group_size(cols, n_groups):
    """The power of two that cuts cols into n_groups; there is one at most when n_groups > 1."""
    if n_groups == 1:
        return cols
    return 1 << (-(-cols // n_groups) - 1).bit_length()
