"""
WeLore (arXiv 2407.11239): factors that stand in the place of a checkpoint's matrices train.
"""

from methods.registry import Method


class WeLore(Method):
    """finetune/welore.py has made the checkpoint; all other matrices and the embedding stay."""

    def trains_embedding(self, s):
        return False

    def check_model(self, s):
        if not s.low_rank:
            raise SystemExit(
                "error: method welore trains what `python -m finetune.welore` has compressed: "
                "name its directory in init_from"
            )


WeLore("welore", "the factors of a checkpoint that WeLore has compressed, and norms",
       weight_bits=(16, 8), reads=("matmul",))
