"""
Q-GaLore (arXiv 2407.08296): 8-bit Adam on low-rank gradients of INT8 weights, each weight stepped inside backward.

The gradient of W (out x in) over T tokens is G = dy^T x. Take the side of W that is smaller (the input side of a square
matrix), an orthonormal basis P of r directions of that side, and let Adam see only the gradient within them:

    out >= in:  R = G P      dW = -lr * scale * N P^T          N = Adam(R)
    out <  in:  R = G^T P    dW = -lr * scale * P N^T

G is never formed. With `a` the factor on the projected side (x, or dy) and `b` the other, both cases are one product of
thin matrices, R = b^T (a P), at r = d/4 two to three times fewer operations than G alone. It is linear in the tokens,
so micro-batches accumulate in R exactly.

P comes from the current gradient every `gap` steps, in INT4. A layer whose subspace has come to rest doubles its own
gap, and stops paying for refreshes (section 3.2).

What differs from the well-known galore-torch and q-galore-torch: accumulation, all parameters train, the update is
added in float32 before it is rounded, a randomised range finder takes the place of the full SVD, similarity compares
subspaces and not the first vector with its sign, and the state can be saved.
"""

import logging
from collections import deque
from functools import partial

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses 4-bit kernels: none is used here
import bitsandbytes.functional as bnb
import torch

from model import QLinear
from quant import GROUP_SIZE, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

ROWS = 1024  # rows of a weight updated at once: at 7B its float copies take 5 x 16 MiB a thousand columns, not 5 x 172
MAX_GAP_GROWTH = 32  # a gap doubles five times at most: no layer is left with a stale subspace for good
MIN_8BIT = 4096  # smaller tensors keep float32 moments, as in bitsandbytes


class Projection:
    """The basis of one layer's low-rank gradient, and the schedule by which it is refreshed.

    bits: 4, 8 (group-wise codes), or 16: the basis unquantised, in float32. svd: take the exact singular vectors of the
    formed gradient, as the papers do, in place of the range finder. gap, threshold, k: see QGaLore.
    """

    def __init__(self, out_features, in_features, rank, gap=200, threshold=0.4, k=5, bits=4, svd=False):
        self.right = out_features >= in_features  # the basis lies on the input side
        self.dim = min(out_features, in_features)
        self.rank, self.threshold, self.bits, self.svd = min(rank, self.dim), threshold, bits, svd
        self.gap, self.max_gap = gap, gap * MAX_GAP_GROWTH
        self.next_refresh = self.refreshes = 0
        self.similarities = deque(maxlen=k)
        self.basis = None  # tensors: (packed, scale, zero), (q, scale, zero) or (P,)

    def factors(self, x, dy):
        """(a, b) of R = b^T (a P): a lies on the projected side."""
        return (x, dy) if self.right else (dy, x)

    def matrix(self, dtype=torch.float32):
        """P (dim, rank)."""
        if self.bits == 16:
            return self.basis[0].to(dtype)
        return (dequantize_int4 if self.bits == 4 else dequantize_int8)(*self.basis, dtype=dtype)

    def nbytes(self):
        """Bytes of the basis."""
        groups = self.dim * -(-self.rank // GROUP_SIZE)
        return 4 * self.dim * self.rank if self.bits == 16 else -(-self.dim * self.rank * self.bits // 8) + 8 * groups

    def project(self, x, dy):
        """R (the other side, rank), float32, from x (T, in) and dy (T, out)."""
        a, b = self.factors(x, dy)
        return (b.T @ (a @ self.matrix(a.dtype))).float()

    def refresh(self, x, dy, step, generator=None):
        """Take a new basis from this batch's gradient if one is due. A gradient that is zero or not finite decides
        nothing: the refresh then waits for the next step. Returns whether there was one."""
        if step < self.next_refresh:
            return False
        a, b = self.factors(x, dy)
        if self.rank == self.dim:
            new = torch.eye(self.dim, device=x.device)  # full rank: any basis spans all, and this one is Adam's own
        else:
            omega = torch.randn(b.shape[1], self.rank, device=x.device, generator=generator).to(b.dtype)
            sketch = (a.T @ (b @ omega)).float()
            size = sketch.norm()
            if not size.isfinite() or size == 0:
                return False
            new = self._svd(x, dy) if self.svd else self._range_finder(a, b, sketch)
        if self.basis is not None:
            self.similarities.append(similarity(self.matrix(), new))
            if len(self.similarities) == self.similarities.maxlen and self._mean() >= self.threshold:
                self.gap = min(2 * self.gap, self.max_gap)
        if self.bits == 16:
            self.basis = (new.contiguous(),)
        else:
            self.basis = (quantize_int4 if self.bits == 4 else quantize_int8)(new)
        self.next_refresh = step + self.gap
        self.refreshes += 1
        return True

    def _mean(self):
        return sum(self.similarities) / len(self.similarities)

    def _range_finder(self, a, b, sketch):
        """Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4 with one power iteration, from G's factors.
        Householder QR completes the basis when the gradient has fewer directions than rank, where an SVD may fail."""
        q = torch.linalg.qr(sketch)[0].to(a.dtype)
        sketch = (a.T @ (b @ (b.T @ (a @ q)))).float()
        return torch.linalg.qr(sketch)[0]

    def _svd(self, x, dy):
        u, _, vh = torch.linalg.svd((dy.T @ x).float(), full_matrices=False)
        return vh[: self.rank].T if self.right else u[:, : self.rank]

    def state_dict(self):
        names = ("gap", "next_refresh", "refreshes", "basis")
        return {name: getattr(self, name) for name in names} | {"similarities": list(self.similarities)}

    def load_state_dict(self, state):
        for name in ("gap", "next_refresh", "refreshes", "basis"):
            setattr(self, name, state[name])
        self.similarities.extend(state["similarities"])


def similarity(old, new):
    """How much of one subspace lies in the other, from 0 (what chance gives) to 1 (the same), whatever the signs and
    order of the basis vectors: (o - r/m) / (1 - r/m) with o = |old^T new|_F^2 / r. old, new: (m, r), orthonormal."""
    m, r = new.shape
    if r == m:
        return 1.0
    overlap = (old.T @ new).square().sum().item() / r
    return (overlap - r / m) / (1 - r / m)


class Moments:
    """Adam's two moments of one tensor: block-wise 8-bit codes kept and stepped by bitsandbytes, or float32."""

    def __init__(self, like, bits):
        self.bits = bits if like.numel() >= MIN_8BIT else 32
        kind = torch.uint8 if self.bits == 8 else torch.float32
        self.m, self.v = (torch.zeros(like.shape, dtype=kind, device=like.device) for _ in range(2))
        if self.bits == 8:
            blocks = -(-like.numel() // 256)
            self.m_max, self.v_max = (torch.zeros(blocks, dtype=torch.float32, device=like.device) for _ in range(2))

    def step_(self, p, g, step, lr, betas, eps, weight_decay=0.0):
        """p <- (1 - lr weight_decay) p - lr Adam(g), in place, with decoupled decay (arXiv 1711.05101).
        p, g: of one dtype. step: 1 at the first."""
        if self.bits == 8:
            bnb.optimizer_update_8bit_blockwise("adam", g, p, self.m, self.v, *betas, 0.0, 0.0, eps, step, lr,
                                                *_code_maps(p.device), self.m_max, self.v_max, weight_decay)
            return
        g = g.float()
        self.m.lerp_(g, 1 - betas[0])
        self.v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = self.v.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
        new = p.float().mul(1 - lr * weight_decay).addcdiv_(self.m, denominator, value=-lr / (1 - betas[0] ** step))
        p.copy_(new)


_maps = {}


def _code_maps(device):
    """bitsandbytes' values of the 256 codes: signed for the first moment, unsigned for the second."""
    if device not in _maps:
        _maps[device] = [bnb.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
    return _maps[device]


class QGaLore:
    """Steps a model's weights inside backward: QLinear weights by Q-GaLore, other parameters by plain 8-bit Adam.

    model: any module that holds QLinear layers, ordinary parameters, or both. Nothing calls a step(): loss.backward()
    is the step, and leaves no .grad behind. Set `accumulating = True` for the micro-batches before a step's last; scale
    each loss by their number. Set the rate in param_groups[0]["lr"], as with any torch optimizer.

    lr: of ordinary parameters; projected weights move at lr * scale. rank: of the projections, clamped to a weight's
    smaller side. gap: steps between refreshes; it doubles where the mean similarity of the last k reaches threshold
    (a threshold over 1 keeps it fixed). proj_bits: 4, 8 or 16 (not quantised). moment_bits: 8 or 32.
    stochastic_rounding: False rounds INT8 weights to nearest. svd: exact, in place of the range finder.
    grad_clip: if positive, the norm that each weight's own gradient is scaled down to. weight_decay: decoupled, on
    matrices alone. A gradient that is not finite skips that weight's step; pop_stats() counts it.
    """

    def __init__(self, model, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128, gap=200, scale=0.25,
                 threshold=0.4, k=5, proj_bits=4, moment_bits=8, stochastic_rounding=True, svd=False, grad_clip=0.0,
                 seed=0):
        if proj_bits not in (4, 8, 16) or moment_bits not in (8, 32):
            raise ValueError(f"proj_bits is 4, 8 or 16, not {proj_bits}; moment_bits is 8 or 32, not {moment_bits}")
        self.param_groups = [{"lr": lr}]
        self.betas, self.eps, self.weight_decay, self.scale = betas, eps, weight_decay, scale
        self.moment_bits, self.stochastic_rounding, self.grad_clip = moment_bits, stochastic_rounding, grad_clip
        self.accumulating = False
        self.steps, self.moments, self.projections, self.low_rank_grads = {}, {}, {}, {}  # by the weight's name
        self.norm_squared, self.skipped = 0.0, 0
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                self.projections[name] = Projection(module.out_features, module.in_features, rank, gap, threshold, k,
                                                    proj_bits, svd)
                module.hook = partial(self._step_layer, name)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(partial(self._step_parameter, name))
        device = next(t.device for ts in (model.parameters(), model.buffers()) for t in ts)
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def _step_layer(self, name, layer, x, dy):
        projection, step = self.projections[name], self.steps.get(name, 0)
        grad = self.low_rank_grads.pop(name, None)  # (the other side, rank) float32, of the micro-batches so far
        if grad is None:
            projection.refresh(x, dy, step, self.generator)
            if projection.basis is None:
                self.skipped += 1
                return
        r = projection.project(x, dy)
        if grad is not None:
            r += grad
        if self.accumulating:
            self.low_rank_grads[name] = r
            return
        if not self._admit(r):
            return
        lr = self.param_groups[0]["lr"]
        minus_n = torch.zeros_like(r)
        self._moments(name, r).step_(minus_n, r, step + 1, 1.0, self.betas, self.eps)
        left, right = (minus_n, projection.matrix()) if projection.right else (projection.matrix(), minus_n)
        left, right = left.to(x.dtype), right.to(x.dtype)  # dW = lr * scale * left @ right^T
        for start in range(0, layer.out_features, ROWS):
            rows = slice(start, start + ROWS)
            delta = (left[rows] @ right.T).float().mul_(lr * self.scale)
            layer.add_(delta, rows, 1 - lr * self.weight_decay, self.stochastic_rounding, self.generator)
        self.steps[name] = step + 1

    @torch.no_grad()
    def _step_parameter(self, name, p):
        if self.accumulating:
            return
        grad, p.grad = p.grad, None
        if not self._admit(grad):
            return
        self.steps[name] = step = self.steps.get(name, 0) + 1
        self._moments(name, p).step_(p, grad, step, self.param_groups[0]["lr"], self.betas, self.eps,
                                     self.weight_decay if p.ndim > 1 else 0.0)

    def _moments(self, name, like):
        if name not in self.moments:
            self.moments[name] = Moments(like, self.moment_bits)
        return self.moments[name]

    def _admit(self, grad):
        """Count the gradient's norm and clip it in place; False if it is not finite."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32).item()
        if not norm < float("inf"):
            self.skipped += 1
            return False
        self.norm_squared += norm**2
        if self.grad_clip and norm > self.grad_clip:
            grad.mul_(self.grad_clip / norm)
        return True

    def pop_stats(self):
        """Since the last call: grad_norm over all weights (of the low-rank gradient where projected) and the number of
        steps skipped; and the refreshes since the start of training."""
        stats = {"grad_norm": self.norm_squared**0.5, "skipped": self.skipped,
                 "refreshes": sum(p.refreshes for p in self.projections.values())}
        self.norm_squared, self.skipped = 0.0, 0
        return stats

    def state_dict(self):
        """Everything that the next step depends on, as tensors, numbers and containers of them."""
        return {
            "steps": dict(self.steps),
            "moments": {name: vars(moments) for name, moments in self.moments.items()},
            "projections": {name: projection.state_dict() for name, projection in self.projections.items()},
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        self.steps = dict(state["steps"])
        for name, tensors in state["moments"].items():
            self.moments[name] = moments = Moments.__new__(Moments)
            vars(moments).update({key: self._here(value) for key, value in tensors.items()})
        for name, projection in state["projections"].items():
            basis = projection["basis"] and tuple(map(self._here, projection["basis"]))
            self.projections[name].load_state_dict(projection | {"basis": basis})
        self.generator.set_state(state["generator"].cpu())

    def _here(self, value):
        return value.to(self.generator.device) if isinstance(value, torch.Tensor) else value
