"""
What --input names: files, and data sets of the hub, each with a weight.

    a.jsonl                      a file, or several by a glob
    hf:owner/name                a data set of the hub, see finetune/data/hub_data.py
    a.jsonl,b.parquet            both
    a.jsonl*2,b.parquet*0.5      each example of a twice, and half of b's

A name that is there is meant as it stands, whatever commas and stars it has.
"""

import collections
import glob
import os
import re

from finetune.data import hub_data, parquet
from finetune.checkpoints.paths import is_hub_name
from run import records as text_records
from run.manifest import source
from run.records import matching, stem_of, table_or_json

MOST = 1000  # times that an example may come

# where a file lies, and what it is called in shards.json, None: as it lies
File = collections.namedtuple("File", "path name")
# name: as the user gave it; files: a list; commit: of a data set on the hub, else None
Input = collections.namedtuple("Input", "name weight files commit")


def inputs_of(text):
    """The Inputs that a setting names, in its order. Exits with one line if there are none.

    Files here are looked at before anything is downloaded."""
    asked = [weighted(item) for item in items_of(text)]
    here = {}  # {name: [File]}
    for name, _ in asked:
        if name.startswith(hub_data.PREFIX):
            hub_data.wanted(name)
        else:
            here[name] = [File(path, None) for path in files_here(name)]
    inputs = []
    for name, weight in asked:
        commit = None
        files = here.get(name)
        if files is None:
            wanted = hub_data.wanted(name)
            found, commit = hub_data.fetch(wanted)
            files = [File(path, f"hf:{wanted.repo}/{file}") for path, file in found]
        for file in files:
            check_kind(file.path)
        inputs.append(Input(name, weight, files, commit))
    check_once(inputs)
    return inputs


def items_of(text):
    """The parts of a setting between its commas, but for those within names that are there."""
    parts = text.split(",")
    items = []
    while parts:
        count = len(parts)
        while count > 1 and not is_here(",".join(parts[:count])):
            count -= 1
        item = ",".join(parts[:count])
        items.append(item if is_here(item) else item.strip())
        parts = parts[count:]
    if len(items) > 1 and "" in items:
        raise SystemExit(f"error: input={text}: has nothing beside a comma")
    return items


def is_here(item):
    """Whether there is a file that an item names, with its weight or without one."""
    path = os.path.expanduser(weight_of(item)[0])
    return os.path.lexists(path) or bool(glob.glob(path, recursive=True))


def weighted(item):
    """(name, weight) of an item. Exits with one line if the weight is out of range."""
    name, weight = weight_of(item)
    if not 0 < weight <= MOST:
        raise SystemExit(
            f"error: input={item}: the weight of {name} must be above 0 and at most {MOST:,}"
        )
    return name, weight


def weight_of(item):
    """(name, weight) of an item, 1.0 where none is given."""
    if not os.path.lexists(os.path.expanduser(item)):
        name, _, number = item.rpartition("*")
        try:
            return (name, float(number)) if name else (item, 1.0)
        except ValueError:  # no weight: the star is a glob's
            pass
    return item, 1.0


def files_here(name):
    """The files that a path or glob names. Exits with one line if there are none, or one is of
    no kind that can be read."""
    try:
        paths = matching(name)
    except SystemExit as e:
        why = str(e)
        of_glob = re.search(r"(?i)\.(parquet|jsonl?|csv|tsv|gz|zst)\*([^*?./]+)$", name)
        if is_hub_name(name) and why.endswith("no such file"):
            why += f"; a data set of the hub is named hf:{name}"
        elif of_glob and why.endswith("no such file"):
            why += f", and {of_glob[2]!r} is no weight: a number above 0 was expected"
        raise SystemExit(why)
    for path in paths:
        check_kind(path)
    return paths


def check_kind(path):
    """Exit with one line if a file is of no kind that can be read, or its library is missing."""
    if parquet.is_parquet(path):
        parquet.library(path)
        return
    try:
        table_or_json(path)
    except SystemExit as e:
        raise SystemExit(f"{e}, or .parquet")


def check_once(inputs):
    """Exit with one line if two inputs have a file in common: its weight would be unclear."""
    of_path = {}
    for given in inputs:
        for file in given.files:
            path = os.path.realpath(file.path)
            if path in of_path:
                raise SystemExit(
                    f"error: input: {of_path[path]} and {given.name} both have {file.path}; "
                    "to take a file twice, write *2 behind its name"
                )
        of_path |= {os.path.realpath(file.path): given.name for file in given.files}


def files_of(inputs):
    return [file for given in inputs for file in given.files]


def sources_of(inputs):
    """What shards.json says of each file. Raises OSError."""
    found = []
    for file in files_of(inputs):
        facts = source(file.path)
        found.append(facts | {"path": file.name or facts["path"]})
    return found


def stem(inputs, otherwise):
    """What the shards are called by: one file's name or one data set's; `otherwise` of several."""
    if len(inputs) > 1:
        return stem_of(otherwise)
    if inputs[0].commit:
        repo = hub_data.wanted(inputs[0].name).repo
        return stem_of(repo.partition("/")[2])
    files = inputs[0].files
    return stem_of(files[0].path if len(files) == 1 else otherwise)


def records_of(file, columns=""):
    """Yield (where, record or ValueError) for each record of a File; see run/records.py."""
    if parquet.is_parquet(file.path):
        yield from parquet.records(file.path)
    else:
        yield from text_records.records(file.path, columns)


def shown_name(file):
    """What a file is called in lines that are shown."""
    return file.name or file.path
