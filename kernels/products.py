"""
The kernels of a product with INT8 weights, in Triton. matmul.py has the same functions in
plain torch and says what is computed.

    round_rows       one program a token: its codes, unit and total, in one pass over x
    transposed       q^T, because INT8 tensor cores want both factors to lie along the sum
    round_columns    one program 64 columns of 128 tokens: their codes, transposed
    scaled_product, column_product
                     the product, whose sums leave the tensor cores as float32 and are written once

By data sheet INT8 runs at twice the rate of bfloat16, on consumer cards at four times, as these
halve bfloat16 with float32 sums. A program makes 128 x 256 of y: with 128 x 128 each byte would
meet 64 others on its way from L2, which a 4090 cannot feed (330 T products / 64 = 5.2 TB/s).

Sums are whole numbers: tiles of any size give the same bits. Offsets are 32 bits wide: x, q and y
have fewer than 2^31 elements.
"""

import torch
import torch.nn.functional as F

from kernels.launch import cdiv, power_of_2, tl, triton

ALIGNED = 16  # bytes: rows of codes begin at multiples, as loads of that width need
WIDTH = 4096  # columns that a program of round_rows holds at once
# a program's tokens, rows of q, half of the columns at once, warps. MANY takes 96 KiB of shared
# memory, of which consumer cards have 99, and 214 of 255 registers
MANY = (128, 256, 64, 8)
FEW = (32, 32, 128, 4)
ADDS = (128, 128, 64, 8)  # what is added to takes registers, too
SHARED_ROWS = 8  # blocks of tokens whose programs run beside each other and share q's tiles in L2


def round_rows(x, scale=None, zero=None):
    """Rows of codes are padded with zeros to a multiple of ALIGNED."""
    x = x.contiguous()
    tokens, cols = x.shape
    padded = cdiv(cols, ALIGNED) * ALIGNED
    code = torch.empty(tokens, padded, dtype=torch.int8, device=x.device)
    s, total = torch.empty(2, tokens, device=x.device)
    scaled = scale is not None
    factors = (scale.contiguous(), zero.contiguous()) if scaled else (s, s)  # s: not read
    block = min(power_of_2(padded), WIDTH)
    _round_kernel[(tokens,)](
        x, *factors, code, s, total, cols, padded, scaled, block,
        num_warps=max(1, block // 512), enable_fp_fusion=False,  # 16 elements a thread
    )
    return code, s, total


def transposed(q):
    """Rows are padded, with anything, as those of codes are: there zeros meet it."""
    rows, cols = q.shape
    padded = cdiv(rows, ALIGNED) * ALIGNED
    out = torch.empty(cols, padded, dtype=torch.int8, device=q.device)
    if cols % 4 or not q.is_contiguous():  # no whole words
        out[:, :rows] = q.T
        return out
    grid = (cdiv(rows, 128), cdiv(cols, 128))
    _transpose_kernel[grid](
        q.view(torch.int32), out.view(torch.int32), rows, cols // 4, padded // 4, num_warps=4
    )
    return out


def scaled_product(code, q, s, total, scale=None, zero=None, dtype=torch.float32):
    if code.is_cuda and torch.cuda.get_device_capability(code.device) < (8, 0):
        return NotImplemented  # Triton has no INT8 products for Turing; cuBLAS has
    cols = code.shape[1]
    if q.shape[1] < cols:  # as in code, rows of 5461 are of no use
        q = F.pad(q, (0, cols - q.shape[1]))
    y = torch.empty(len(code), len(q), dtype=dtype, device=code.device)
    _multiply(code, q.contiguous(), y, s, total, scale, zero)
    return y


def round_columns(x):
    """Rows of codes are padded with zeros to a multiple of ALIGNED. The columns' largest values are
    found by torch, which keeps NaN."""
    tokens, cols = x.shape
    s = torch.linalg.vector_norm(x, torch.inf, dim=0, dtype=torch.float32)
    padded = cdiv(tokens, ALIGNED) * ALIGNED
    code = torch.empty(cols, padded, dtype=torch.int8, device=x.device)
    unit = torch.empty_like(s)
    grid = (cdiv(padded, 128), cdiv(cols, 64))
    _round_columns_kernel[grid](
        x, s, code, unit, tokens, cols, padded, *x.stride(), 128, 64,
        num_warps=4, enable_fp_fusion=False,
    )
    return code, unit


def column_product(code, s, other, s_other, total=None, dtype=torch.float32):
    if code.is_cuda and torch.cuda.get_device_capability(code.device) < (8, 0):
        return NotImplemented
    adds = total is not None
    y = total if adds else torch.empty(len(code), len(other), dtype=dtype, device=code.device)
    _multiply(code, other, y, s, scale=s_other, adds=adds)
    return y


def _multiply(code, q, y, s, total=None, scale=None, zero=None, adds=False):
    """y (tokens, rows) <- the product of code (tokens, n) and q (rows, n), or += that."""
    factors = [s if t is None else t.contiguous() for t in (total, scale, zero)]  # s: not read
    tokens, cols = code.shape
    rows = len(q)
    # where text is generated, many small programs share the reading of q
    tile = FEW if tokens <= FEW[0] else ADDS if adds else MANY
    block_m, block_n, block_k, warps = tile
    grid = (cdiv(tokens, block_m) * cdiv(rows, block_n),)
    _matmul_kernel[grid](
        code, q, s, *factors, y, tokens, rows, cols, scale is not None, total is not None, adds,
        SHARED_ROWS, block_m, block_n, block_k,
        num_warps=warps, num_stages=3, enable_fp_fusion=False,
    )


if triton is not None:

    @triton.jit
    def _round_kernel(
        x_ptr, scale_ptr, zero_ptr, code_ptr, s_ptr, total_ptr, COLS: tl.constexpr,
        PADDED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0)
        x_ptr += token * COLS
        largest = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, COLS, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + col, col < COLS, other=0.0).to(tl.float32)
            if SCALED:
                total += x * tl.load(zero_ptr + col, col < COLS, other=0.0)
                x *= tl.load(scale_ptr + col, col < COLS, other=0.0)
            else:
                total += x
            largest = tl.maximum(largest, tl.abs(x))
        # what a code of 1 is worth, where the largest value is to be 127
        s = tl.div_rn(tl.maximum(tl.max(largest, axis=0), 1e-30), 127.0)

        # a row of more than BLOCK is read again, from the cache
        for start in range(0, PADDED, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + col, col < COLS, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(scale_ptr + col, col < COLS, other=0.0)
            # to nearest even: at 1.5 * 2^23 a float32's last bit is worth 1, its lowest byte is x
            code = (x * tl.div_rn(1.0, s) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
            tl.store(code_ptr + token * PADDED + col, code, col < PADDED)
        tl.store(s_ptr + token, s)
        tl.store(total_ptr + token, tl.sum(total, axis=0))

    @triton.jit
    def _round_columns_kernel(
        x_ptr, largest_ptr, code_ptr, s_ptr, tokens, cols, padded, token_stride, col_stride,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        largest = tl.load(largest_ptr + col, col < cols, other=0.0)
        smallest = tl.where(largest == largest, 1e-30, largest)  # NaN stays
        s = tl.div_rn(tl.where(largest < 1e-30, smallest, largest), 127.0)
        if tl.program_id(0) == 0:
            tl.store(s_ptr + col, s, col < cols)
        col = col[None, :]
        inside = (token < tokens) & (col < cols)
        x = tl.load(x_ptr + token * token_stride + col * col_stride, inside, other=0.0)
        code = tl.div_rn(x.to(tl.float32), s[None, :])
        code = (code + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # as in _round_kernel
        at = tl.trans(col) * padded + tl.trans(token)  # (BLOCK_N, BLOCK_T)
        tl.store(code_ptr + at, tl.trans(code), tl.trans((token < padded) & (col < cols)))

    @triton.jit
    def _transpose_kernel(q_ptr, out_ptr, rows, words, out_words):
        """q as words (rows, words) of four columns, out as words (cols, out_words) of four rows."""
        m = (tl.program_id(0) * 32 + tl.arange(0, 32))[:, None]  # four rows of q
        n = (tl.program_id(1) * 32 + tl.arange(0, 32))[None, :]  # four columns
        q_ptr += 4 * m * words + n
        a = tl.load(q_ptr, (4 * m < rows) & (n < words), other=0)
        b = tl.load(q_ptr + words, (4 * m + 1 < rows) & (n < words), other=0)
        c = tl.load(q_ptr + 2 * words, (4 * m + 2 < rows) & (n < words), other=0)
        d = tl.load(q_ptr + 3 * words, (4 * m + 3 < rows) & (n < words), other=0)
        for j in tl.static_range(4):  # byte j of each is a column
            low = ((a >> 8 * j) & 255) | ((b >> 8 * j) & 255) << 8
            high = ((c >> 8 * j) & 255) << 16 | ((d >> 8 * j) & 255) << 24
            at = (4 * n + j) * out_words + m
            tl.store(out_ptr + at, low | high, (m < out_words) & (n < words))

    # Loops run to a constexpr, the length of the sums: a model has two or three of them, and the
    # kernel twice that many compilations.
    @triton.jit
    def _matmul_kernel(
        code_ptr, q_ptr, s_ptr, total_ptr, scale_ptr, zero_ptr, y_ptr, tokens, rows,
        COLS: tl.constexpr, SCALED: tl.constexpr, TOTALS: tl.constexpr, ADDS: tl.constexpr,
        SHARED_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # programs go down SHARED_ROWS blocks of tokens, then on to the next block of q's rows
        blocks_m = tl.cdiv(tokens, BLOCK_M)
        band = SHARED_ROWS * tl.cdiv(rows, BLOCK_N)  # programs
        first = tl.program_id(0) // band * SHARED_ROWS
        height = min(blocks_m - first, SHARED_ROWS)
        within = tl.program_id(0) % band
        token = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = within // height * BLOCK_N + tl.arange(0, BLOCK_N)

        # what is beyond the last token or row reads others, and is not written
        k = tl.arange(0, BLOCK_K)
        code_at = (token % tokens)[:, None] * COLS + k[None, :]
        q_at = (row % rows)[None, :] * COLS + k[:, None]
        dot = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        # two products a turn: with one the compiler would carry codes over, in a register each
        for start in range(0, COLS, 2 * BLOCK_K):
            for half in tl.static_range(2):
                at = start + half * BLOCK_K
                if COLS % (2 * BLOCK_K) == 0:
                    code = tl.load(code_ptr + code_at + at)
                    q = tl.load(q_ptr + q_at + at)
                else:
                    code = tl.load(code_ptr + code_at + at, (k < COLS - at)[None, :], other=0)
                    q = tl.load(q_ptr + q_at + at, (k < COLS - at)[:, None], other=0)
                dot = tl.dot(code, q, dot, out_dtype=tl.int32)

        # to float32, with the token's unit and the row's scale
        token = token[:, None]
        row = row[None, :]
        y = dot.to(tl.float32) * tl.load(s_ptr + token, token < tokens, other=0.0)
        total = tl.load(total_ptr + token, TOTALS & (token < tokens), other=0.0)
        if SCALED:
            y *= tl.load(scale_ptr + row, row < rows, other=0.0)
            total = total * tl.load(zero_ptr + row, TOTALS & (row < rows), other=0.0)
        y_ptr += token * rows + row
        if ADDS:
            total = tl.load(y_ptr, (token < tokens) & (row < rows), other=0.0).to(tl.float32)
        tl.store(y_ptr, y + total, (token < tokens) & (row < rows))
