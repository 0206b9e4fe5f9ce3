"""
What fine-tuning alone needs: a Hugging Face directory or a hub repository, which this project did
not make, and the loss of preferences.

finetune/ has these. Neither train.py nor anything else outside of finetune/ imports it: it is
loaded here, when a user has asked for such a thing, and not before.
"""

import importlib


def checkpoints():
    """finetune/hf_load.py: local(), settings(), put_low_rank(), load_weights(), load()."""
    return importlib.import_module("finetune.hf_load")


def tokenizers():
    """finetune/tokenizer.py: get_tokenizer()."""
    return importlib.import_module("finetune.tokenizer")


def preferences():
    """finetune/dpo.py: attach()."""
    return importlib.import_module("finetune.dpo")
