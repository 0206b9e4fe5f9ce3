"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults.py

tests/torture.py kills, fills and damages at random, for as long as it is told.
"""

# -----------------------------------------------------------------------------
# runs that are lost

# -----------------------------------------------------------------------------
# gradients and weights that are not finite

# -----------------------------------------------------------------------------
# data that is wrong

# -----------------------------------------------------------------------------
# records and texts

# -----------------------------------------------------------------------------
# arithmetic

# -----------------------------------------------------------------------------
# files that are not trusted

# -----------------------------------------------------------------------------
# the plan, threads and pictures

# -----------------------------------------------------------------------------
# what people type
