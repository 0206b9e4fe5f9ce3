"""
What fine-tuning alone needs: a Hugging Face directory or a hub repository, which this project did
not make, and the loss of preferences.

finetune/ has these. Neither train.py nor anything else outside of finetune/ imports it: it is
loaded here, when a user has asked for such a thing, and not before.
"""

import importlib


def checkpoints():
    """finetune/checkpoints/hf_load.py: local(), settings(), put_low_rank(), load_weights(), load()."""
    return importlib.import_module("finetune.checkpoints.hf_load")


def tokenizers():
    """finetune/checkpoints/tokenizer.py: get_tokenizer()."""
    return importlib.import_module("finetune.checkpoints.tokenizer")


def special_loss(run, checkpoint):
    """Give a run of train.py the loss of its settings, if that is not the next token's.

    checkpoint: that it goes on from, or None. Returns what tells of the loss since it was last
    asked: a function of a prefix of names, to {name: number}."""
    if not run.s.dpo_beta:
        return lambda prefix: {}
    return importlib.import_module("finetune.dpo").attach(run, checkpoint)
