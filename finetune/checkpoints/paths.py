"""
Where checkpoints lie: directories, repositories on the Hugging Face hub, and directories to make.
"""

import os
import re

from run.files import temporary_folder
from run.text import first_line

# what is downloaded of a hub repository, and what is not
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer*"]  # and, if asked for, the weights
SECOND_COPIES = ["consolidated*", "original/*"]  # Mistral's and Meta's, of their weights


def local(path, weights=True):
    """The directory of a checkpoint: `path` itself, or what a hub repository is downloaded to.

    path: a directory, or "owner/name". weights: False downloads all but them. Raises ValueError,
    in one line, if there is no such thing."""
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        raise ValueError(f"{path}: is no directory, which a Hugging Face checkpoint is")
    if not is_hub_name(path):
        raise ValueError(
            f"{path!r} is neither a directory nor the name of a Hugging Face repository, "
            "like owner/name"
        )
    wanted = list(SMALL_FILES)
    if weights:
        wanted.append("*.safetensors")
    try:
        from huggingface_hub import snapshot_download  # slow to import, and for hub names alone

        return snapshot_download(path, allow_patterns=wanted, ignore_patterns=SECOND_COPIES)
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise ValueError(
            f"{path} is no directory, and as a repository was not fetched: {first_line(e)}"
        )


def is_hub_name(name):
    """Whether a repository on the hub may have that name: no path is asked for there."""
    part = r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
    odd = ".." in name or "--" in name
    return not odd and re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None


def check_new(path, kind="directory"):
    """The absolute path of a directory that is to be made, with those above it that are missing.
    kind: what it is to be, for messages.

    Raises ValueError if there is something already, or if nothing can be made there."""
    new = os.path.abspath(os.path.expanduser(path))
    if os.path.lexists(new):
        raise ValueError(f"{path}: exists; name a new {kind}")
    above = os.path.dirname(new)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    try:
        os.rmdir(temporary_folder(os.path.join(above, os.path.basename(new))))
    except OSError as e:
        raise ValueError(f"{path}: cannot be made: {e.strerror} ({e.filename})")
    return new
