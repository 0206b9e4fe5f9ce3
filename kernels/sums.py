"""
The sum of a step's micro-batches, in 1 to 4 bytes an element.

What a micro-batch adds is a product of two thin matrices. It is made by torch in the factors' dtype
and then added in one pass; in INT8 a block of rows at a time, so that on a GPU at most 32 MiB of
it exist at once. By bytes that is, in INT8: 2 written and read, 1 read and written.
"""

import torch

from quant import GROUP_SIZE, add_bfloat16_, add_low_rank_int8_, dequantize_int8, quantize_int8


def product(left, right, total=None, key=0):
    """left^T right of left (T, rows) and right (T, cols), or total += that.

    total: float32, or bfloat16, rounded stochastically by `key`."""
    result = left.T @ right
    if total is None:
        return result
    if total.dtype == torch.bfloat16:
        add_bfloat16_(total, result, 1.0, key)
    else:
        total += result  # exact but for float32's own rounding


def stacked(lefts, right, multiply=product):
    """left^T right of each left (T, rows) of lefts, one below the other; right (T, cols)."""
    if len(lefts) == 1:
        return multiply(lefts[0], right)
    rows = [left.shape[1] for left in lefts]
    whole = right.new_empty(sum(rows), right.shape[1])
    for left, part in zip(lefts, whole.split(rows)):
        torch.mm(left.T, right, out=part)
    return whole


class Sum:
    """A matrix (rows, cols) that a step's micro-batches add up in.

    kind: "float32", 4 bytes an element; "bfloat16", 2; "int8", 1 and 8 bytes a group. The last two
    are rounded stochastically at every addition. multiply: product(), or what takes its place in
    float sums."""

    def __init__(self, rows, cols, kind, device):
        self.kind = kind
        self.added = 0
        if kind == "int8":
            groups = -(-cols // GROUP_SIZE)
            self.codes = (
                torch.zeros(rows, cols, dtype=torch.int8, device=device),
                torch.zeros(rows, groups, device=device),
                torch.zeros(rows, groups, device=device),
            )
        else:
            self.total = torch.zeros(rows, cols, dtype=getattr(torch, kind), device=device)

    def add_(self, lefts, right, key, multiply=product):
        """self += stacked(lefts, right). A group in INT8 that is not finite once is NaN from then
        on."""
        self.added += 1  # so that each addition rounds by numbers of its own
        start = 0
        for i, left in enumerate(lefts):
            at = slice(start, start + left.shape[1])
            start = at.stop
            if self.kind == "int8":  # a block of rows at a time
                codes = (t[at] for t in self.codes)
                add_low_rank_int8_(*codes, left.T, right.T, 1.0, key ^ i, poison=True)
            else:
                multiply(left, right, self.total[at], key ^ i)

    def set_(self, value):
        if self.kind == "int8":
            self.codes = quantize_int8(value)
        else:
            self.total.copy_(value)

    def value(self, dtype=torch.float32):
        """(rows, cols), from INT8 or bfloat16 in dtype."""
        if self.kind == "int8":
            return dequantize_int8(*self.codes, dtype)
        return self.total if self.kind == "float32" else self.total.to(dtype)
