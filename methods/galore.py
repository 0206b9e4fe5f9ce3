"""
GaLore (arXiv 2403.03507) and Q-GaLore (2407.08296): the step is qgalore.ProjectedWeight's own.
"""

from methods.registry import FLOATS, register
from qgalore import ProjectedWeight

register("qgalore", "INT8 weights, INT4 bases, gaps that grow; the paper's method")(ProjectedWeight)
register(
    "galore",
    "Adam in float32 on the gradient's projection; float weights and bases, a fixed gap",
    weight_bits=(16, 8),
    fixes=FLOATS,
)(ProjectedWeight)
register(
    "galore8bit",
    "GaLore with 8-bit Adam",
    weight_bits=(16, 8),
    fixes=FLOATS | {"moments": "8bit"},
)(ProjectedWeight)
