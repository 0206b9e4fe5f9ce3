"""
train.py's settings, and whom bench measures: all that a command is checked by, without torch.
"""

import ast
import itertools
import os
import types

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = [os.path.join(REPOSITORY, "train.py")]  # the words after "python" that start it

PEERS = {  # the published optimizers: {contender: the module that it needs}
    "galore": "galore_torch",
    "q_galore": "q_galore_torch",
    "apollo": "apollo_torch",
    "torchao": "torchao.optim",
}
# ours, each a method of train.py's; full rank to compare with; the published optimizers
CONTENDERS = ["qgalore", "qmuon", "adam8bit", "adamw", *PEERS]


def train_settings():
    """train.py as a module with its settings alone, for configure().

    Its lines up to the first `if`; what it imports after them takes seconds to load."""
    (path,) = TRAIN
    with open(path, encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    head = itertools.takewhile(lambda node: not isinstance(node, ast.If), body)
    module = types.ModuleType("train")
    module.__file__ = path
    exec(compile(ast.Module(list(head), []), path, "exec"), vars(module))
    return module
