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

A training step uses one function more, add_low_rank_int8_: dequantise, add the step, round, quantise again. Its random
numbers come from a counter, not from a generator's state: element k of call `key` draws uniform(key, k), so a resumed
run, a CPU and a GPU round alike. Over the steps an element's numbers are not independent but spread (rounding_key).
kernels.py has these functions again, under the same names, for CUDA.
"""

import hashlib
import logging
import math
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensor

GROUP_SIZE = 256  # the paper's, for weights and projections (section 3.1)
BLOCK = 2**19  # weights updated at once: each of the half dozen float32 temporaries takes 2 MiB, and stays in cache
DY_GROUP = 128  # rows of W that share a token's scale in dy @ W: more would round coarser, fewer rescale more often
GOLDEN = 40503  # 2^16 / golden ratio
CHUNK = 2**22  # elements that one operation takes to float32 at once, where no kernel keeps them in registers


def stochastic_round(x, generator=None):
    """Round up with probability x - floor(x), else down, so that the mean over draws is x (Q-GaLore, equation 3).

    x: float tensor. Returns a float tensor of whole numbers. Exact in float32: no draw can leave floor(x)..ceil(x).
    """
    floor = x.floor()
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return floor.add_(u < x - floor)


def random_key(*parts):
    """A whole number of 32 bits, the same for the same parts (numbers, strings) on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def rounding_key(step, *parts):
    """A key of 48 bits for the rounding of one tensor at `step`: random_key(*parts), above it step / golden ratio.

    Each element has a random number of its own to which a step adds that fraction, modulo 1 (Weyl's sequence, of the
    lowest discrepancy). At any one step the numbers are as random as others are, but those of any few steps in a row
    are spread evenly: of n equal steps by a part f of a grid unit, n f are rounded up, give or take a few,
    where independent numbers leave an error of sqrt(n f (1 - f)). Momentum makes successive steps alike.
    """
    return random_key(*parts) | (step * GOLDEN & 0xFFFF) << 32


def uniform(key, start, n, device=None):
    """Numbers start .. start + n - 1 of the stream `key`: (n,) float32, odd multiples of 2^-17 in (0, 1), of mean 1/2.

    floor(x + u) rounds x stochastically, and exactly for |x| <= 128, where x + u stays below the next whole number.
    """
    return _random_int16(key, start, n, device).float().mul_(2.0**-16).add_(0.5 + 2.0**-17)


def _random_int16(key, start, n, device):
    """Numbers 2k and 2k + 1 are the halves of a hash of k: key + k * 2^32 / golden ratio, then the 32-bit mixer
    "lowbias32" of C. Wellons' hash-prospector, each plus bits 32 to 47 of key. Without unsigned 32 bits in torch, right
    shifts of int32 are masked."""
    first = start // 2
    x = torch.arange(first, (start + n + 1) // 2, dtype=torch.int32, device=device)
    x.mul_(_int32(0x9E3779B9)).add_(_int32(key & 0xFFFFFFFF))
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x.mul_(_int32(0x7FEB352D))
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x.mul_(_int32(0x846CA68B))
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x.view(torch.int16)[start % 2 :][:n].add_(_int32(key >> 32 << 16) >> 16)


def _int32(x):
    return x - 2**32 if x >= 2**31 else x


def quantize_int8(w, group_size=GROUP_SIZE, stochastic=False, generator=None):
    """Quantise a matrix to 8 bits.

    w: (rows, cols) float, finite. stochastic: unbiased rounding, drawn from `generator`; else to nearest.
    Returns q int8 (rows, cols); scale, zero float32 (rows, ceil(cols / group_size)).
    Raises ValueError if group_size is not a power of two. At most CHUNK elements, or a row, are float32 at a time.
    """
    n_groups, rows = -(-w.shape[1] // _checked(group_size)), max(1, CHUNK // max(1, w.shape[1]))
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale, zero = (torch.empty(len(w), n_groups, device=w.device) for _ in range(2))
    for start in chunks(w, len(w), rows):
        at = slice(start, start + rows)
        part = w[at].to(torch.float32, copy=True)
        q[at], scale[at], zero[at] = _quantize_(part, 8, group_size, stochastic, generator)
    return q, scale, zero


def dequantize_int8(q, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int8: (rows, cols) in `dtype`, computed in `dtype`."""
    out = q.to(dtype)
    for view, group in _groups(out, _group_size(q.shape[1], scale.shape[1])):
        view.mul_(scale[:, group, None]).add_(zero[:, group, None])
    return out


def add_low_rank_int8_(q, scale, zero, left, right, shrink=1.0, key=None):
    """W <- round(shrink * W + left @ right^T) in place, the sum formed in float32 (Q-GaLore, section 3.4).

    q int8 (rows, cols), scale, zero float32 (rows, n_groups): overwritten, a block of rows at a time. left (rows, r),
    right (cols, r): of one float dtype; with right None, left (rows, cols) is the step. key: a rounding_key for
    stochastic rounding, where element (i, j) draws number i * cols + j; None rounds to nearest. A group of which a new
    value is not finite stays as it was.
    """
    for at, start in _blocks(q):
        step = left[at] if right is None else left[at] @ right.T
        w = dequantize_int8(q[at], scale[at], zero[at]).mul_(shrink).add_(step)
        _requantize_int8_(q[at], scale[at], zero[at], w, key, start)


def adam_int8_(m, scale, zero, g, row, col, beta, correction, eps, key):
    """A step of Adam whose first moment is INT8 and whose second is the product of a row and a column.

        m <- round(beta * m + (1 - beta) * g)        g <- m / correction / (row_i * col_j + eps), m before it is rounded

    m int8 (rows, cols), scale, zero float32 (rows, n_groups), g (rows, cols) any float dtype: overwritten. row (rows,),
    col (cols,) float32: roots of the second moment's factors. correction: 1 - beta^step. key: as above.
    """
    for at, start in _blocks(m):
        new = dequantize_int8(m[at], scale[at], zero[at]).lerp_(g[at].float(), 1 - beta)
        g[at] = new / torch.outer(row[at], col).add_(eps).mul_(correction)
        _requantize_int8_(m[at], scale[at], zero[at], new, key, start)


def matmul_int8(x, q, scale, zero):
    """x @ W^T with INT8 products, x rounded to the nearest of 255 codes in every group of every token.

        y[t, n] = sum over groups g of  s[t, g] * scale[n, g] * (code[t, g] . q[n, g]) + sum(x[t, g]) * zero[n, g]

    s = max |x[t, g]| / 127, code = round(x / s); zero meets x as it came. x (T, cols) float, W as above. Returns y
    (T, rows) in x.dtype, summed in float32. A token with an inf or NaN has no finite y; others do not see it. The
    products of codes are below 2^24 in groups of up to 1024: a float32 matmul is exact.
    """
    width = _group_size(q.shape[1], scale.shape[1])
    y = x.new_zeros(x.shape[0], q.shape[0], dtype=torch.float32)
    for start in chunks(q, q.shape[1], width):
        at, g = slice(start, start + width), start // width
        part = x[:, at].float()
        code, s = _round_rows(part)
        y += (code @ q[:, at].float().T).mul_(s).mul_(scale[:, g])
        y.addr_(part.sum(dim=1), zero[:, g])
    return y.to(x.dtype)


def matmul_transposed_int8(dy, q, scale, zero):
    """dy @ W with INT8 products: dy (T, rows) float -> (T, cols) in dy.dtype; else as matmul_int8.

    dy * scale[:, g] is what is rounded, as W's scales lie along this sum: DY_GROUP rows of W at a time, once a group g.
    """
    width = _group_size(q.shape[1], scale.shape[1])
    dx = dy.new_zeros(dy.shape[0], q.shape[1], dtype=torch.float32)
    for row in chunks(q, q.shape[0], DY_GROUP):
        part = dy[:, row : row + DY_GROUP].float()
        for start in chunks(q, q.shape[1], width):
            rows, at, g = slice(row, row + DY_GROUP), slice(start, start + width), start // width  # W's
            code, s = _round_rows(part * scale[rows, g])
            dx[:, at] += (code @ q[rows, at].float()).mul_(s).add_((part @ zero[rows, g])[:, None])
    return dx.to(dy.dtype)


def _round_rows(x):
    """x (T, n) float32 as whole numbers of -127..127, and their unit (T, 1). What is all below 3e-33 becomes 0."""
    s = x.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 127
    return (x * s.reciprocal()).round_(), s


def add_bfloat16_(p, delta, alpha, key):
    """p <- round(p + alpha * delta) in place, the sum formed in float32 and rounded stochastically.

    p, delta: bfloat16, contiguous, of one shape. Rounding to nearest would lose each step below p's half last bit,
    0.2 to 0.4 % of p: an embedding stands still as the rate decays. key: as above.
    """
    p, delta = p.view(-1), delta.view(-1)
    for start in chunks(p, len(p), CHUNK):
        at = slice(start, start + CHUNK)
        bits = p[at].float().add_(delta[at], alpha=alpha).view(torch.int32)  # a bfloat16 is the upper half of a float32
        bits += _random_int16(key, start, len(bits), p.device).int().bitwise_and_(0xFFFF)
        p[at] = bits.bitwise_and_(-65536).view(torch.float32)


def _blocks(q):
    """Slices of q's rows that hold BLOCK elements or a row, each with the number of its first element."""
    rows, cols = q.shape
    step = max(1, BLOCK // cols)
    return [(slice(start, min(start + step, rows)), start * cols) for start in chunks(q, rows, step)]


def chunks(tensor, length, size):
    """Where chunks of `size` start. Of a fake tensor, the first two: memory.py counts bytes, and these take all."""
    starts = range(0, length, size)
    return starts[:2] if isinstance(tensor, FakeTensor) else starts


def _requantize_int8_(q, scale, zero, w, key, start):
    """Quantise w, which is overwritten, into q, scale and zero, but for groups with a value that is not finite."""
    group_size = _group_size(q.shape[1], scale.shape[1])
    u = None if key is None else uniform(key, start, w.numel(), w.device).view(w.shape)
    new, s, z = _quantize_(w, 8, group_size, u=u)
    ok = (s + z).isfinite()  # (rows, n_groups)
    scale.copy_(s.where(ok, scale)), zero.copy_(z.where(ok, zero))
    for (view, group), (old, _) in zip(_groups(new, group_size), _groups(q, group_size)):
        old.copy_(view.where(ok[:, group, None], old))


def quantize_int4(w, group_size=GROUP_SIZE, stochastic=False, generator=None):
    """Quantise a matrix to 4 bits, two values a byte; arguments as for quantize_int8.

    Returns packed uint8, ceil(rows * cols / 2) bytes: (rows, cols / 2) for even cols, else flat, a byte then spanning
    two rows; the earlier value lies in the low half. scale, zero as for quantize_int8.
    """
    q, scale, zero = _quantize_(w.to(torch.float32, copy=True), 4, _checked(group_size), stochastic, generator)
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


@cache
def bitsandbytes():
    """Its functions, and the values of its codes for the first and the second moment. Importing it takes longer than
    importing torch, and only "8bit" moments and NF4 need it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # CPUs may miss 4-bit kernels, it says
    import bitsandbytes.functional as bnb

    bnb.quantize_blockwise(torch.zeros(1))  # it makes a table of its own at the first call: not on fake tensors
    return bnb, [bnb.create_dynamic_map(signed=signed) for signed in (True, False)]


def quantize_nf4(w):
    """Quantise a matrix to QLoRA's 4 bits (arXiv 2305.14314): 16 quantiles of a normal distribution, in blocks of 64,
    whose maxima are in 8 bits again. By bitsandbytes; frozen weights only. w: (rows, cols), any float dtype.

    Returns packed uint8 (rows * cols / 2, 1), absmax uint8, absmax_scale float32, absmax_mean float32 ()."""
    bnb = bitsandbytes()[0]
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state.absmax, state.state2.absmax, state.offset


def dequantize_nf4(packed, absmax, absmax_scale, absmax_mean, shape, dtype=torch.float32):
    """The inverse of quantize_nf4: `shape` in `dtype`."""
    bnb, codes = bitsandbytes()
    nested = bnb.QuantState(absmax_scale, code=codes[0].to(packed.device), blocksize=256, dtype=torch.float32)
    quantiles = bnb.get_4bit_type("nf4", packed.device)
    flat = torch.Size([math.prod(shape)])  # on CPUs with AVX-512 its blocks start anew at every row, wrongly (0.50)
    state = bnb.QuantState(absmax, flat, quantiles, 64, "nf4", dtype, absmax_mean, nested)
    return bnb.dequantize_4bit(packed, state).view(shape)


def _checked(group_size):
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two, not {group_size}")
    return group_size


def _quantize_(t, bits, group_size, stochastic=False, generator=None, u=None):
    """(codes, scale, zero) of t (rows, cols) float32, which is overwritten. u: what rounds, if it is not drawn here."""
    levels, lowest = 2**bits - 1, -(2 ** (bits - 1))
    scale = torch.empty(t.shape[0], -(-t.shape[1] // group_size), device=t.device)
    zero = torch.empty_like(scale)
    for view, group in _groups(t, group_size):
        low, high = view.aminmax(dim=-1, keepdim=True)
        s = high / levels - low / levels
        z = low - lowest * s
        view.sub_(z).div_(s.where(s > 0, 1))  # a group of equal values has scale 0, codes 0, and its value in zero
        scale[:, group], zero[:, group] = s.squeeze(-1), z.squeeze(-1)
    if u is not None:
        t.add_(u).floor_()
    else:
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
