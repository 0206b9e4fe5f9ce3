"""
NF4, the 4 bits of QLoRA (arXiv 2305.14314), by bitsandbytes' kernels. For weights that stay frozen.

A code is one of 16 quantiles of a normal distribution, times the largest value of its block of 64.
These maxima are kept in 8 bits again, in blocks of 256, less their mean: 4.13 bits a weight in all.
"""

import functools
import logging
import math

import torch


@functools.cache
def bitsandbytes():
    """Its functions, and the values of its codes for the first and the second moment.

    Importing it takes longer than importing torch, and only "8bit" moments and NF4 need it.
    """
    # it warns that 4-bit kernels are missing on some CPUs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    # its first call makes a table that it keeps: that must not happen on fake tensors
    bnb.quantize_blockwise(torch.zeros(1))
    return bnb, [bnb.create_dynamic_map(signed=signed) for signed in (True, False)]


def quantize_nf4(w):
    """Quantise a matrix w (rows, cols), any float dtype, to NF4.

    Returns packed uint8 (rows * cols / 2, 1), absmax uint8, absmax_scale float32, absmax_mean
    float32 ().
    """
    bnb, _ = bitsandbytes()
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state.absmax, state.state2.absmax, state.offset


def dequantize_nf4(packed, absmax, absmax_scale, absmax_mean, shape, dtype=torch.float32):
    """The inverse of quantize_nf4: `shape` in `dtype`."""
    bnb, codes = bitsandbytes()
    code = codes[0].to(packed.device)
    nested = bnb.QuantState(absmax_scale, code=code, blocksize=256, dtype=torch.float32)
    quantiles = bnb.get_4bit_type("nf4", packed.device)
    # flat: on CPUs with AVX-512 its blocks start anew at every row, wrongly (0.50)
    flat = torch.Size([math.prod(shape)])
    state = bnb.QuantState(absmax, flat, quantiles, 64, "nf4", dtype, absmax_mean, nested)
    return bnb.dequantize_4bit(packed, state).view(shape)
