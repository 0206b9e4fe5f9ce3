"""
A text corpus that needs no download: the documentation in this Python's own libraries.

It is Python's help topics and the docstrings of the standard library, numpy and torch: 7 MB of
English about programming. Only the demo and small experiments train on it.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import random
import sys
import sysconfig
import warnings
from pydoc_data.topics import topics

LIBRARIES = ("numpy", "torch")  # beside the standard library
# installed packages, of which each machine has others, and what is long and says little
SKIP = ("site-packages", "dist-packages", "idlelib", "lib2to3", "_inductor", "_dynamo")
SHORTEST = 200  # characters: below that, a docstring hardly has a sentence

# typographic signs as ASCII: the vocabulary "bytes" would spend three tokens on each
PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"}
)


def docs_corpus():
    """The corpus as JSON lines, bytes. It depends on the installed versions alone."""
    texts = list(topics.values())
    for root in library_folders():
        for path in python_files(root):
            texts += docstrings(path)

    # a set, as code is copied with its docstring; sorted, as a set and a folder have no order
    texts = {inspect.cleandoc(text).translate(PLAIN) for text in texts}
    texts = sorted(text for text in texts if len(text) >= SHORTEST and text.isascii())
    random.Random(0).shuffle(texts)  # so that the last ones, for validation, are a fair sample
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def docs_source():
    """What tells one corpus from another, for a manifest."""
    versions = {"python": sys.version}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"path": "docs", "versions": versions}


def library_folders():
    """The standard library's folder, and those of LIBRARIES that are installed."""
    folders = [sysconfig.get_path("stdlib")]
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)  # finds without importing
        if spec:
            folders.append(os.path.dirname(spec.origin))
    return folders


def python_files(root):
    """The paths of a library's modules, without its tests."""
    for folder, folders, names in os.walk(root):
        # os.walk goes into those that are left here
        folders[:] = [name for name in folders if "test" not in name and name not in SKIP]
        for name in names:
            if name.endswith(".py") and "test" not in name:
                yield os.path.join(folder, name)


def docstrings(path):
    """The docstrings of a module, its classes and functions; none if it cannot be parsed."""
    try:
        with open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node, clean=False) or "")
    return found
