"""
Q-GaLore's sisters: each by what it does otherwise with a gradient.

QGaLore (qgalore.py) holds what they share: the basis and its refreshes, Adam's moments, sums over micro-batches and
ranks, clipping, the state. A rule here turns what was summed up into a step of W. Gradients lie with their projected
side first, G (dim, other) and R = P^T G (rank, other): a column belongs to one index of W's other side.
"""

import math

import torch

from methods.moments import Momentum, Moments
from quant import add_bfloat16_, random_key, uniform

GROWTH = 1.01  # by which a step may be longer than the one before it (Fira, APOLLO)
GRADIENT = 0.4  # of a step's own gradient, beside the momentum, in Muon
LIKE_ADAM = 0.2  # root of the mean square of its step in a square weight
BLOCKS = 4  # of a weight's longer side, each of which it makes orthogonal
NEWTON_SCHULZ = (7.377, -19.2213, 12.8168), (3.1379, -2.1495, 0.4044), (2.2168, -1.491, 0.3467)  # a x + b x^3 + c x^5:
# nearest to 1 on [0.02, 1], then on what the one before makes of that: within 0.124 of 1 (arXiv 2505.16932, section 3);
# upper ends are 5 % further out, for bfloat16's rounding
HISTORY = 20  # gradients in Natural GaLore's Fisher matrix
DAMPING = 1e-3  # lambda, which is added to it


def frobenius(x):
    """The root of the sum of x's squares, () float32."""
    return torch.linalg.vector_norm(x, dtype=torch.float32)


class GaLore:
    """W moves by P N, N = Adam(R): GaLore (arXiv 2403.03507), Q-GaLore (2407.08296)."""

    moments = Moments  # of R

    def __init__(self, projection, layer, scale, key=0, blocks=1):
        self.projection, self.layer, self.scale, self.key, self.blocks = projection, layer, scale, key, blocks
        self.state = {}  # numbers and tensors that the next step depends on
        self.share()

    def share(self):
        """Let the layer see the projection's basis, where it needs it."""

    def factors(self, x, dy, step):
        """(left, right), left^T right = what micro-batches add up, R, of x (T, in) and dy (T, out)."""
        return self.projection.project(x, dy)

    def norm(self, gradient):
        """Of what was summed up, () float32: for the log, and grad_clip."""
        return frobenius(gradient)

    def direction(self, r, adam, step, dtype):
        """(P, N) of which W moves by P N; where P is None, by N, (dim, other). r: what was summed up, float32, is
        overwritten. adam(r): r <- Adam(r), once a step. dtype: in which P N is multiplied."""
        return self.projection.matrix(dtype), adam(r)

    def move(self, p, n, lr, shrink, key):
        """W <- shrink * W - lr * scale * (P N), rounded by `key`."""
        n = n.mul_(-lr * self.scale)
        if p is None:
            self.layer.add_low_rank_(n.T if self.projection.right else n, None, shrink, key)
        else:
            n = n.to(p.dtype).T.contiguous()
            self.layer.add_low_rank_(*((n, p) if self.projection.right else (p, n)), shrink, key)

    def turn(self, turn):
        """Call turn(), by which the projection takes a new basis; returns what it does."""
        return turn()

    def no_basis(self):
        """The tensors of a basis with nothing in it yet, for memory.py to count."""
        return self.projection.encode(torch.empty(self.projection.dim, self.projection.rank))

    def _limit_growth_(self, step):
        norm, before = step.norm(), self.state.get("norm")
        if before is not None:  # a step of nothing, from a gradient that was not finite, bounds none after it
            excess = ((norm / (before + 1e-8)).clamp_(min=GROWTH) / GROWTH).where(before > 0, 1)
            step /= excess
            norm = (norm / excess).where(norm > 0, before)
        self.state["norm"] = norm
        return step


class NaturalGaLore(GaLore):
    """R goes to Adam divided by the empirical Fisher matrix of the last gradients, H H^T + lambda, with Woodbury's
    identity: a system of HISTORY equations (arXiv 2410.16029). H, 2 bytes an element, takes HISTORY times R."""

    def __init__(self, projection, layer, scale, key=0, blocks=1):
        super().__init__(projection, layer, scale, key)
        device = next(layer.buffers()).device
        history = torch.zeros(HISTORY, projection.rank * projection.other, dtype=torch.bfloat16, device=device)
        self.state.update(history=history, seen=0)

    def direction(self, r, adam, step, dtype):
        s = self.state
        s["history"][s["seen"] % HISTORY] = r.view(-1)
        s["seen"] += 1
        h = s["history"][: s["seen"]].float()
        g = s["history"][(s["seen"] - 1) % HISTORY].float()  # rounded as in H, or the difference below is rounding
        gram = h @ h.T / DAMPING
        gram.diagonal().add_(1)
        z = torch.linalg.solve(gram, h @ g)
        r.copy_((g / DAMPING).sub_(z @ h, alpha=DAMPING**-2).view_as(r))
        return super().direction(r, adam, step, dtype)


class Fira(GaLore):
    """What low rank throws away, S = G - P R, moves W, too: by column as much as Adam made of R (arXiv 2410.01623).
    What is summed up is R (rank, other) and below it G. With several blocks a step looks at each blocks-th row of G, in
    turn, and moves it so many times as far: sums of micro-batches and ranks are as much smaller."""

    def rows(self, step):
        """Those of G and P that this step looks at."""
        return slice(step % self.blocks, None, self.blocks)

    def factors(self, x, dy, step):
        left, right = super().factors(x, dy, step)
        return torch.cat([left, (x if self.projection.right else dy)[:, self.rows(step)]], dim=1), right

    def among_all(self, g, step):
        """The rows that this step looks at, and zeros for all others: (dim, other)."""
        if self.blocks == 1:
            return g
        whole = g.new_zeros(self.projection.dim, self.projection.other)
        whole[self.rows(step)] = g
        return whole

    def norm(self, gradient):
        return frobenius(gradient[: self.projection.rank])

    def direction(self, gradient, adam, step, dtype):
        p, (r, g) = self.projection.matrix(), gradient.tensor_split([self.projection.rank])
        rest, before, n = g.addmm_(p[self.rows(step)], r, alpha=-1), r.norm(dim=0), adam(r)
        rest = self._limit_growth_(rest.mul_(self.blocks * n.norm(dim=0) / (before + 1e-8)))
        return None, self.among_all(rest, step).addmm_(p, n)


class Muon(Fira):
    """Muon (K. Jordan, 2024), which keeps of its momentum what lies in the subspace: W moves by the orthogonal factor,
    block by block, of P M + GRADIENT G, at the size of a step of Adam (arXiv 2502.16982, section 2.2). M is the momentum
    of R; G, the gradient of this step alone, reaches the directions that P leaves out."""

    moments = Momentum

    def norm(self, gradient):
        """Of G, as far as its rows tell: R may have been summed up in the momentum."""
        return frobenius(gradient[self.projection.rank :]) * self.blocks**0.5

    def direction(self, gradient, momentum, step, dtype):
        r, g = gradient.tensor_split([self.projection.rank])
        g = self.among_all(g.mul_(GRADIENT * self.blocks), step)
        n = orthogonal_(g.addmm_(self.projection.matrix(), momentum(r)), dtype)
        return None, n.mul_(LIKE_ADAM * max(n.shape) ** 0.5)


def orthogonal_(x, dtype):
    """x <- about U V^T of each of BLOCKS blocks of its longer side, U S V^T: each polynomial of NEWTON_SCHULZ, an iteration
    in dtype, brings the singular values nearer to 1. Blocks take fewer operations, and are no worse (RESULTS.md)."""
    for block in x.tensor_split(BLOCKS, dim=int(x.shape[0] <= x.shape[1])):
        wide = block.shape[0] <= block.shape[1]
        y = (block / (block.norm() + 1e-12)).to(dtype)
        y = y if wide else y.T
        for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
            gram = y @ y.T
            if i == 0:  # its norm bounds the largest singular value's square, and closer than that of y
                size = gram.norm() + 1e-12
                y, gram = y / size.sqrt(), gram / size
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        block.copy_(y if wide else y.T)
    return x


class Apollo(GaLore):
    """W moves by G itself, a column as much as Adam makes of its projection on random directions, which are drawn again
    each gap, and not kept (arXiv 2412.05270)."""

    dims = 0  # the norms that are compared are of columns

    def __init__(self, projection, layer, scale, key=0, blocks=1):
        super().__init__(projection, layer, scale, key)
        projection.basis, projection.next_refresh = (), math.inf

    def no_basis(self):
        return ()

    def factors(self, x, dy, step):
        return (x, dy) if self.projection.right else (dy, x)

    def matrix(self, step):
        """P (dim, rank) at `step`, of normal numbers of variance 1 / rank."""
        p = self.projection
        device = next(self.layer.buffers()).device
        u = uniform(random_key(self.key, step // p.gap), 0, p.dim * p.rank, device)
        return torch.erfinv(2 * u - 1).mul_(math.sqrt(2 / p.rank)).view(p.dim, p.rank)

    def direction(self, g, adam, step, dtype):
        r = self.matrix(step).T @ g
        before = r.norm(dim=self.dims)
        return None, self._limit_growth_(g.mul_(adam(r).norm(dim=self.dims) / (before + 1e-8)))


class ApolloMini(Apollo):
    """APOLLO-Mini: one factor for all of G, at rank 1."""

    dims = None


class LoQT(GaLore):
    """W is frozen, and beside it F moves by N; both are made anew at each refresh (arXiv 2405.16528; see adapters.py).
    Its own code takes the refresh's gradient at the merged W, by a pass that moves nothing; here it is the step's."""

    def share(self):
        if self.projection.basis is not None:
            self.layer.adapter.take(self.projection.basis)

    def move(self, p, n, lr, shrink, key):
        factor = self.layer.adapter.factor
        if shrink != 1:
            factor.mul_(shrink)
        if factor.dtype == torch.bfloat16:
            add_bfloat16_(factor, n.bfloat16(), -lr, key or 0)
        else:
            factor.add_(n, alpha=-lr)

    def turn(self, turn):
        w = self.layer.float_weight()
        found = turn()
        self.share()
        self.layer.adapter.settle(self.layer, w)
        return found

    def no_basis(self):
        return self.layer.adapter.basis()


RULES = {"galore": GaLore, "natural_galore": NaturalGaLore, "fira": Fira, "qfira": Fira,
         "muon": Muon, "qmuon": Muon,
         "apollo": Apollo, "apollo_mini": ApolloMini, "loqt": LoQT}
