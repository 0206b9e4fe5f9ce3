"""
What is kept of a gradient from one step to the next, in 1 to 8 bytes an element: Adam's moments.

At LLaMA-7B and rank 1024 the low-rank gradients have 1.62 billion elements: each byte is 1.5 GiB.
"""

import math

import torch

from quant import CHUNK, GROUP_SIZE, adam_int8_, bitsandbytes, chunks

MIN_8BIT = 4096  # smaller tensors keep float32 moments, as in bitsandbytes


class Moments:
    """Adam's two moments of one tensor, by kind:

    "factored": the first in INT8, rounded stochastically; the second as a row and a column,
        v_ij = row_i col_j / mean (Adafactor, arXiv 1804.04235, section 3). 1 byte an element
    "8bit": both as block-wise 8-bit codes, kept and stepped by bitsandbytes. 2 bytes
    "float32": 8 bytes; also taken for vectors and small tensors"""

    def __init__(self, shape, kind, device=None):
        n = math.prod(shape)
        self.age = 0  # steps taken
        self.kind = kind if len(shape) > 1 and n >= MIN_8BIT else "float32"
        if self.kind == "factored":
            rows, cols = shape  # of R, or of a matrix
            groups = -(-cols // GROUP_SIZE)
            self.m = torch.zeros(shape, dtype=torch.int8, device=device)
            self.m_scale = torch.zeros(rows, groups, device=device)
            self.m_zero = torch.zeros(rows, groups, device=device)
            self.row = torch.zeros(rows, device=device)
            self.col = torch.zeros(cols, device=device)
        elif self.kind == "8bit":
            self.m = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.v = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.m_max = torch.zeros(-(-n // 256), device=device)
            self.v_max = torch.zeros(-(-n // 256), device=device)
            # its tables of 256 values, 2 KiB
            self.m_codes, self.v_codes = (codes.to(device) for codes in bitsandbytes()[1])
        else:
            self.m = torch.zeros(shape, device=device)
            self.v = torch.zeros(shape, device=device)

    def step_(self, g, betas, eps, key=0):
        """g <- Adam(g) in place: what a weight moves by at a rate of -1.

        g: contiguous, any float dtype. key: of the numbers that round the first moment."""
        self.age += 1
        if self.kind == "factored":
            self._step_factored_(g, betas, eps, key)
        elif self.kind == "8bit":
            self._step_8bit_(g, betas, eps)
        else:
            self.m.lerp_(g.float(), 1 - betas[0])
            self.v.lerp_(g.float().square(), 1 - betas[1])
            root = (self.v / (1 - betas[1] ** self.age)).sqrt_().add_(eps)
            g.copy_(self.m / root.mul_(1 - betas[0] ** self.age))  # both bias corrections

    def _step_factored_(self, g, betas, eps, key):
        # means of g's squares by row and by column, a few rows in float32 at a time
        row = torch.empty_like(self.row)
        col = torch.zeros_like(self.col)
        rows = max(1, CHUNK // g.shape[1])
        for start in chunks(g, len(g), rows):
            square = g[start : start + rows].float().square()  # (rows, cols)
            row[start : start + rows] = square.mean(dim=1)
            col += square.sum(dim=0)
        self.row.lerp_(row, 1 - betas[1])
        self.col.lerp_(col / len(g), 1 - betas[1])
        # the second moment's root is row_i col_j
        mean = self.row.mean() * (1 - betas[1] ** self.age)
        row = (self.row / mean.clamp_(min=1e-37)).sqrt_()
        codes = (self.m, self.m_scale, self.m_zero)
        correction = 1 - betas[0] ** self.age
        adam_int8_(*codes, g, row, self.col.sqrt(), betas[0], correction, eps, key)

    def _step_8bit_(self, g, betas, eps):
        update = bitsandbytes()[0].optimizer_update_8bit_blockwise
        parts = [t.view(-1).split(CHUNK) for t in (g, self.m, self.v)]
        maxima = [t.split(CHUNK // 256) for t in (self.m_max, self.v_max)]
        for g, m, v, m_max, v_max in zip(*parts, *maxima):
            minus_n = torch.zeros_like(g)  # a weight of 0, moved at a rate of 1
            codes = (self.m_codes, self.v_codes, m_max, v_max)
            update("adam", g, minus_n, m, v, *betas, 0.0, 0.0, eps, self.age, 1.0, *codes)
            torch.neg(minus_n, out=g)
