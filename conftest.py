"""Before any test file imports kernels.py: without a GPU, Triton's kernels run in its interpreter, in numpy."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
