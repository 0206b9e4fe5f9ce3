"""
Names of things that this project did not make: a Hugging Face directory, or a hub repository.

finetune/ reads these. Neither train.py nor anything else outside of finetune/ imports it: it is
loaded here, when a user has named such a thing, and not before.
"""

import importlib


def checkpoints():
    """finetune/hf.py: local(), settings(), load_weights(), load()."""
    return importlib.import_module("finetune.hf")


def tokenizers():
    """finetune/tokenizer.py: get_tokenizer()."""
    return importlib.import_module("finetune.tokenizer")
