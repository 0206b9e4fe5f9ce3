"""
shards.json, beside the shards of a folder: of what each of them was made, and how.

    {"format": 1,
     "shards": {"x_train_00000.bin": {
        "sources": [{"path": "/texts/x.txt", "size": 19, "blake2b": "..."}],
        "tokenizer": {"name": "gpt2", "n_vocab": 50257, "fingerprint": 1352840262},
        "settings": {"maker": "prepare_c4", "val_fraction": 0.05},
        "finished": true,
        "bytes": 1062}}}

What makes shards looks here before it keeps one. What does not match is made again, or refused,
so that no folder mixes what two commands made. Training needs no such file, as llm.c's shards have
none.

An entry is first written unfinished, then its shards take their names, then it is finished. So
a stop at any moment leaves shards that are known to be whole, or known to be made again.
"""

import contextlib
import hashlib
import json
import math
import os
import time

from run.encodings import fingerprint
from run.files import check_file, fcntl, parse_json, replacing
from run.shards import part_of

NAME = "shards.json"
FORMAT = 1  # raised when what an entry holds changes
MANY = 500  # entries; writing so many takes a while
PARTS = {"sources": list, "tokenizer": dict, "settings": dict, "finished": bool}  # of an entry


class Manifest:
    """The entries of one folder's shards.json; none where there is no such file.

    Made by Manifest.read(folder). All its methods take names of shards without their folder."""

    def __init__(self, folder, entries):
        self.folder = folder
        self._entries = entries  # {name: its facts, whether it is "finished", and its "bytes"}
        self._written = self._content()  # as it was last written
        self._time = -math.inf  # when

    @classmethod
    def read(cls, folder):
        """The Manifest of a folder. Exits with one line if its file is damaged."""
        path = os.path.join(folder, NAME)
        if not os.path.lexists(path):
            return cls(folder, {})
        try:
            check_file(path)
            with open(path, "rb") as f:
                entries = _entries(f.read())
        except OSError as e:
            raise SystemExit(f"error: {path}: {e.strerror}")
        except ValueError as e:
            raise SystemExit(
                f"error: {path}: {e}, so that nothing says of what the shards beside it were "
                "made; delete it with them, or set another --out_dir"
            )
        return cls(folder, entries)

    def names(self):
        """The shards that have an entry."""
        return list(self._entries)

    def entry(self, name):
        """What a shard was made of and how, as facts() gives it, or None if nothing says."""
        return self._entries.get(name)

    def is_finished(self, name):
        """Whether the shard of that name is the one that was made."""
        entry = self._entries.get(name)
        if entry is None or not entry["finished"]:
            return False
        return entry.get("bytes") == os.path.getsize(os.path.join(self.folder, name))

    def begin(self, entries):
        """Note that shards are to be made, {name: facts}: until finish(), they are not whole."""
        for name, facts in entries.items():
            self._entries[name] = facts | {"finished": False}
        self.write()

    def finish(self, names):
        """Note that shards have their names. Of very many not each is written: write() ends it."""
        for name in names:
            size = os.path.getsize(os.path.join(self.folder, name))
            self._entries[name] |= {"finished": True, "bytes": size}
        if len(self._entries) < MANY or time.monotonic() > self._time + 1:
            self.write()

    def keep(self, names, facts):
        """Note that shards which are there already are as these facts tell: files may have moved.

        write() writes it."""
        for name in names:
            self._entries[name] |= facts

    def forget_missing(self):
        """Drop the entries of shards that are no more."""
        for name in self.names():
            if not os.path.lexists(os.path.join(self.folder, name)):
                del self._entries[name]
        self.write()

    def strangers(self, names):
        """The shards in the folder that train.py would read beside `names`, sorted."""
        found = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in found if part_of(name) and name not in names)

    def source_of(self, name):
        """Of what a shard was made, as a part of a sentence."""
        entry = self.entry(name)
        if entry is None:
            return f"something that {NAME} does not tell"
        paths = [source["path"] for source in entry["sources"]]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        return paths[0] + more

    def write(self):
        """Write the file, if anything was noted since. Raises OSError, with a file's name in it."""
        content = self._content()
        if content == self._written:
            return
        with replacing(os.path.join(self.folder, NAME)) as f:
            f.write(content)
        self._written = content
        self._time = time.monotonic()

    def _content(self):
        content = {"format": FORMAT, "shards": dict(sorted(self._entries.items()))}
        return json.dumps(content, indent=1).encode()


def _entries(content):
    """The entries in a shards.json's bytes. Raises ValueError with what is wrong."""
    try:
        manifest = parse_json(content)
    except ValueError:
        raise ValueError("damaged: it is not JSON")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), dict):
        raise ValueError('damaged: it has no "shards"')
    if manifest.get("format") != FORMAT:
        made = manifest.get("format")
        raise ValueError(f"of another version: format {made!r}, not {FORMAT}")
    for name, entry in manifest["shards"].items():
        if not _is_name(name) or not _is_entry(entry):
            raise ValueError(f"damaged: the entry of {name} is not whole")
    return manifest["shards"]


def _is_name(name):
    """Whether it is a shard's, in the manifest's own folder."""
    return part_of(name) and os.path.basename(name) == name


def _is_entry(entry):
    if not isinstance(entry, dict):
        return False
    if not all(isinstance(entry.get(part), kind) for part, kind in PARTS.items()):
        return False
    numbers = [entry["tokenizer"].get(key) for key in ("n_vocab", "fingerprint")]
    sources = entry["sources"]
    return (
        all(type(number) is int for number in numbers)
        and len(sources) > 0
        and all(isinstance(s, dict) and isinstance(s.get("path"), str) for s in sources)
    )


# -----------------------------------------------------------------------------
# facts


def facts(sources, encoding, enc, **settings):
    """What a manifest says of shards.

    sources: what source() gives, of each. encoding, enc: the tokenizer's name and itself.
    settings: all that changes what is in the shards, the "maker" with it; of JSON's kinds."""
    tokenizer = {"name": encoding, "n_vocab": enc.n_vocab, "fingerprint": fingerprint(enc)}
    return {"sources": sources, "tokenizer": tokenizer, "settings": settings}


def source(path):
    """What tells a file and its contents: path, size and hash. Raises OSError."""
    check_file(path)
    size = 0
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"path": os.path.abspath(path), "size": size, "blake2b": digest.hexdigest()}


def path_of(source):
    return source["path"]


def content_of(source):
    """What tells a source's contents, as a text, wherever it lies."""
    return str(sorted(item for item in source.items() if item[0] != "path"))


def contents(sources):
    """That of each: a file may be moved, and equal ones are one text."""
    return [content_of(source) for source in sources]


def same_contents(entry, facts):
    return contents(entry["sources"]) == contents(facts["sources"])


def same_paths(entry, facts):
    return list(map(path_of, entry["sources"])) == list(map(path_of, facts["sources"]))


def difference(entry, facts):
    """What an entry's shard has otherwise, "val_fraction=0.05, not 0.1"; "" if nothing.

    Paths do not count."""
    if not same_contents(entry, facts):
        return other_settings(entry, facts) or "other contents of its source"
    return other_settings(entry, facts)


def other_settings(entry, facts):
    """The same of the settings and the tokenizer alone."""
    before = entry["settings"]
    now = facts["settings"]
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return f"{key}={before.get(key)}, not {now.get(key)}"
    return other_tokenizer(entry, facts)


def other_tokenizer(entry, facts):
    """The same of the tokenizer alone, which is told by its fingerprint, not by its name."""
    before = entry["tokenizer"]
    now = facts["tokenizer"]
    for key in ("n_vocab", "fingerprint"):
        if before.get(key) != now[key]:
            return f"encoding={before.get('name')}, not {now['name']}"
    return ""


# -----------------------------------------------------------------------------
# one at a time


@contextlib.contextmanager
def alone_in(folder):
    """Makes the folder, and holds it for this process while the block runs.

    Exits with one line if another process makes shards there. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:  # Windows: nothing is locked
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"error: {folder}: another process makes shards there; wait for it")
        except OSError:  # a file system that locks no folders, as NFS
            pass
        yield
    finally:
        os.close(held)
