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
import math
from collections import deque
from functools import partial

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses 4-bit kernels: none is used here
import bitsandbytes.functional as bnb
import torch

from kernels import adam_int8_, dequantize_int4, dequantize_int8
from model import QLinear
from quant import CHUNK, GROUP_SIZE, add_bfloat16_, chunks, quantize_int4, quantize_int8, random_key, uniform

MAX_GAP_GROWTH = 32  # a gap doubles five times at most: no layer is left with a stale subspace for good
POWER_ITERATIONS = 3  # keep 99.7 % of the exact subspace's energy in SmolLM2's worst matrix; one 98.7, two 99.5
MIN_8BIT = 4096  # smaller tensors and vectors keep float32 moments, as in bitsandbytes
MOMENTS = ("factored", "8bit", "float32")
CODES = [bnb.create_dynamic_map(signed=signed) for signed in (True, False)]  # values of the 8-bit moments' codes


class Projection:
    """The basis of one layer's low-rank gradient, and the schedule by which it is refreshed.

    bits: 4, 8 (group-wise codes), or 16: the basis unquantised, in float32. svd: take the exact singular vectors of the
    formed gradient, as the papers do, in place of the range finder. gap, threshold, k: see QGaLore. phase: the share of
    the gap after which the first basis gives way, so that layers which start together refresh at different steps.
    """

    def __init__(self, out_features, in_features, rank, gap=200, threshold=0.4, k=5, bits=4, svd=False, phase=1.0):
        self.right = out_features >= in_features  # the basis lies on the input side
        self.dim = min(out_features, in_features)
        self.rank, self.threshold, self.bits, self.svd = min(rank, self.dim), threshold, bits, svd
        self.gap, self.max_gap, self.phase = gap, gap * MAX_GAP_GROWTH, phase
        self.last_refresh = self.next_refresh = self.refreshes = 0
        self.similarities = deque(maxlen=k)
        self.arriving = None  # the similarity found by the last refresh, on its way from the device
        self.basis = None  # tensors: (packed, scale, zero), (q, scale, zero) or (P,)

    def factors(self, x, dy):
        """(a, b) of R = b^T (a P): a lies on the projected side."""
        return (x, dy) if self.right else (dy, x)

    def matrix(self, dtype=torch.float32):
        """P (dim, rank)."""
        if self.bits == 16:
            return self.basis[0].to(dtype)
        return (dequantize_int4 if self.bits == 4 else dequantize_int8)(*self.basis, dtype=dtype)

    def encode(self, p):
        """The tensors that keep P (dim, rank), float32, as `basis`."""
        return (p.contiguous(),) if self.bits == 16 else (quantize_int4 if self.bits == 4 else quantize_int8)(p)

    def project(self, x, dy):
        """R (the other side, rank), float32, from x (T, in) and dy (T, out)."""
        a, b = self.factors(x, dy)
        return (b.T @ (a @ self.matrix(a.dtype))).float()

    def refresh(self, x, dy, step, key=0):
        """Take a new basis from this batch's gradient if one is due; key: of its random numbers. Returns whether it was
        due. A gradient that is zero or not finite decides nothing: the old basis then stays for another gap; the first
        basis waits for the next step, and is the one that makes the host wait for the device."""
        if step < self.next_refresh or self._settle() > step:
            return False
        a, b = self.factors(x, dy)
        if self.rank == self.dim:
            new, ok = torch.eye(self.dim, device=x.device), None  # any basis spans all, and this one is Adam's own
        else:
            omega = uniform(key, 0, b.shape[1] * self.rank, x.device).sub_(0.5).view(-1, self.rank).to(b.dtype)
            sketch = (a.T @ (b @ omega)).float()  # (dim, rank)
            size = sketch.norm()
            ok = size.isfinite() & (size > 0)
            if self.basis is None and not ok:
                return False
            new = self._svd(x, dy, ok) if self.svd else self._range_finder(a, b, sketch, ok)
        if self.basis is not None:
            found = similarity(self.matrix(), new)
            self.arriving = Arriving(found if ok is None else found.where(ok, torch.nan))
        codes = self.encode(new)
        if self.basis is None or ok is None:
            self.basis = codes
        else:
            self.basis = tuple(torch.where(ok, new, old) for new, old in zip(codes, self.basis))
        gap = self.gap if self.refreshes else max(1, round(self.gap * self.phase))
        self.last_refresh, self.next_refresh = step, step + gap
        self.refreshes += 1
        return True

    def _settle(self):
        """Let the last refresh's similarity decide the gap, if it has not; returns the next refresh's step."""
        if self.arriving is not None:
            found, self.arriving = self.arriving.value(), None
            if not math.isnan(found):
                self.similarities.append(found)
                mean = sum(self.similarities) / len(self.similarities)
                if len(self.similarities) == self.similarities.maxlen and mean >= self.threshold:
                    self.gap = min(2 * self.gap, self.max_gap)
                    self.next_refresh = self.last_refresh + self.gap
        return self.next_refresh

    def _range_finder(self, a, b, sketch, ok):
        """Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4, from G's factors. Householder QR completes the
        basis when the gradient has fewer directions than rank, where an SVD may fail."""
        q = torch.linalg.qr(sketch.masked_fill_(~ok, 0))[0]
        for _ in range(POWER_ITERATIONS):
            sketch = (a.T @ (b @ (b.T @ (a @ q.to(a.dtype))))).float()
            q = torch.linalg.qr(sketch.masked_fill_(~ok, 0))[0]
        return q

    def _svd(self, x, dy, ok):
        u, _, vh = torch.linalg.svd((dy.T @ x).float().masked_fill_(~ok, 0), full_matrices=False)
        return vh[: self.rank].T if self.right else u[:, : self.rank]

    def state_dict(self):
        self._settle()
        names = ("gap", "last_refresh", "next_refresh", "refreshes", "basis")
        return {name: getattr(self, name) for name in names} | {"similarities": list(self.similarities)}

    def load_state_dict(self, state):
        for name in ("gap", "last_refresh", "next_refresh", "refreshes", "basis"):
            setattr(self, name, state[name])
        self.similarities.extend(state["similarities"])


class Arriving:
    """A number on its way from the device: whoever asks for it a step later waits for that copy, not for the queue of
    work behind it, as .item() would."""

    def __init__(self, tensor):
        self.host, self.event = tensor, None
        if tensor.is_cuda:
            self.host = torch.empty((), pin_memory=True).copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def value(self):
        if self.event is not None:
            self.event.synchronize()
        return self.host.item()


def similarity(old, new):
    """How much of one subspace lies in the other, from 0 (what chance gives) to 1 (the same), whatever the signs and
    order of the basis vectors: (o - r/m) / (1 - r/m) with o = |old^T new|_F^2 / r. old, new: (m, r), orthonormal. A ()
    tensor on their device."""
    m, r = new.shape
    if r == m:
        return torch.ones((), device=new.device)
    overlap = (old.T @ new).square().sum() / r
    return (overlap - r / m) / (1 - r / m)


class Moments:
    """Adam's two moments of one tensor. kind:

    "factored": the first in INT8, rounded stochastically; the second as a row and a column, v_ij = row_i col_j / mean
        (Adafactor, arXiv 1804.04235, section 3): 1 byte an element
    "8bit": both as block-wise 8-bit codes, kept and stepped by bitsandbytes: 2 bytes
    "float32": 8 bytes; also taken for vectors and small tensors
    """

    def __init__(self, shape, kind, device=None):
        n, zeros = math.prod(shape), partial(torch.zeros, device=device)
        self.kind = kind if len(shape) > 1 and n >= MIN_8BIT else "float32"
        if self.kind == "factored":
            rows, cols = shape
            self.m, self.m_scale, self.m_zero = zeros(shape, dtype=torch.int8), *zeros(2, rows, -(-cols // GROUP_SIZE))
            self.row, self.col = zeros(rows), zeros(cols)
        elif self.kind == "8bit":
            self.m, self.v = zeros(2, *shape, dtype=torch.uint8)
            self.m_max, self.v_max = zeros(2, -(-n // 256))
            self.m_codes, self.v_codes = (codes.to(device) for codes in CODES)
        else:
            self.m, self.v = zeros(2, *shape)

    def step_(self, g, step, betas, eps, key=0):
        """g <- Adam(g) in place: what a weight moves by at a rate of -1. g: contiguous. step: 1 at the first. key: of
        the random numbers that round the first moment."""
        correction = [1 - beta**step for beta in betas]
        if self.kind == "factored":
            row, col, size = torch.empty_like(self.row), torch.zeros_like(self.col), max(1, CHUNK // g.shape[1])
            for start in chunks(g, len(g), size):
                square = g[start : start + size].float().square()
                row[start : start + size] = square.mean(dim=1)
                col += square.sum(dim=0)
            self.row.lerp_(row, 1 - betas[1])
            self.col.lerp_(col / len(g), 1 - betas[1])
            row = (self.row / (self.row.mean() * correction[1]).clamp_(min=1e-30)).sqrt_()
            adam_int8_(self.m, self.m_scale, self.m_zero, g, row, self.col.sqrt(), betas[0], correction[0], eps, key)
        elif self.kind == "8bit":
            flat = [t.view(-1).split(CHUNK) for t in (g, self.m, self.v)]
            maxima = [t.split(CHUNK // 256) for t in (self.m_max, self.v_max)]
            for g, m, v, m_max, v_max in zip(*flat, *maxima):
                minus_n = torch.zeros_like(g)
                bnb.optimizer_update_8bit_blockwise("adam", g, minus_n, m, v, *betas, 0.0, 0.0, eps, step, 1.0,
                                                    self.m_codes, self.v_codes, m_max, v_max)
                torch.neg(minus_n, out=g)
        else:
            self.m.lerp_(g.float(), 1 - betas[0])
            self.v.lerp_(g.float().square(), 1 - betas[1])
            g.copy_(self.m / (self.v / correction[1]).sqrt_().add_(eps).mul_(correction[0]))


class QGaLore:
    """Steps a model's weights inside backward: QLinear weights by Q-GaLore, other parameters by plain 8-bit Adam.

    model: any module that holds QLinear layers, ordinary parameters, or both. Nothing calls a step(): loss.backward()
    is the step, and leaves no .grad behind. Set `accumulating = True` for the micro-batches before a step's last; scale
    each loss by their number. Set the rate in param_groups[0]["lr"], as with any torch optimizer.

    lr: of ordinary parameters; projected weights move at lr * scale. rank: of the projections, clamped to a weight's
    smaller side. gap: steps between refreshes; it doubles where the mean similarity of the last k reaches threshold
    (a threshold over 1 keeps it fixed). proj_bits: 4, 8 or 16 (not quantised). moments: see Moments.
    stochastic_rounding: False rounds INT8 weights to nearest. svd: exact, in place of the range finder.
    grad_clip: if positive, the norm that each weight's own gradient is scaled down to. weight_decay: decoupled, on
    matrices alone. A gradient that is not finite counts as zero; pop_stats() counts it.
    """

    def __init__(self, model, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128, gap=200, scale=0.25,
                 threshold=0.4, k=5, proj_bits=4, moments="factored", stochastic_rounding=True, svd=False,
                 grad_clip=0.0, seed=0):
        if proj_bits not in (4, 8, 16) or moments not in MOMENTS:
            raise ValueError(f"proj_bits is 4, 8 or 16, not {proj_bits}; moments is one of {MOMENTS}, not {moments!r}")
        self.param_groups = [{"lr": lr}]
        self.betas, self.eps, self.weight_decay, self.scale, self.seed = betas, eps, weight_decay, scale, seed
        self.stochastic_rounding, self.grad_clip = stochastic_rounding, grad_clip
        self.accumulating = False
        self.steps, self.moments, self.projections, self.low_rank_grads = {}, {}, {}, {}  # by the weight's name
        self.device = next(t.device for ts in (model.parameters(), model.buffers()) for t in ts)
        self.norm_squared, self.skipped = torch.zeros(2, device=self.device)  # on the device: a step waits for nothing
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
        for i, (name, layer) in enumerate(layers.items()):
            self.projections[name] = projection = Projection(
                layer.out_features, layer.in_features, rank, gap, threshold, k, proj_bits, svd, (i + 1) / len(layers))
            shape = layer.in_features + layer.out_features - projection.dim, projection.rank
            self.moments[name] = Moments(shape, moments, self.device)
            layer.hook = partial(self._step_layer, name)
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.moments[name] = Moments(p.shape, moments, self.device)
                p.register_post_accumulate_grad_hook(partial(self._step_parameter, name))

    @torch.no_grad()
    def _step_layer(self, name, layer, x, dy):
        projection, step = self.projections[name], self.steps.get(name, 0)
        grad = self.low_rank_grads.pop(name, None)  # (the other side, rank) float32, of the micro-batches so far
        if grad is None:
            projection.refresh(x, dy, step, random_key(self.seed, name, step, "sketch"))
            if projection.basis is None:
                self.skipped += 1
                return
        r = projection.project(x, dy)
        if grad is not None:
            r += grad
        if self.accumulating:
            self.low_rank_grads[name] = r
            return
        lr = self.param_groups[0]["lr"]
        self._admit_(r)
        self.moments[name].step_(r, step + 1, self.betas, self.eps, random_key(self.seed, name, step, "moment"))
        delta, basis = r.mul_(-lr * self.scale).to(x.dtype), projection.matrix(x.dtype)
        left, right = (delta, basis) if projection.right else (basis, delta)
        key = random_key(self.seed, name, step) if self.stochastic_rounding else None
        layer.add_low_rank_(left, right, 1 - lr * self.weight_decay, key)
        self.steps[name] = step + 1

    @torch.no_grad()
    def _step_parameter(self, name, p):
        if self.accumulating:
            return
        grad, p.grad = p.grad, None
        self._admit_(grad)
        lr = self.param_groups[0]["lr"]
        self.steps[name] = step = self.steps.get(name, 0) + 1
        self.moments[name].step_(grad, step, self.betas, self.eps, random_key(self.seed, name, step))
        if p.ndim > 1 and self.weight_decay:
            p.mul_(1 - lr * self.weight_decay)  # decoupled (arXiv 1711.05101)
        if p.dtype == torch.bfloat16:
            add_bfloat16_(p, grad, -lr, random_key(self.seed, name, step, "weight"))
        else:
            p.add_(grad, alpha=-lr)

    def _admit_(self, grad):
        """Count the gradient's norm and clip it in place; one that is not finite becomes zero."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        ok = norm.isfinite()
        self.skipped += ~ok
        self.norm_squared += norm.square().where(ok, 0)
        grad.masked_fill_(~ok, 0)
        if self.grad_clip:
            grad.mul_((self.grad_clip / norm).clamp(max=1).where(ok, 1))

    def pop_stats(self):
        """Since the last call: grad_norm over all weights (of the low-rank gradient where projected) and the number of
        gradients that were not finite; and the refreshes since the start of training. Waits for the device."""
        stats = {"grad_norm": self.norm_squared.item() ** 0.5, "skipped": int(self.skipped.item()),
                 "refreshes": sum(p.refreshes for p in self.projections.values())}
        self.norm_squared.zero_(), self.skipped.zero_()
        return stats

    def state_dict(self):
        """Everything that the next step depends on, as tensors, numbers and containers of them."""
        return {
            "steps": dict(self.steps),
            "moments": {name: vars(moments) for name, moments in self.moments.items()},
            "projections": {name: projection.state_dict() for name, projection in self.projections.items()},
        }

    def load_state_dict(self, state):
        self.steps = dict(state["steps"])
        for name, tensors in state["moments"].items():
            vars(self.moments[name]).update({key: self._here(value) for key, value in tensors.items()})
        for name, projection in state["projections"].items():
            basis = projection["basis"] and tuple(map(self._here, projection["basis"]))
            self.projections[name].load_state_dict(projection | {"basis": basis})

    def _here(self, value):
        return value.to(self.device) if isinstance(value, torch.Tensor) else value
