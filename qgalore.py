"""
Q-GaLore (arXiv 2407.08296): 8-bit Adam on low-rank gradients of INT8 weights, each weight stepped inside backward.

The gradient of W (out x in) over T tokens is G = dy^T x. Take the side of W that is smaller (the input side of a square
matrix), an orthonormal basis P of r directions of that side, and let Adam see only the gradient within them:

    out >= in:  R = P^T G^T    dW = -lr * scale * N^T P^T          N = Adam(R)
    out <  in:  R = P^T G      dW = -lr * scale * P N

G is never formed. With `a` the factor on the projected side (x, or dy) and `b` the other, both cases are one product of
thin matrices, R = (a P)^T b, at r = d/4 two to three times fewer operations than G alone. It is linear in the tokens,
so micro-batches and GPUs add up in R. A row of R is one direction of the basis, so that the groups which share
a scale in INT8 do not mix strong directions with weak ones.

P comes from the gradient of a whole batch every `gap` steps, in INT4. A layer whose subspace has come to rest doubles
its own gap, and stops paying for refreshes (section 3.2).

That is --method=qgalore. train.py's default makes another step of the same R and P, Muon's; that and others: family.py.

What differs from the well-known galore-torch and q-galore-torch: accumulation, all parameters train, the update is
added in float32 before it is rounded, a randomised range finder takes the place of the full SVD, similarity compares
subspaces and not the first vector with its sign, and the state can be saved.
"""

import math
from collections import deque
from functools import partial

import torch

from methods.family import RULES, frobenius
from kernels.quantized import decode, encode
from model import QLinear
from methods.moments import ACCUMULATION, AT_REFRESH, MOMENTS, Momentum, Moments, Sum, SumInMomentum
from run.ranks import Ranks
from quant import CHUNK, add_bfloat16_, chunks, random_key, rounding_key, uniform

MAX_GAP_GROWTH = 32  # a gap doubles five times at most: no layer is left with a stale subspace for good
SKETCH = 4  # columns of a refresh's sketch, in ranks
POWER_ITERATIONS = 3  # of the range finder on the sketch


class Projection:
    """The basis of one layer's low-rank gradient, and the schedule by which it is refreshed.

    A new basis comes from a sketch of the gradient, Y = G^T Omega (left: G Omega) with SKETCH * rank random columns in
    Omega. It is linear in G, so the micro-batches and ranks of a step add up in it; at r = d/4 it is as large as a
    square weight's G, but few layers refresh in one step. The range finder (Halko, Martinsson and Tropp, arXiv
    0909.4061, algorithm 4.4) then takes the rank directions of most energy from Y. The step that makes the sketch is
    still taken in the old basis; the first one moves no weight of the layer, and its sketch has but `rank` columns, as
    all layers make theirs at once.

    bits: 4, 8 (group-wise codes), or 16: the basis unquantised, in float32. svd: take the exact singular vectors of the
    formed gradient, as the papers do. gap, threshold, k, side, growth: see QGaLore. phase: the share of the gap after
    which the first basis gives way, so that layers which start together refresh at different steps.
    """

    def __init__(self, out_features, in_features, rank, gap=200, threshold=0.4, k=5, bits=4, svd=False, phase=1.0,
                 device=None, side="auto", growth=0.0):
        self.right = out_features >= in_features if side == "auto" else side == "right"  # the basis is of the inputs
        self.dim, self.other = (in_features, out_features) if self.right else (out_features, in_features)
        self.rank, self.threshold, self.bits, self.svd = min(rank, self.dim), threshold, bits, svd
        self.gap, self.max_gap, self.phase, self.growth = gap, gap * MAX_GAP_GROWTH, phase, growth
        self.last_refresh = self.next_refresh = self.refreshes = 0
        self.similarities = deque(maxlen=k)
        self.arriving = None  # the similarity found by the last refresh, on its way from the device
        self.turns = []  # (step, similarity, gap) of refreshes, until pop_turns takes them
        self.basis = None  # tensors: (packed, scale, zero), (q, scale, zero) or (P,)
        if self.rank == self.dim:  # any basis spans all, and this one is Adam's own
            self.basis, self.next_refresh = self.encode(torch.eye(self.dim, device=device)), math.inf

    def matrix(self, dtype=torch.float32):
        """P (dim, rank)."""
        return decode(self.basis, dtype)

    def encode(self, p):
        """The tensors that keep P (dim, rank), float32, as `basis`."""
        return encode(p, self.bits)

    def project(self, x, dy):
        """(left, right) with left^T right = R (rank, other), from x (T, in) and dy (T, out)."""
        a, b = (x, dy) if self.right else (dy, x)
        return a @ self.matrix(a.dtype), b

    def due(self, step):
        """Whether this step's gradient is to be looked at for a refresh."""
        return step >= self.next_refresh and self._settle() <= step

    def look(self, x, dy, key):
        """(left, right) with left^T right = the sketch Y; with svd the gradient itself, (dim, other). key: of the
        random numbers in Omega."""
        a, b = (x, dy) if self.right else (dy, x)
        if self.svd:
            return a, b
        width = self.rank * (1 if self.basis is None else SKETCH)
        omega, rows = torch.empty(self.other, width, dtype=b.dtype, device=b.device), max(1, CHUNK // width)
        for i in chunks(b, self.other, rows):
            part = omega[i : i + rows]
            part.copy_(uniform(key, i * width, part.numel(), b.device).sub_(0.5).view(part.shape))
        return a, b @ omega

    def turn(self, sketch, step):
        """Take a new basis from a sketch, float32, overwritten. A gradient that is zero or not finite decides nothing:
        the old basis then stays for another gap; the first basis waits for the next step, and is the one that makes the
        host wait for the device. Householder QR completes the basis when the gradient has fewer directions than rank.
        Returns old^T new, (rank, rank), and whether the gradient was of use, () bool; None where there was no old
        basis."""
        size = sketch.norm()
        ok = size.isfinite() & (size > 0)
        if self.basis is None and not ok:
            return None
        sketch.masked_fill_(~ok, 0)
        if self.svd:
            u, _, vh = torch.linalg.svd(sketch.T if self.right else sketch, full_matrices=False)  # of G, as the papers
            new = vh[: self.rank].T if self.right else u[:, : self.rank]
        else:
            new = torch.linalg.qr(sketch[:, : self.rank])[0]
            for _ in range(POWER_ITERATIONS if sketch.shape[1] > self.rank else 0):
                new = torch.linalg.qr(sketch @ (sketch.T @ new))[0]
        codes, found = self.encode(new), None
        if self.basis is None:
            self.basis = codes
        else:
            overlap = (self.matrix().T @ new).where(ok, torch.eye(self.rank, device=new.device))
            self.arriving = Arriving(similarity(overlap, self.dim).where(ok, torch.nan))
            self.basis = tuple(torch.where(ok, new, old) for new, old in zip(codes, self.basis))
            found = overlap, ok
        gap = self.gap if self.refreshes else max(1, round(self.gap * self.phase))
        gap += int(self.growth**self.refreshes) if self.growth else 0
        self.last_refresh, self.next_refresh = step, step + gap
        self.refreshes += 1
        return found

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
                self.turns.append((self.last_refresh, round(found, 4), self.gap))
        return self.next_refresh

    def state_dict(self):
        self._settle()
        names = ("gap", "last_refresh", "next_refresh", "refreshes", "basis")
        lists = {"similarities": list(self.similarities), "turns": list(self.turns)}
        return {name: getattr(self, name) for name in names} | lists

    def load_state_dict(self, state):
        for name in ("gap", "last_refresh", "next_refresh", "refreshes", "basis"):
            setattr(self, name, state[name])
        self.turns = list(state.get("turns", []))
        self.similarities, self.arriving = deque(state["similarities"], self.similarities.maxlen), None


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


def similarity(overlap, dim):
    """How much of one subspace of `dim` dimensions lies in the other, from 0 (what chance gives) to 1 (the same),
    whatever the signs and order of their orthonormal bases' vectors: (o - r/dim) / (1 - r/dim), o = |overlap|_F^2 / r,
    a () tensor. overlap: old^T new, (r, r), r < dim."""
    share = len(overlap) / dim
    return (overlap.square().sum() / len(overlap) - share) / (1 - share)


class QGaLore:
    """Steps a model's weights inside backward: QLinear weights by Q-GaLore, other parameters by plain 8-bit Adam.

    model: any module that holds QLinear layers, ordinary parameters, or both. loss.backward() is the step, and leaves
    no .grad behind. Set `accumulating = True` for the micro-batches before a step's last; scale each loss by their
    number, and by that of ranks. step() ends a step of several ranks, or one that is clipped by its global norm;
    elsewhere it has nothing to do. Set the rate in param_groups[0]["lr"], as with any torch optimizer.

    lr: of ordinary parameters; projected weights move at lr * scale. rank: of the projections, clamped to a weight's
    smaller side. gap: steps between refreshes; it doubles where the mean similarity of the last k reaches threshold
    (a threshold over 1 keeps it fixed); gap_growth: gap number i is longer by gap_growth^i. proj_bits: 4, 8 or 16 (not
    quantised). side: of W, that is projected: "right" (its inputs), "left", "auto": the smaller. rule: how the gradient
    steps a weight, residual_blocks: Fira's, see family.py. moments, moments_at_refresh: see Moments.
    stochastic_rounding: False rounds INT8 weights to nearest. svd: exact, in place of the sketch.
    accumulation: what low-rank gradients of micro-batches add up in, see Sum; those of ordinary parameters do in .grad, and
    Muon's, where that is "int8" and grad_clip is 0, in the momentum, at no byte more.
    ranks: see parallel.py. weight_decay: decoupled, on matrices alone. A gradient that is not finite counts as zero;
    pop_stats() counts it.

    grad_clip: if positive, the norm that all gradients together are scaled down to (of low-rank gradients, where
    projected). With accumulation or several ranks it is the step's own: weights wait for step(). Else a weight steps
    before the norms of later ones are known, and takes those of the step before.
    """

    def __init__(self, model, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128, gap=200, scale=0.25,
                 threshold=0.4, k=5, proj_bits=4, moments="factored", moments_at_refresh="keep",
                 stochastic_rounding=True, svd=False, accumulation="int8", grad_clip=0.0, seed=0, ranks=None,
                 rule="galore", side="auto", gap_growth=0.0, residual_blocks=1):
        for name, value, choices in (("proj_bits", proj_bits, (4, 8, 16)), ("moments", moments, MOMENTS),
                                     ("moments_at_refresh", moments_at_refresh, AT_REFRESH),
                                     ("accumulation", accumulation, ACCUMULATION),
                                     ("side", side, ("auto", "left", "right")), ("rule", rule, tuple(RULES))):
            if value not in choices:
                raise ValueError(f"{name} is one of {choices}, not {value!r}")
        self.param_groups = [{"lr": lr}]
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.stochastic_rounding, self.grad_clip, self.accumulation = stochastic_rounding, grad_clip, accumulation
        self.moments_at_refresh = moments_at_refresh
        self.accumulating = self.accumulated = False  # now; in this step
        self.ranks = ranks or Ranks()
        self.moments, self.projections, self.rules = {}, {}, {}  # by the weight's name
        self.sums, self.held = {}, {}  # micro-batches' sums by (name, what); what waits for step(), by name
        self.device = next(t.device for ts in (model.parameters(), model.buffers()) for t in ts)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
        for i, (name, layer) in enumerate(layers.items()):
            self.projections[name] = projection = Projection(
                layer.out_features, layer.in_features, rank, gap, threshold, k, proj_bits, svd, (i + 1) / len(layers),
                self.device, side, gap_growth)
            self.rules[name] = RULES[rule](projection, layer, scale, random_key(seed, name, "rule"), residual_blocks)
            self.moments[name] = self.rules[name].moments((projection.rank, projection.other), moments, self.device)
            layer.hook = partial(self._look_at_layer, name)
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.moments[name] = Moments(p.shape, moments, self.device)
                p.register_post_accumulate_grad_hook(partial(self._look_at_parameter, name))
        self.steps = dict.fromkeys(self.moments, 0)
        self.places = {name: i for i, name in enumerate(self.moments)}
        self.norms = torch.zeros(len(self.moments), device=self.device)  # on the device: a step waits for nothing
        self.skipped = torch.zeros((), device=self.device)

    @torch.no_grad()
    def _look_at_layer(self, name, layer, x, dy):
        projection, step = self.projections[name], self.steps[name]
        if projection.basis is not None:
            then = partial(self._step_layer, name, step, x.dtype)
            self._gather(name, "gradient", *self.rules[name].factors(x, dy, step), then)
        if projection.due(step):
            key = random_key(self.seed, name, step, "sketch")
            self._gather(name, "sketch", *projection.look(x, dy, key), partial(self._turn, name, step))
        if not self.accumulating:
            self.steps[name] += 1

    def _gather(self, name, what, left, right, then):
        """Sum left^T right, left (T, rows), right (T, cols), over micro-batches and ranks; then(sum), float32, follows
        the last."""
        total = self.sums.get((name, what))
        if self.accumulating:
            self.accumulated = True
            if total is None:
                total = self._sum(name, what, left.shape[1], right.shape[1])
                self.sums[name, what] = total
            key = rounding_key(total.added, self.seed, name, self.steps[name], what, self.ranks.rank)
            total.add_(left, right, key)
            return
        product = (left.T @ right).float()
        if total is not None:
            product += self.sums.pop((name, what)).value()
        if self.ranks.size > 1:
            product = product.to(left.dtype)  # as it is sent
        self.ranks.sum_(product, lambda product: then(product.float()))

    def _sum(self, name, what, *shape):
        """An empty Sum (rows, cols): of a gradient in its momentum, if it has no other use, and no finer sum is wanted."""
        kind, beta, momentum = self.accumulation, self.betas[0], self.moments[name]
        if what == "gradient" and isinstance(momentum, Momentum) and kind == "int8" and beta and not self.grad_clip:
            return SumInMomentum(momentum, beta, self.ranks.rank == 0, *shape, self.device)
        return Sum(*shape, kind, self.device)

    def _step_layer(self, name, step, dtype, gradient):
        def adam(r):
            self.moments[name].step_(r, self.betas, self.eps, rounding_key(step, self.seed, name, "moment"))
            return r

        def move(gradient):
            lr = self.param_groups[0]["lr"]
            key = rounding_key(step, self.seed, name) if self.stochastic_rounding else None
            direction = self.rules[name].direction(gradient, adam, step, dtype)
            self.rules[name].move(*direction, lr, 1 - lr * self.weight_decay, key)

        def keep(gradient):
            kept = Sum(*gradient.shape, self.accumulation, self.device)
            kept.set_(gradient)
            return kept.value

        self._admit(name, gradient, self.rules[name].norm(gradient), move, keep)

    @torch.no_grad()
    def _look_at_parameter(self, name, p):
        if self.accumulating:
            self.accumulated = True
            return
        grad, p.grad = p.grad, None
        self.ranks.sum_(grad, partial(self._step_parameter, name, p, self.steps[name]))
        self.steps[name] += 1

    def _step_parameter(self, name, p, step, grad):
        def move(grad):
            lr = self.param_groups[0]["lr"]
            self.moments[name].step_(grad, self.betas, self.eps, rounding_key(step, self.seed, name))
            if p.ndim > 1 and self.weight_decay:
                p.mul_(1 - lr * self.weight_decay)  # decoupled (arXiv 1711.05101)
            if p.dtype == torch.bfloat16:
                add_bfloat16_(p, grad, -lr, rounding_key(step, self.seed, name, "weight"))
            else:
                p.add_(grad, alpha=-lr)

        self._admit(name, grad, frobenius(grad), move, lambda grad: lambda: grad)

    def _admit(self, name, grad, norm, move, keep):
        """Note the gradient's norm, let one that is not finite be zero, clip it, and move(grad): at once, or when step()
        knows all norms. keep(grad): a function that then gives grad."""
        if name in self.held:
            raise RuntimeError("with grad_clip and micro-batches or ranks, call step() after the last backward")
        ok = norm.isfinite() & grad.sum().isfinite()
        self.skipped += ~ok
        self.norms[self.places[name]] = norm.where(ok, 0)
        grad.masked_fill_(~ok, 0)
        if self.grad_clip and (self.accumulated or self.ranks.size > 1):
            kept = keep(grad)
            self.held[name] = [lambda: move(self._clip_(kept()))]
        else:
            move(self._clip_(grad))

    def _clip_(self, grad):
        return grad.mul_((self.grad_clip / self.norms.norm()).clamp(max=1)) if self.grad_clip else grad

    def _turn(self, name, step, seen):
        def turn():
            found = self.rules[name].turn(partial(self.projections[name].turn, seen, step))
            if found is not None and (self.moments_at_refresh != "reset" or found[1]):  # "reset" waits for the device
                self.moments[name].turn_(self.moments_at_refresh, found[0])

        if name in self.held:  # the gradient that waits was taken in the old basis
            self.held[name].append(turn)
        else:
            turn()

    @torch.no_grad()
    def step(self):
        """End a step: of several ranks, wait for the last sums; move what waits for the norm of all gradients."""
        self.ranks.land()
        for actions in self.held.values():
            for act in actions:
                act()
        self.held, self.accumulated = {}, False

    def pop_stats(self):
        """grad_norm of the last step, over all weights (of the low-rank gradient where projected), before it is
        clipped; the refreshes since the start of training; and, since the last call, how many gradients were not
        finite. Waits for the device."""
        stats = {"grad_norm": self.norms.norm().item(), "skipped": int(self.skipped.item()),
                 "refreshes": sum(p.refreshes for p in self.projections.values())}
        self.skipped.zero_()
        return stats

    def pop_turns(self):
        """{weight: [(step, similarity that the refresh then found, steps to the next)]} that are new, for plot.py."""
        turns = {name: projection.turns for name, projection in self.projections.items() if projection.turns}
        for projection in self.projections.values():
            projection.turns = []
        return turns

    def state_dict(self):
        """Everything that the next step depends on, as tensors, numbers and containers of them."""
        return {
            "steps": dict(self.steps),
            "norms": self.norms,
            "moments": {name: vars(moments) for name, moments in self.moments.items()},
            "projections": {name: projection.state_dict() for name, projection in self.projections.items()},
            "rules": {name: rule.state for name, rule in self.rules.items() if rule.state},
        }

    def load_state_dict(self, state):
        self.steps, self.norms, self.sums, self.held = dict(state["steps"]), self._here(state["norms"]), {}, {}
        for name, tensors in state["moments"].items():
            vars(self.moments[name]).update({key: self._here(value) for key, value in tensors.items()})
        for name, projection in state["projections"].items():
            basis = projection["basis"] and tuple(map(self._here, projection["basis"]))
            self.projections[name].load_state_dict(projection | {"basis": basis})
            self.rules[name].share()
        for name, found in state.get("rules", {}).items():
            self.rules[name].state = {key: self._here(value) for key, value in found.items()}

    def _here(self, value):
        return value.to(self.device, copy=True) if isinstance(value, torch.Tensor) else value
