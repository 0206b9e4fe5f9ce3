"""
What hf.py made, to a repository of the user's on the Hugging Face hub.

Its token is what `hf auth login` keeps, or the variable HF_TOKEN.
"""

import functools
import os

import huggingface_hub as hub  # quick: it loads its parts when they are asked for

from finetune.checkpoints.paths import is_hub_name
from run.text import first_line

OF_THE_HUB = {".gitattributes"}  # what a new repository has


@functools.cache  # it is asked before the work, and after
def ready(name, over):
    """Whether there is a repository `name` already, to which the user may push; False: it is made.

    over: also where it has files. Raises ValueError, in one line, if it cannot be pushed to."""
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is no repository's name, like owner/name")
    if not hub.get_token():
        raise ValueError("there is no token for the hub: `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    try:
        if not api.repo_exists(name):  # or it is someone else's, and private
            return False
        files = set(api.list_repo_files(name)) - OF_THE_HUB
    except Exception as e:  # its own, its HTTP client's
        raise ValueError(f"{name}: {first_line(e)}")
    if files and not over:
        shown = ", ".join(sorted(files)[:3])
        raise ValueError(
            f"{name} has {len(files)} files ({shown} ...): name a new repository, or replace those "
            "of the same names with --push_over=True"
        )
    return True


def upload(path, name, there, private=True):
    """Upload a directory's own files, or a file, as a repository; returns its address.

    there: as ready() says. private: of one that is made. Raises
    ValueError, in one line, if the hub refuses."""
    folder, names = _files(path)
    size = sum(os.path.getsize(os.path.join(folder, file)) for file in names)
    api = hub.HfApi()
    where = f"{api.endpoint}/{name}"
    kind = "private" if private else "public"
    if there:
        kind = "which is there already"
    print(f"uploading {', '.join(names)} of {path}, {size / 1e9:.2f} GB, to {where}, {kind}")
    try:
        if not there:
            api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=names)
    except Exception as e:
        raise ValueError(f"{name}: not uploaded: {first_line(e)}")
    return where


def _files(path):
    """(folder, names of the files in it) that are uploaded of what was made: no folder within."""
    if os.path.isfile(path):
        folder, file = os.path.split(os.path.abspath(path))
        return folder, [file]
    return path, sorted(entry.name for entry in os.scandir(path) if entry.is_file())
