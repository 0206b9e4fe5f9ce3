"""
Q-GaLore (arXiv 2407.08296): Adam in 8 bits on low-rank gradients of INT8 weights, inside backward.

The gradient of W (out x in) over T tokens is G = dy^T x. Take the side of W that is smaller (the
input side of a square matrix), an orthonormal basis P of r directions of that side, and let Adam
see only the gradient within them:

    out >= in:  R = P^T G^T    dW = -lr * scale * N^T P^T          N = Adam(R)
    out <  in:  R = P^T G      dW = -lr * scale * P N

G is never formed. With `a` the factor on the projected side (x, or dy) and `b` the other, both are
one product of thin matrices, R = (a P)^T b: two to three times fewer operations than G alone at
r = d/4. R is linear in the tokens, so micro-batches and GPUs add up in it. A row of R is one
direction of the basis, so that a group which shares a scale in INT8 does not mix strong directions
with weak ones.

P comes from the gradient of a whole batch every `gap` steps, in INT4. A layer whose subspace has
come to rest doubles its own gap, and stops paying for refreshes (section 3.2).

Read on: Projection, the basis and its schedule; ProjectedWeight and Parameter, what is trained;
QGaLore, the optimizer. Adam's step is in kernels/moments.py, sister methods are in methods/.
"""

import math
from collections import deque

import torch
from torch.utils._pytree import tree_map_only

from kernels.moments import Moments, Record, take_
from kernels.subspace import Arriving, random_matrix, range_finder, similarity, singular_vectors
from kernels.sums import Sum, product, stacked
from model import QLinear
from quant import add_bfloat16_, decode, encode, random_key, rounding_key
from run.device import one_device
from run.ranges import OF_OPTIMIZER, check_values
from run.ranks import Ranks

MAX_GAP_GROWTH = 32  # a gap doubles five times at most: no subspace is left stale for good


class Projection:
    """The basis of one layer's low-rank gradient, and the schedule by which it is refreshed.

    A new basis comes from the whole gradient of a step, which only here is formed. The range finder
    (kernels/subspace.py) takes the directions of most energy from it. That step itself is taken in
    the old basis. The first one moves no weight. All layers take their first bases at once: from
    sketches of `rank` columns, Y = G^T Omega (left: G Omega), Omega random. Y and G are linear:
    micro-batches and ranks add up in them.

    bits: 4, 8 (group-wise codes), or 16: unquantised, in float32. phase: the first gap is
    phase * gap, so that layers which start together refresh at different steps. The other
    arguments: see QGaLore."""

    def __init__(self, out_features, in_features, rank, gap=200, threshold=0.4, k=5, bits=4,
                 svd=False, phase=1.0, device=None, side="auto", growth=0.0):
        self.right = out_features >= in_features if side == "auto" else side == "right"
        self.dim = in_features if self.right else out_features  # of the projected side
        self.other = out_features if self.right else in_features
        self.rank = min(rank, self.dim)  # r
        self.threshold = threshold
        self.bits = bits
        self.svd = svd
        self.gap = gap  # steps to the next refresh, as it has grown
        self.max_gap = gap * MAX_GAP_GROWTH
        self.phase = phase
        self.growth = growth
        self.last_refresh = 0  # a step
        self.next_refresh = 0  # a step
        self.refreshes = 0  # so far
        self.similarities = deque(maxlen=k)  # of the last k refreshes
        self.arriving = None  # the last refresh's similarity, on its way from the device
        self.history = []  # (step, similarity, gap) of refreshes, until pop_refreshes takes them
        self.basis = None  # tensors: (packed, scale, zero), (q, scale, zero) or (P,)
        self.decoded = None  # (basis, P) while a step needs P twice
        if self.rank == self.dim:  # any basis spans all, and this one is Adam's own
            self.basis = encode(torch.eye(self.dim, device=device), bits)
            self.next_refresh = math.inf

    def matrix(self, dtype=torch.float32):
        """P (dim, rank)."""
        if self.decoded is not None and self.decoded[0] is self.basis:
            return self.decoded[1].to(dtype)
        return decode(self.basis, dtype)

    def sides(self, x, dy):
        """(a, b): the gradient's factor on the projected side, (T, dim), and the other."""
        return (x, dy) if self.right else (dy, x)

    def project(self, x, dy):
        """(left, right) with left^T right = R (rank, other), from x (T, in) and dy (T, out)."""
        a, b = self.sides(x, dy)
        self.decoded = self.basis, self.matrix(a.dtype)
        return a @ self.decoded[1], b  # (T, rank), (T, other)

    def due(self, step):
        """Whether this step's gradient makes a sketch; the gap may grow first, see _settle()."""
        return step >= self.next_refresh and self._settle() <= step

    def sketch(self, x, dy, key):
        """(left, right) with left^T right = the gradient (dim, other), or before there is a basis
        and without svd a sketch of it (dim, rank).

        key: of the random numbers in Omega."""
        a, b = self.sides(x, dy)
        if self.svd or self.basis is not None:
            return a, b
        return a, b @ random_matrix(key, self.other, self.rank, b.dtype, b.device)  # Omega

    def refresh(self, sketch, step):
        """Take a new basis from what sketch()'s factors give, any float dtype; it is overwritten.

        A gradient that is zero or not finite decides nothing: the old basis stays for another gap.
        Where there is none, the next step tries again; only there the host waits for the device."""
        size = torch.linalg.vector_norm(sketch, torch.inf).float()
        if self.svd:
            sketch = sketch.float().nan_to_num_(0, 0, 0)  # it would raise an error
            new = singular_vectors(sketch, self.rank, self.right)  # (dim, rank)
        else:
            new = range_finder(sketch, self.rank, step)
        ok = (size > 0) & (size + new.sum()).isfinite()  # () bool, on the device
        if self.basis is None and not ok:
            return
        codes = encode(new, self.bits)
        if self.basis is None:
            self.basis = codes
        else:
            overlap = (self.matrix().T @ new).where(ok, torch.eye(self.rank, device=new.device))
            self.arriving = Arriving(similarity(overlap, self.dim).where(ok, torch.nan))
            self.basis = tuple(torch.where(ok, new, old) for new, old in zip(codes, self.basis))
        gap = self.gap if self.refreshes else max(1, round(self.gap * self.phase))
        if self.growth:  # LoQT's schedule
            gap += int(self.growth**self.refreshes)
        self.last_refresh = step
        self.next_refresh = step + gap
        self.refreshes += 1

    def _settle(self):
        """Let the last refresh's similarity decide the gap; returns the next refresh's step."""
        if self.arriving is None:
            return self.next_refresh
        found = self.arriving.value()  # of a copy that began one gap ago
        self.arriving = None
        if not math.isnan(found):  # else the gradient decided nothing
            self.similarities.append(found)
            mean = sum(self.similarities) / len(self.similarities)
            enough = len(self.similarities) == self.similarities.maxlen  # k of them
            if enough and mean >= self.threshold:
                before = self.gap
                self.gap = min(2 * self.gap, self.max_gap)
                self.next_refresh += self.gap - before
            self.history.append((self.last_refresh, round(found, 4), self.gap))
        return self.next_refresh

    STATE = ("gap", "last_refresh", "next_refresh", "refreshes", "basis")

    def state_dict(self):
        self._settle()
        state = {name: getattr(self, name) for name in self.STATE}
        return state | {"similarities": list(self.similarities), "history": list(self.history)}

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
        self.similarities = deque(state["similarities"], self.similarities.maxlen)
        self.history = list(state["history"])
        self.arriving = None


# -----------------------------------------------------------------------------
# the tensors that are trained


class Trained:
    """One tensor that is trained, with all that is kept for it: the base of the two kinds below.

    Its gradient comes in parts (micro-batches, uses of a layer, ranks): look() takes one, begin()
    counts the step, receive() gets the whole and calls move(), or keeps it until resume(), when the
    optimizer's step() knows the norm of all."""

    adams = True  # a gradient goes to Adam as it comes, whose kernels take its norm, mask and clip

    def __init__(self, optimizer, name, place):
        self.optimizer = optimizer
        self.name = name
        self.place = place  # of its norm in optimizer.norms
        self.step = -1  # the number of the step under way
        self.ended = True  # no part of its gradient is to come
        self.waiting = None  # until step(): gives the whole gradient

    def begin(self):
        """Every part of a gradient calls it: the first begins a step."""
        if self.ended:
            self.step += 1
            self.ended = False

    def key(self, *what):
        """The key of the random numbers that round this tensor at this step."""
        return rounding_key(self.step, self.optimizer.seed, self.name, *what)

    def receive(self, gradient):
        """Take a step's whole gradient. One that is not finite counts as zero."""
        o = self.optimizer
        if self.waiting is not None:
            raise RuntimeError("with grad_clip and micro-batches or ranks, call step() after the "
                               "last backward")
        waits = o.grad_clip and (o.accumulated or o.ranks.size > 1)
        record = Record(o.norms, o.skipped, self.place, 0.0 if waits else o.grad_clip)
        if self.adams and not waits:
            self.move(gradient, record)
            return
        take_(gradient, record, self.norm(gradient))
        if waits:
            self.waiting = self.keep(gradient)
        else:
            self.move(gradient)

    def resume(self):
        """At step(): move by the gradient that waits."""
        if self.waiting is not None:
            gradient = self.waiting()
            norm = self.optimizer.norms.norm()  # of all gradients
            self.move(gradient.mul_((self.optimizer.grad_clip / norm).clamp_(max=1)))
        self.waiting = None

    def keep(self, gradient):
        """A function that gives the gradient back at step()."""
        return lambda: gradient

    def norm(self, gradient):
        """Of a gradient, () float32: for the log, and grad_clip. None: of all that was gathered."""
        return None

    def drop(self):
        """Forget the parts of a step that has not moved the weight; it does not count."""
        if self.waiting is not None or not self.ended:
            self.step -= 1
        self.waiting = None
        self.ended = True

    def state_dict(self):
        return {"step": self.step, "moments": vars(self.moments)}

    def load_state_dict(self, state):
        self.drop()
        self.step = state["step"]
        vars(self.moments).update(state["moments"])


class ProjectedWeight(Trained):
    """The weight of a QLinear, moved by its low-rank gradient: GaLore (arXiv 2403.03507), Q-GaLore.

    A sister method is a subclass. Most override direction(): how a gradient becomes a step. Here
    gradients lie with their projected side first: G (dim, other), R = P^T G (rank, other)."""

    multiply = staticmethod(product)  # left^T right of two factors of a gradient

    def __init__(self, optimizer, name, place, layer, projection, scale):
        super().__init__(optimizer, name, place)
        self.layer = layer  # a QLinear
        self.projection = projection
        self.scale = scale
        self.moments = self.new_moments((projection.rank, projection.other))
        self.state = {}  # numbers and tensors that a sister's next step depends on
        self.sums = {}  # of the micro-batches so far: "gradient", "sketch"
        self.sketch = None  # of a refresh that waits with its gradient
        self.dtype = torch.float32  # of the activations
        # what a sister does with a gradient needs it masked and clipped
        self.adams = type(self).direction is ProjectedWeight.direction
        self.task = None  # the backward in which it last moved
        layer.hook = self.look

    @torch.no_grad()
    def look(self, layer, x, dy):
        """The layer's hook: x (T, in) and dy (T, out) of one use of it, in one backward."""
        if layer.task == -1:  # torch.autograd.grad() trains nothing
            return
        o = self.optimizer
        o.accumulated |= o.accumulating
        first = self.ended  # of these parts
        if first and layer.task is not None and layer.task == self.task:
            raise RuntimeError(
                f"{self.name} has moved, and more of its gradient comes in the same backward, by a "
                "checkpoint with use_reentrant=True or retain_graph: use False, or set "
                "accumulating = True and call step() after backward"
            )
        if first:  # a step that begins without a basis moves nothing
            self.moves = self.projection.basis is not None
        more = o.accumulating or len(layer.uses) > 0  # parts of this step's gradient
        self.begin()
        # of the products that follow: a step's elements are too small for float16
        self.dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        if self.moves:
            self.gather("gradient", *self.factors(x, dy), more)
        # by SVD a first basis comes from the first micro-batch alone: the sums of all layers' whole
        # gradients would take as much memory as the weights
        alone = self.projection.svd and not self.moves
        if self.projection.due(self.step) and (first or not alone):
            key = random_key(o.seed, self.name, self.step, "sketch")
            left, right = self.projection.sketch(x, dy, key)
            self.gather("sketch", (left,), right, more and not alone)
        self.projection.decoded = None
        self.ended = not more
        self.task = None if more else layer.task

    def gather(self, what, lefts, right, more):
        """Sum the products of lefts (T, rows) and right (T, cols) over a step's parts and ranks."""
        total = self.sums.get(what)
        if more:
            if total is None:
                total = self.new_sum(what, sum(a.shape[1] for a in lefts), right.shape[1])
                self.sums[what] = total
            parts = (self.optimizer.seed, self.name, self.step, what, self.optimizer.ranks.rank)
            total.add_(lefts, right, rounding_key(total.added, *parts), self.multiply)
            return
        product = stacked(lefts, right, self.multiply)  # (rows, cols), in the dtype of x and dy
        if total is not None:  # all of this rank's step
            product = self.sums.pop(what).value(self.dtype).add_(product)
        self.send(what, product)

    def send(self, what, product):
        """Sum a product over ranks; receive_gradient or receive_sketch gets the result."""
        ranks = self.optimizer.ranks
        if ranks.size > 1:
            product = product.to(self.dtype)  # as it is sent
        ranks.sum_(product, self.receive if what == "gradient" else self.receive_sketch)

    def receive_sketch(self, product):
        if self.waiting is None:
            self.refresh(product)
        else:  # the gradient that waits was taken in the old basis
            self.sketch = product

    def end(self):
        """At step(): no part was marked as the last, so this is all of the gradient."""
        if not self.ended:
            self.ended = True
            for what in list(self.sums):  # the gradient first, then the sketch
                self.send(what, self.sums.pop(what).value(self.dtype))

    def resume(self):
        super().resume()
        if self.sketch is not None:
            self.refresh(self.sketch)
        self.sketch = None

    @property
    def rate(self):
        """What a step in W is multiplied by."""
        return -self.optimizer.lr * self.scale

    def move(self, gradient, record=None):
        """Step the weight by a gradient, as gathered, which is overwritten.

        Without a record it is finite and clipped."""
        o = self.optimizer
        if record is None:
            p, n = self.direction(gradient)
            n.mul_(self.rate)
        else:
            p = self.projection.matrix(self.dtype)
            n = self.adam_(gradient, self.rate, record)
        key = self.key() if o.stochastic_rounding else None
        self.apply(p, n, 1 - o.lr * o.weight_decay, key)

    def adam_(self, r, *more):
        """r <- Adam(r), once a step. more: rate and record, see Moments.step_."""
        o = self.optimizer
        self.moments.step_(r, o.betas, o.eps, self.key("moment"), *more)
        return r

    def keep(self, gradient):
        kept = self.new_sum("kept", *gradient.shape)
        kept.set_(gradient)
        return kept.value

    def new_moments(self, shape):
        return Moments(shape, self.optimizer.moments, self.optimizer.device)

    def new_sum(self, what, rows, cols):
        return Sum(rows, cols, self.optimizer.accumulation, self.optimizer.device)

    def factors(self, x, dy):
        """(lefts, right) whose products, one below the other, are the gradient; here that is R."""
        left, right = self.projection.project(x, dy)
        return (left,), right

    def direction(self, gradient):
        """(P, N) of which W moves by rate * P N, or (None, N) for N (dim, other).

        gradient: as gathered, any float dtype, may be overwritten. P: in self.dtype, in which P N
        is multiplied."""
        return self.projection.matrix(self.dtype), self.adam_(gradient)

    def apply(self, p, n, shrink, key):
        """W <- shrink * W + P N, rounded by `key`; without P it is N."""
        right = self.projection.right
        if p is None:
            self.layer.add_low_rank_(n.T if right else n, None, shrink, key)
            return
        n = n.to(p.dtype).T  # (other, rank), a view: the product takes it as it lies
        self.layer.add_low_rank_(*((n, p) if right else (p, n)), shrink, key)

    def refresh(self, sketch):
        if not self.moves:  # else the gradient that came with it was counted
            self.optimizer.skipped += ~sketch.sum().isfinite()
        self.projection.refresh(sketch, self.step)

    def empty_basis(self):
        """The tensors of a basis with nothing in it yet, for run/memory.py to count."""
        return encode(torch.empty(self.projection.dim, self.projection.rank), self.projection.bits)

    def drop(self):
        super().drop()
        self.sums = {}
        self.sketch = None

    def state_dict(self):
        of_basis = {"projection": self.projection.state_dict(), "state": self.state}
        return super().state_dict() | of_basis

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.projection.load_state_dict(state["projection"])
        self.state = state["state"]


class Parameter(Trained):
    """An ordinary parameter, of any shape, moved by plain Adam."""

    def __init__(self, optimizer, name, place, p):
        super().__init__(optimizer, name, place)
        self.p = p  # of any shape
        shape = p.shape if p.ndim < 3 else (len(p), math.prod(p.shape[1:]))  # a matrix
        self.moments = Moments(shape, optimizer.moments, p.device)
        p.register_post_accumulate_grad_hook(self.look)
        p.stepped_by = id(self)

    @torch.no_grad()
    def look(self, p):
        """Its hook: the gradient of one backward has been added to p.grad."""
        if p.stepped_by != id(self):  # by a later QGaLore, as layers are
            return
        self.begin()
        if self.optimizer.accumulating:
            self.optimizer.accumulated = True  # autograd sums up in p.grad
        else:
            self.end()

    def end(self):
        gradient = self.p.grad
        if self.ended or gradient is None:
            return
        self.ended = True
        self.p.grad = None  # its memory is free once the step is made
        gradient = gradient.to_dense().contiguous()  # torch's Embedding may make a sparse one
        self.optimizer.ranks.sum_(gradient, self.receive)

    def move(self, gradient, record=None):
        o, p = self.optimizer, self.p
        matrix = gradient.flatten(1) if p.ndim > 2 else gradient
        self.moments.step_(matrix, o.betas, o.eps, self.key(), 1.0, record)
        if p.ndim > 1 and o.weight_decay:
            p.mul_(1 - o.lr * o.weight_decay)  # decoupled (arXiv 1711.05101)
        if p.dtype == torch.bfloat16:
            whole = p.contiguous()  # p itself, but of layouts such as channels_last
            add_bfloat16_(whole, gradient, -o.lr, self.key("weight"))
            if whole is not p:
                p.copy_(whole)
        else:
            p.add_(gradient, alpha=-o.lr)


# -----------------------------------------------------------------------------
# the optimizer


class QGaLore(torch.optim.Optimizer):
    """Steps a model's weights inside backward: QLinears by Q-GaLore, all else by plain Adam.

    loss.backward() is the step, and leaves no .grad behind. (torch.autograd.grad() is none.) For
    several micro-batches a step, set `accumulating` = True before all but the last; or before all,
    and call step() after them. Scale each loss by their number, and by that of ranks. step() ends
    what could not end in backward: steps of several ranks, or clipped by a global norm. Elsewhere
    it has nothing to do.

    model: any module, on one device. Frozen parameters, and QLinears with trains = False, stay.
    lr: of ordinary parameters; projected weights move at lr * scale. Torch's schedulers set it.
    weight_decay: decoupled, on matrices alone. stochastic_rounding: False: INT8 to nearest.
    rank: of the projections, clamped to a weight's smaller side.
    gap: steps between refreshes. It doubles where the mean similarity of the last k reaches
        threshold; over 1: never. gap_growth: gap number i is longer by gap_growth^i.
    proj_bits: of the bases: 4, 8 or 16 (not quantised). svd: exact, in place of iterations.
    side: of W, that is projected: "right" (its inputs), "left", "auto": the smaller.
    moments, accumulation: formats, see Moments and Sum; ordinary gradients add up in .grad.
    grad_clip: if positive, the norm that all gradients together are scaled down to (low-rank ones,
        where projected). With micro-batches or ranks it is the step's own: weights wait for
        step(). Else a weight steps before later norms are known, and takes the last step's.
    ranks: see run/ranks.py. weight: the class of projected weights, see methods/.

    A gradient that is not finite counts as zero; pop_stats() counts it."""

    def __init__(self, model, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128,
                 gap=200, scale=0.25, threshold=0.4, k=5, proj_bits=4, moments="factored",
                 stochastic_rounding=True, svd=False, accumulation="int8", grad_clip=0.0, seed=0,
                 ranks=None, side="auto", gap_growth=0.0, weight=ProjectedWeight):
        check_values(OF_OPTIMIZER, locals() | {"beta1": betas[0], "beta2": betas[1]})
        if lr * weight_decay > 1:  # a step would take more than the whole weight
            raise ValueError(f"weight_decay must be at most 1 / lr, not {weight_decay!r}")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        linears = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
        layers = {name: layer for name, layer in linears.items() if layer.trains}
        # torch wants at least one parameter; INT8 weights are buffers
        super().__init__(list(parameters.values()) or [torch.empty(0)], {"lr": lr})
        self.device = one_device(model)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.moments = moments
        self.stochastic_rounding = stochastic_rounding
        self.accumulation = accumulation
        self.grad_clip = grad_clip
        self.seed = seed
        self.ranks = ranks or Ranks()  # without arguments: this process alone
        self.accumulating = False  # now
        self.accumulated = False  # in this step
        # on the device: a step waits for nothing
        self.norms = torch.zeros(len(layers) + len(parameters), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self.weights = []  # of QLinears, in the model's order
        for i, (name, layer) in enumerate(layers.items()):
            shape = layer.out_features, layer.in_features
            phase = (i + 1) / len(layers)  # one layer refreshes in a step, not all
            projection = Projection(*shape, rank, gap, threshold, k, proj_bits, svd, phase,
                                    self.device, side, gap_growth)
            self.weights.append(weight(self, name, i, layer, projection, scale))
        numbered = enumerate(parameters.items(), len(layers))
        self.parameters = [Parameter(self, name, i, p) for i, (name, p) in numbered]

    @property
    def lr(self):
        return self.param_groups[0]["lr"]

    @property
    def trained(self):
        """{name: what is trained}."""
        return {t.name: t for t in (*self.weights, *self.parameters)}

    def add_param_group(self, group):
        if self.param_groups:
            raise ValueError("QGaLore trains what its model has at the start: make a new one")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """End a step: sums that are not ended or on their way, weights that wait for all norms."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        trained = self.trained.values()
        for t in trained:
            t.end()
        self.ranks.land()  # all norms are known from here on
        for t in trained:
            t.resume()
        self.accumulated = False
        return loss

    def zero_grad(self, set_to_none=True):
        """Forget gradients that have not moved a weight."""
        super().zero_grad(set_to_none)
        self.accumulated = False
        for t in self.trained.values():
            t.drop()

    def pop_stats(self):
        """{grad_norm: of the last step, before clipping, low-rank gradients' where projected;
        skipped: gradients not finite, since the last call; refreshes: of all training}.

        Waits for the device."""
        refreshes = sum(w.projection.refreshes for w in self.weights)
        skipped = int(self.skipped.item())
        self.skipped.zero_()  # counts from here
        grad_norm = self.norms.norm(dtype=torch.float64).item()  # squares may overflow float32
        return {"grad_norm": grad_norm, "skipped": skipped, "refreshes": refreshes}

    def pop_refreshes(self):
        """{weight: [(step, similarity that its refresh found, steps to the next)]}: new ones."""
        found = {w.name: w.projection.history for w in self.weights}
        for w in self.weights:
            w.projection.history = []
        return {name: history for name, history in found.items() if history}

    def state_dict(self):
        """Everything that the next step depends on, as tensors, numbers and containers of them."""
        groups = [group | {"params": []} for group in self.param_groups]
        trained = {name: t.state_dict() for name, t in self.trained.items()}
        now = {"norms": self.norms, "skipped": self.skipped}
        return {"param_groups": groups, "trained": trained} | now

    def load_state_dict(self, state):
        none = torch.empty(0)  # of a method that keeps no moment
        saved = state.get("trained", {}).items()
        saved = {name: t["moments"].get("m", none).shape for name, t in saved}
        mine = {name: vars(t.moments).get("m", none).shape for name, t in self.trained.items()}
        if saved != mine:
            name = next(n for n in mine | saved if mine.get(n) != saved.get(n))
            raise ValueError(f"this state is of another model or rank: {name} is "
                             f"{saved.get(name)} there and {mine.get(name)} here")

        def here(part):  # a weight at a time: a card has no room for two of all moments
            return tree_map_only(torch.Tensor, lambda t: t.to(self.device, copy=True), part)

        for group, saved in zip(self.param_groups, state["param_groups"]):
            group.update(here(saved) | {"params": group["params"]})
        self.norms = here(state["norms"])
        self.skipped = here(state.get("skipped", self.skipped))  # an older run did not save it
        for name, t in self.trained.items():
            t.load_state_dict(here(state["trained"][name]))
