"""
Alice's compensation (arXiv 2502.07752, section 5.3) on Q-GaLore: what the subspace leaves over moves
W as well, each column by the root of its mean energy.
"""

from methods.fira import limit_growth_, norms
from methods.registry import register
from methods.whole_gradient import WholeGradient

WEIGHT = 1.0  # of the compensation, beside Adam's step (the paper's alpha_c)
MEAN = 0.9  # of a column's energy, the share that stays at a step
TINY = 1e-30  # an energy that is divided by is no less


@register("qalice", "Q-GaLore, and what its subspace leaves over, columns normalised by their energy")
class Alice(WholeGradient):
    """W moves by P N + WEIGHT sqrt(dim - rank) S / root of the mean energy of S's column.

    S = G - P R. An element of the second term is then as large as one of Adam's step. Its growth is
    limited, as Fira's. Of the paper's method this is one part: P and its refreshes are Q-GaLore's."""

    def direction(self, gradient):
        p, r, rest = self.parts(gradient)
        state = self.state
        energy = norms(rest).square_()  # (other,)
        age = state.get("age", 0) + 1
        mean = energy.mul_(1 - MEAN) if age == 1 else state["energy"].lerp(energy, 1 - MEAN)
        state.update(age=age, energy=mean)
        share = (self.projection.dim - self.projection.rank) / (mean / (1 - MEAN**age)).clamp_(min=TINY)
        rest = limit_growth_(state, rest.mul_(share.sqrt_().mul_(WEIGHT)))
        return None, rest.addmm_(p, self.adam_(r))
