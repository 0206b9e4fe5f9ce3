"""
A step's micro-batches through one block after another, not one after another through all blocks.

    usual       for each micro-batch: every block, forward and backward
    by block    for each block: every micro-batch, forward; and so again, backward

A weight's gradient is then whole before that of the block below begins, and the weight steps. Sums
of micro-batches exist for one block at a time, so that they may be in float, and of the whole
gradient: at 7B 0.8 GiB where the usual order takes 24. Between micro-batches wait their hidden
states (2 bytes an element, on the GPU), and the inputs of all blocks, in host memory: 17 GiB at 7B
with 512 x 256 tokens and checkpoint_bits=8. The result is the same.
"""

import torch

from kernels.lean import block_backward
from quant import GROUP_SIZE, dequantize_int8, quantize_int8


SMALL = 2**16  # bytes of pinned memory that may be lost


class Kept:
    """A block's input (B, T, C) until its backward, in host memory. bits 8: in INT8."""

    def __init__(self, x, bits):
        self.bits = bits
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        codes = quantize_int8(x.flatten(0, -2)) if bits == 8 else (x,)
        self.codes = [self.leave(t) for t in codes]

    def value(self):
        codes = [self.come_back(t) for t in self.codes]
        if self.bits == 8:
            return dequantize_int8(*codes, dtype=self.dtype).view(self.shape)
        return codes[0].detach()

    def leave(self, t):
        """What is kept of t: of a GPU's its shape, and its bytes in host memory; others stay."""
        return (torch.empty_like(t, device="meta"), to_host(t)) if t.is_cuda else t

    def come_back(self, kept):
        return from_host(*kept, self.device) if isinstance(kept, tuple) else kept


def to_host(t):
    """Pieces of t's bytes, of a GPU's in pinned memory, copied in the order of the stream."""
    parts = t.reshape(-1).view(torch.uint8).split(pieces(t.nbytes))
    there = [torch.empty_like(part, device="cpu", pin_memory=t.is_cuda) for part in parts]
    return [host.copy_(part, non_blocking=True) for host, part in zip(there, parts)]


def from_host(like, parts, device):
    """The tensor whose bytes to_host() left, of like's shape and dtype."""
    t = torch.empty_like(like, device=device)
    for into, part in zip(t.view(-1).view(torch.uint8).split(pieces(t.nbytes)), parts):
        into.copy_(part, non_blocking=True)
    return t


def pieces(size):
    """Sizes, powers of two but for a last one of less than SMALL, whose sum is `size`: torch gives
    pinned memory in powers of two, and 13B's inputs in one piece would take 1.6 times their bytes."""
    sizes = []
    while size >= SMALL:
        sizes.append(1 << size.bit_length() - 1)
        size -= sizes[-1]
    return sizes + [size] * (size > 0)


def kept_bytes(s, dtype):
    """What Kept takes in a step of settings s, in host memory."""
    elements = s.batch_size * s.gradient_accumulation_steps * s.block_size * s.n_embd * s.n_layer
    if s.checkpoint_bits == 8:
        return elements + 8 * elements // GROUP_SIZE
    return elements * dtype.itemsize


def forward_backward(model, batches, shares, optimizer, autocast, keep=Kept):
    """Loss and gradients of a step: weights that step in backward do.

    batches: [(idx, targets, documents)], see LLaMA.forward(). shares: what each one's mean loss is
    multiplied by. autocast: a context of forwards. keep: makes what waits for a block's backward.
    Returns the loss, () on the device."""
    order = range(len(batches))
    bits = model.config.checkpoint_bits
    hidden = []  # of each micro-batch: what the next block reads, or its gradient
    beside = []
    # forward
    with torch.no_grad(), autocast:
        for idx, _, documents in batches:
            x, args = model.begin(idx, documents=documents)
            hidden.append(x)
            beside.append(args)
        kept = []  # [block][micro-batch]
        for number, block in enumerate(model.blocks):
            kept.append([])
            for i in order:
                kept[-1].append(keep(hidden[i], bits))
                hidden[i] = block(hidden[i], *beside[i][number])

    # the head; one that is the embedding, too, has more of its gradient to come
    total = 0.0
    for i in order:
        optimizer.accumulating = i < order[-1] or model.config.tie_embedding
        _, targets, documents = batches[i]
        x = hidden[i].requires_grad_()
        with autocast:
            loss = model.loss(model.norm(x), targets, documents) * shares[i]
        loss.backward()
        total = total + loss.detach()
        hidden[i] = x.grad

    # the blocks, the last one first
    for number, block in reversed(list(enumerate(model.blocks))):
        inputs = kept.pop()
        for i in order:
            optimizer.accumulating = i < order[-1]
            x = inputs[i].value()
            inputs[i] = None
            hidden[i] = block_backward(block, x, hidden[i], beside[i][number], autocast)

    # the embedding
    for i in order:
        optimizer.accumulating = i < order[-1]
        with autocast:
            x, _ = model.begin(batches[i][0])
        if x.requires_grad:  # it is not frozen
            x.backward(hidden[i])
        hidden[i] = None
    return total
