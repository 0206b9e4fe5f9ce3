"""
The head and its loss, in plain torch: the logits of a batch never exist at once.

At 7B with 16 x 256 tokens all logits take 393 MiB in bfloat16, and their gradient as much again.
Here a chunk of tokens has logits, and one pass leaves their gradient in their place. From it come
dh = g W and dW = g^T h before the next chunk, so that nothing is computed twice. A CUDA tensor's
pass is a Triton kernel (rows.py).
"""

import torch
import torch.nn.functional as F

from kernels import rows
from kernels.launch import chunks, with_kernel

# Bytes of logits at once. A 7B's forward peaks here, its backward 29 MiB higher: more would show.
LOGITS = 200 * 2**20
TOKENS = 512  # at once in float32, which is a CPU's: its caches gain nothing by more
ROWS = 2**20  # logits made float32 at once, where no kernel keeps them in registers


def head_logits(h, weight):
    """h W^T (..., V), float32, of h (..., C) and a head's weight W (V, C).

    weight: a tensor; or an object whose rows exist a slice at a time, as model.QEmbedding's: with
    out_features = V, and slices(dtype) that yields (slice of rows, these rows in dtype).
    """
    return _product(h, weight).float()


def head_loss(h, weight, targets, softcap=0.0):
    """Mean cross-entropy of the logits h W^T, a chunk of tokens at a time.

    h (T, C), weight (V, C) as for head_logits, targets (T,) int64, where -1 does not count.
    softcap: if it is not 0, logits are softcap * tanh(logits / softcap), as in Gemma 2.
    Logits have h's dtype, or autocast's; sums are float32.
    Returns the loss, float32: 0 if no target counts. Its gradients are taken in the same pass.
    """
    return _HeadLoss.apply(h, weight, targets, softcap, torch.is_grad_enabled())


def token_losses(h, weight, targets, softcap=0.0):
    """Each token's cross-entropy, (T,) float32: 0 where none counts. Arguments: as for head_loss.

    For losses that weigh tokens by what comes of them, as DPO's: gradients wait for backward, which
    makes each chunk's logits again."""
    return _TokenLosses.apply(h, weight, targets, softcap)


@with_kernel(rows.cross_entropy_)
def cross_entropy_(logits, targets, softcap=0.0, gradient=True):
    """Each token's -log softmax(logits)[target], (T,) float32; logits become their own gradient.

    logits (T, V) any float dtype: overwritten with d(sum of the result)/d(logits), which is
    softmax - one-hot, or without `gradient` with anything. targets (T,) int64: a token of -1 has
    the loss and the gradient 0. softcap: as for head_loss. Computed in float32.
    """
    losses = torch.empty(len(logits), device=logits.device)
    size = max(1, ROWS // logits.shape[1])  # tokens
    for start in chunks(logits, len(logits), size):
        at = slice(start, start + size)
        x = logits[at].float()  # (size, V), a view if logits are float32
        t = targets[at, None]  # (size, 1)
        if softcap:
            x.div_(softcap).tanh_()
            slope = 1 - x.square() if gradient else None
            x.mul_(softcap)

        # log softmax at the target: the sum of exponents would overflow without the largest
        x.sub_(x.amax(dim=-1, keepdim=True))
        valid = (t >= 0).float()
        t = t.clamp(min=0)
        target = x.gather(1, t)  # (size, 1)
        z = x.exp_().sum(dim=-1, keepdim=True)  # (size, 1); x holds exponents
        losses[at] = ((z.log() - target) * valid)[:, 0]
        if not gradient:
            continue

        g = x.mul_(valid / z).scatter_add_(1, t, -valid)
        if softcap:
            g.mul_(slope)
        if logits.dtype != g.dtype:
            logits[at] = g
    return losses


def chunk_length(tokens, cols, dtype):
    """How many tokens a chunk has: all, or a half, a quarter, ..., so that chunks are alike."""
    most = TOKENS
    if dtype != torch.float32:
        most = max(1, LOGITS // (cols * dtype.itemsize))
    length = max(1, tokens)
    while length > most:
        length = -(-length // 2)
    return length


def _pass(h, weight, targets, softcap, dtype, dh=None, dw=None, scale=None):
    """One pass over the tokens, chunk by chunk: their losses (T,), and their gradients on the way.

    dtype: of the logits. dh (T, C): overwritten with each token's d(loss)/dh; None: no gradients.
    dw (V, C): with d(sum of losses)/d(weight); None: the weight has none. scale: (T,) float32,
    what each token's gradient is multiplied by; None: 1."""
    is_tensor = isinstance(weight, torch.Tensor)
    rows_of = weight.to(dtype) if is_tensor else weight
    cols = len(weight) if is_tensor else weight.out_features  # V
    losses = [torch.zeros(0, device=h.device)]
    if dw is not None and len(h) == 0:
        dw.zero_()
    length = chunk_length(len(h), cols, dtype)
    with torch.autocast(h.device.type, enabled=False):
        for start in chunks(h, len(h), length):
            at = slice(start, start + length)
            x = h[at].to(dtype)  # (length, C)
            logits = _product(x, rows_of)  # (length, V)
            losses.append(cross_entropy_(logits, targets[at], softcap, dh is not None))
            if dh is not None:
                _set_product_(dh[at], logits, rows_of)
            if scale is not None:  # not of the logits: rows of x and dh are V / C times shorter
                dh[at] *= scale[at, None]
                x = (x * scale[at, None]).to(dtype)
            if dw is not None:
                _add_product_(dw, logits, x, is_first=start == 0)
            del logits  # before the next chunk has its own
    return torch.cat(losses)


def _dtype_of_logits(h):
    """h's dtype, or autocast's."""
    if torch.is_autocast_enabled(h.device.type):
        return torch.get_autocast_dtype(h.device.type)
    return h.dtype


class _HeadLoss(torch.autograd.Function):
    """Takes each chunk's gradients in forward, while its logits are at hand. Backward only scales
    them."""

    @staticmethod
    def forward(ctx, h, weight, targets, softcap, need_grad):
        dh = torch.empty_like(h) if need_grad else None
        # a frozen head has no gradient
        dw = torch.empty_like(weight) if need_grad and ctx.needs_input_grad[1] else None
        losses = _pass(h, weight, targets, softcap, _dtype_of_logits(h), dh, dw)
        n = (targets >= 0).sum().clamp(min=1)  # tokens that count
        ctx.has_dw = dw is not None
        if need_grad:
            ctx.save_for_backward(n, *((dh, dw) if ctx.has_dw else (dh,)))
        return losses.sum() / n

    @staticmethod
    def backward(ctx, grad):
        # scaled in place: at 7B dw alone is 0.4 GiB
        n, dh, *dw = ctx.saved_tensors
        scale = grad / n
        dw = dw[0].mul_(scale) if ctx.has_dw else None
        return dh.mul_(scale), dw, None, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, softcap):
        ctx.softcap = softcap
        ctx.dtype = _dtype_of_logits(h)
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(h, targets, *([weight] if ctx.weight is None else []))
        return _pass(h, weight, targets, softcap, ctx.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, targets, *weight = ctx.saved_tensors
        weight = weight[0] if weight else ctx.weight
        dh = torch.empty_like(h)
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        _pass(h, weight, targets, ctx.softcap, ctx.dtype, dh, dw, scale=grad)
        return dh, dw, None, None


def _product(h, weight):
    """h W^T (..., V), in h's dtype."""
    if isinstance(weight, torch.Tensor):
        return F.linear(h, weight)
    logits = torch.empty(*h.shape[:-1], weight.out_features, dtype=h.dtype, device=h.device)
    for at, part in weight.slices(h.dtype):
        logits[..., at] = F.linear(h, part)
    return logits


def _set_product_(dh, g, weight):
    """dh <- g W, (T, C), of g (T, V)."""
    if not isinstance(weight, torch.Tensor):
        dh.copy_(sum(g[:, columns] @ part for columns, part in weight.slices(g.dtype)))
    elif dh.dtype == g.dtype:
        torch.mm(g, weight, out=dh)
    else:
        dh.copy_(g @ weight)


def _add_product_(dw, g, x, is_first):
    """dw <- dw + g^T x, (V, C), or g^T x if it is the first."""
    if dw.dtype == g.dtype:
        dw.addmm_(g.T, x, beta=0 if is_first else 1)
    elif is_first:
        dw.copy_(g.T @ x)
    else:
        dw += g.T @ x
