"""
What prepare_c4.py has to make: which shards of which files, and which of them are there already.
"""

import collections
import itertools
import os
import sys

from run import manifest
from run.docs import docs_source
from run.encodings import get_encoding
from run.protocol import FILES, GALORE, ROW
from run.records import kind_of, matching, stem_of
from run.shards import open_shard, part_of
from run.text import first_line

C4 = "allenai/c4"  # its name on the hub
MAKER = "prepare_c4"  # what a manifest calls the script

# a file, the facts of its shards (run/manifest.py), and their paths; val_shard is None where there
# is but one
Job = collections.namedtuple("Job", "file facts shard val_shard")


def files_of(input, val_fraction):
    """The local files to read, ["docs"], or None for C4. Exits with one line if there are none."""
    if not 0 <= val_fraction < 1:
        raise SystemExit(f"error: val_fraction={val_fraction}: must be at least 0 and less than 1")
    if not input:
        return None
    if input == "docs":
        if os.path.isfile(input):
            print("note: docs is this Python's documentation; a file here would be ./docs")
        return ["docs"]
    files = matching(input)
    for file in files:
        kind_of(file)
    return files


def jobs_of(files, made, encoding, shards, val_fraction, protocol=""):
    """The Jobs of local files, or where `files` is None of C4's first ones.

    made: the Manifest of the folder that they go to. Raises OSError if a file cannot be read."""
    how = {"encoding": encoding, "enc": get_encoding(encoding), "maker": MAKER}
    val_files = 1
    if protocol == GALORE:
        how["protocol"] = protocol
        val_files = FILES
    jobs = []
    if files is None:
        for name, found in files_of_c4(shards, val_files).items():
            sources = [{"path": f"{C4}/{file}", "hub": C4, "file": file} for file in found]
            facts = manifest.facts(sources, **how)
            jobs.append(Job(found[0], facts, os.path.join(made.folder, name), None))
        return jobs

    sources = [docs_source() if file == "docs" else manifest.source(file) for file in files]
    for file, source, name in zip(files, sources, shard_names(files, sources, made)):
        facts = manifest.facts([source], **how, val_fraction=val_fraction)
        shard = os.path.join(made.folder, name)
        val_shard = None
        if val_fraction > 0:
            val_shard = os.path.join(made.folder, name.replace("_train_", "_val_"))
        jobs.append(Job(file, facts, shard, val_shard))
    return jobs


def files_of_c4(shards, val_files):
    """{shard: files on the hub}: C4's first, val_files for validation, `shards` for training."""
    # validation first: it is small, and no run starts without it
    validation = [f"en/c4-validation.{i:05d}-of-00008.json.gz" for i in range(val_files)]
    files = {"c4_val_00000.bin": validation}
    for i in range(shards):
        files[f"c4_train_{i:05d}.bin"] = [f"en/c4-train.{i:05d}-of-01024.json.gz"]
    return files


def shard_names(files, sources, made):
    """The name of each file's training shard, without the folder.

    A file that has a shard keeps its name, whatever files come or go beside it. It is known by its
    contents if it was moved, and by its path if it was changed."""
    before = {}  # {name: its source}, of those that no file has taken yet
    for name in made.names():
        entry = made.entry(name)
        if part_of(name) == "train" and entry["settings"].get("maker") == MAKER:
            before[name] = entry["sources"][0]
    names = {}  # {place in `files`: name}
    for key in (str, manifest.content_of, manifest.path_of):
        named = collections.defaultdict(list)
        for name, source in before.items():
            named[key(source)].append(name)
        for i, source in enumerate(sources):
            same = named.get(key(source))
            if i not in names and same:
                names[i] = same.pop(0)
                del before[names[i]]

    # the others take the next numbers; a Mac's file system takes X and x for one name
    taken = {name.lower() for name in made.names()}
    for i, file in enumerate(files):
        if i not in names:
            names[i] = new_name(file, taken)
            taken.add(names[i].lower())
    return [names[i] for i in range(len(files))]


def new_name(file, taken):
    # a name that starts with a dot is hidden, and one of 255 bytes has no room for more
    stem = stem_of(file).lstrip(".").encode()[:150].decode(errors="ignore") or "text"
    names = (f"{stem}_train_{i:05d}.bin" for i in itertools.count())
    return next(name for name in names if name.lower() not in taken)


def names_of(job):
    """The names of a job's shards, without the folder."""
    return [os.path.basename(path) for path in paths_of(job)]


def paths_of(job):
    return [path for path in (job.shard, job.val_shard) if path]


def finished(job, made):
    """Whether a job's shards are all there already; says so, and why if they are made again."""
    why = reason_to_make(job, made)
    for path in paths_of(job):
        if not why:
            print(f"{path}: kept; to make it again, delete it")
        elif os.path.exists(path):
            print(f"note: {path}: is made again: {why}")
    if not why:
        made.keep(names_of(job), job.facts)
    return not why


def reason_to_make(job, made):
    """Why a job's shards are to be made: one is missing or out of date; "" if they are as wanted.

    Exits with one line if what is in a shard's place is not of this job."""
    reasons = []
    for path in paths_of(job):
        name = os.path.basename(path)
        if not os.path.lexists(path):
            reasons.append(f"{name} is missing")
            continue
        whole = is_whole_shard(path, job)
        entry = made.entry(name)
        other = ""
        if entry is None:
            other = f"{manifest.NAME} does not say of what it was made"
        elif manifest.other_settings(entry, job.facts):
            other = f"was made with {manifest.other_settings(entry, job.facts)}"
        elif not manifest.same_contents(entry, job.facts):
            reasons.append(f"{made.source_of(name)} has changed")
            if not manifest.same_paths(entry, job.facts):
                other = f"was made of {made.source_of(name)}"
        if other:
            raise SystemExit(f"error: {path}: {other}; delete it or set another --out_dir")
        if not made.is_finished(name):
            reasons.append("it was not finished, or is another file since")
        elif not whole:
            reasons.append("it is not whole")
    return reasons[0] if reasons else ""


def is_whole_shard(path, job):
    """Whether `path` is a whole shard. Exits with one line if it is one of another vocabulary."""
    tokenizer = job.facts["tokenizer"]
    try:
        found = open_shard(path)
    except SystemExit:
        return False
    if found.n_vocab != tokenizer["n_vocab"]:
        raise SystemExit(
            f"error: {path}: has n_vocab {found.n_vocab}, not {tokenizer['n_vocab']}; "
            "delete it or set another --out_dir"
        )
    if found.row != (ROW if is_of_rows(job) else 0):
        maker = f"as rows of {found.row} tokens" if found.row else "as packed text"
    elif found.fingerprint != tokenizer["fingerprint"]:
        maker = "with another tokenizer"
    else:
        return True
    raise SystemExit(f"error: {path}: was made {maker}; delete it or set another --out_dir")


def check_others(jobs, made):
    """Say what shards the folder has beside these jobs'. Exits with one line if they do not fit.

    They do if an earlier command made them by the same tokenizer, of files that are still as they
    were."""
    names = {name for job in jobs for name in names_of(job)}
    others = made.strangers(names)
    for name in others:
        entry = made.entry(name)
        why = ""
        if entry is None:
            why = f"{manifest.NAME} does not say of what it was made"
        elif entry["settings"].get("maker") != MAKER:
            why = f"was made by {entry['settings'].get('maker')}"
        elif entry["settings"].get("protocol") != jobs[0].facts["settings"].get("protocol"):
            why = "was made by another protocol than this command's"
        elif manifest.other_tokenizer(entry, jobs[0].facts):
            why = f"was made with {manifest.other_tokenizer(entry, jobs[0].facts)}"
        elif not is_up_to_date(entry["sources"][0]) or not made.is_finished(name):
            why = f"{made.source_of(name)}, of which it was made, is gone or has changed"
        if why:
            path = os.path.join(made.folder, name)
            raise SystemExit(
                f"error: {path}: {why}, and it would be trained on; "
                "delete it or set another --out_dir"
            )
    if others:
        print(
            f"note: {made.folder} has {len(others)} more shards, of files that are not in this "
            f"command: {others[0]}, of {made.source_of(others[0])}"
        )


def is_up_to_date(source):
    """Whether what a shard was made of is still there, and as it was."""
    if "hub" in source:
        return True
    if source["path"] == "docs":
        return source == docs_source()
    return os.path.isfile(source["path"]) and source == manifest.source(source["path"])


def is_of_c4(job):
    return "hub" in job.facts["sources"][0]


def is_of_rows(job):
    """Whether its shards hold a document a row, as run/protocol.py has them."""
    return job.facts["settings"].get("protocol") == GALORE


def fetch(name):
    """The local path of one of C4's files, downloaded unless the hub's cache (HF_HOME) has it."""
    if not sys.stderr.isatty():  # a pipe gets a line, and no bars
        print(f"{C4}: {name}", flush=True)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import hf_hub_download  # slow, and local files do without

    try:
        return hf_hub_download(C4, name, repo_type="dataset")
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(
            f"error: could not fetch {C4} {name} ({first_line(e)}); local text: --input=GLOB"
        )
