"""
Who decides a run's settings, in order: the user, the checkpoint it goes on from, its method, the
device.
"""

import torch

from methods.registry import find
from run.checkpoint import starting_model
from run.device import choose_floats, choose_threads
from run.resume import agree, checkpoint_to_resume, follow
from run.show import first_rank, say


def settle(s, folder):
    """Let a checkpoint, a starting model and the method say what is theirs of the settings: returns
    (Method, the run's checkpoint or None, what fills the model or None, dtypes of weights and of
    computation)."""
    if not s.eval_only and not s.dry_run and first_rank():
        folder.hold()
    checkpoint = checkpoint_to_resume(s)
    if checkpoint is not None:
        follow(s, checkpoint)
    method = find(s.method)
    fill = starting_model(s, checkpoint)
    method.settle(s)
    method.check_model(s)
    dtypes = choose_floats(s)
    if s.device == "cpu" and not s.dry_run:
        say(choose_threads(s, s.batch_size * s.block_size, s.threads))
        s.threads = torch.get_num_threads()
    if checkpoint is not None:
        agree(s, checkpoint)
    return method, checkpoint, fill, *dtypes
