"""
Data sets of the Hugging Face hub: which of a repository's files an input names, and their download.

    hf:owner/name                    the split train
    hf:owner/name:test               another
    hf:owner/name/config:test        of one of several configurations
    hf:owner/name/data/*.parquet     files, by their path
    hf:owner/name@revision/...       of a branch, a tag or a commit

hf://datasets/owner/name... is the same. Configurations and splits are what the repository's
README.md says; else a configuration is a folder, and a split a word in the files' paths. No program
of a data set's is run: of one that has no other files the hub has made parquet files, which are
those of the revision refs/convert/parquet.
"""

import collections
import os
import re
import sys

from finetune.checkpoints.paths import is_hub_name
from run.text import first_line

PREFIX = "hf:"
README = "README.md"
READABLE = re.compile(r"(?i).+\.(parquet|(jsonl?|csv|tsv)(\.(gz|zst))?)")
NAME = re.compile(
    r"hf:(?://datasets/)?(?P<repo>[^/@:]+/[^/@:]+)"
    r"(?:@(?P<revision>refs/\w+/\w+|[^/:]+))?"
    r"(?:/(?P<inside>[^:]+))?"
    r"(?::(?P<split>[^:/]+))?"
)
WORDS = {  # of splits, in files' paths
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

# repo: "owner/name"; revision: or None; inside: a configuration or files, or ""; split: or ""
Wanted = collections.namedtuple("Wanted", "name repo revision inside split")


def wanted(name):
    """The Wanted of an input's name. Exits with one line if it is malformed."""
    match = NAME.fullmatch(name)
    if not match or not is_hub_name(match["repo"]):
        raise SystemExit(
            f"error: input={name}: a data set of the hub is named hf:owner/name, or "
            "hf:owner/name@revision/config:split"
        )
    inside = (match["inside"] or "").strip("/")
    if match["split"] and READABLE.fullmatch(inside):
        raise SystemExit(f"error: input={name}: names files, and then a split: leave out one")
    return Wanted(name, match["repo"], match["revision"], inside, match["split"] or "")


def fetch(asked):
    """([(where a file lies, its path in the repository)], the commit), downloaded unless cached.

    asked: a Wanted. Exits with one line if it cannot be had."""
    if not sys.stderr.isatty():  # a pipe gets a line, and no bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub  # slow, and local files do without

    sizes, commit = _files_of(huggingface_hub, asked)

    def download(file):
        if os.path.isabs(commit):  # the cache's folder: the hub was not reached
            return os.path.join(commit, file)
        return huggingface_hub.hf_hub_download(
            asked.repo, file, repo_type="dataset", revision=asked.revision
        )

    try:
        configs = {}
        if README in sizes:
            configs = configs_of(huggingface_hub.metadata_load(download(README)))
        files = choose(sorted(sizes), configs, asked)
        size = sum(sizes[file] for file in files)
        print(f"{asked.name}: {len(files)} files, {size / 1e6:,.1f} MB: {shown(files)}", flush=True)
        found = [(download(file), file) for file in files]
    except ValueError as e:  # choose()'s, and of a README that is none
        raise SystemExit(f"error: {asked.name}: {first_line(e)}")
    except Exception as e:  # its own, its HTTP client's, the file system's, YAML's
        raise SystemExit(f"error: {asked.name}: was not fetched: {first_line(e)}")
    return found, os.path.basename(commit)


def _files_of(hub, asked):
    """({file: bytes}, commit) of a repository, or of what the cache has of it and its folder."""
    try:
        info = hub.HfApi().dataset_info(asked.repo, revision=asked.revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in info.siblings}, info.sha
    except hub.errors.GatedRepoError:
        why = "asks for consent on its page on the hub, and then for a token: hf auth login"
    except hub.errors.RevisionNotFoundError:
        why = f"has no revision {asked.revision}"
    except hub.errors.RepositoryNotFoundError:
        why = "the hub has no such data set, or shows it to its owners alone: hf auth login"
    except Exception as e:  # no network, a server's error
        folder = _cached(hub, asked)
        if folder:
            print(f"note: {asked.name}: the hub was not reached: its files are those in the cache, "
                  "which may not be all")
            return _sizes(folder), folder
        why = f"was not fetched, and is not in the cache: {first_line(e)}"
    raise SystemExit(f"error: {asked.name}: {why}")


def _cached(hub, asked):
    """The folder of what the hub's cache has of a repository, or None."""
    try:
        return hub.snapshot_download(
            asked.repo, repo_type="dataset", revision=asked.revision, local_files_only=True,
            allow_patterns=[README],
        )
    except Exception:  # whatever keeps it from being there
        return None


def _sizes(folder):
    """{file: bytes} of a folder, at any depth."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            sizes[os.path.relpath(path, folder).replace(os.sep, "/")] = os.path.getsize(path)
    return sizes


def shown(names, most=3):
    """Some names in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -----------------------------------------------------------------------------
# which files


def configs_of(card):
    """{configuration: {split: [patterns of files]}} as a README's head tells them, in its order.

    card: what the head says, or None. The one that is the default comes as "default", too. Raises
    ValueError if it is malformed."""
    found = {}
    try:
        for config in (card or {}).get("configs") or []:
            data = config.get("data_files", "**")
            if isinstance(data, list) and all(isinstance(entry, dict) for entry in data):
                data = {entry["split"]: entry["path"] for entry in data}
            elif not isinstance(data, dict):
                data = {"train": data}
            folder = config.get("data_dir", "").strip("/")
            splits = {}
            for split, patterns in data.items():
                patterns = [patterns] if isinstance(patterns, str) else patterns
                splits[split] = [f"{folder}/{p}".lstrip("/") for p in patterns]
            found[config["config_name"]] = splits
            if config.get("default") is True:
                found.setdefault("default", splits)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"its {README} has configs that are malformed: {e!r}")
    return found


def choose(files, configs, asked):
    """The files that are asked for, of all in a repository. Raises ValueError without any.

    configs: as configs_of() gives them."""
    readable = [file for file in files if READABLE.fullmatch(file)]
    inside = asked.inside
    if READABLE.fullmatch(inside):
        found = [file for file in readable if glob_of(inside).fullmatch(file)]
        if not found:
            raise ValueError(f"has no file {inside}; it has {shown(readable) or 'none to read'}")
        return found
    if not readable:
        raise ValueError(
            "has no .parquet, .jsonl, .json, .csv or .tsv; the hub may have made some: try "
            f"hf:{asked.repo}@refs/convert/parquet"
        )
    if configs and (inside in configs or not inside):
        return of_config(readable, configs, inside, asked)
    if inside:
        readable = [file for file in readable if file.startswith(f"{inside}/")]
        if not readable:
            has = f"its configurations: {', '.join(configs)}" if configs else shown(files)
            raise ValueError(f"has no configuration or folder {inside}; it has {has}")
    return by_words(readable, asked.split)


def of_config(files, configs, name, asked):
    """The files of one split of a configuration that the README tells."""
    if not name:
        name = "default" if "default" in configs else next(iter(configs))
        if len(configs) > 1 and name != "default":
            raise ValueError(
                f"has several configurations: {', '.join(configs)}; name one: "
                f"hf:{asked.repo}/{name}"
            )
    splits = configs[name]
    split = asked.split or ("train" if "train" in splits else next(iter(splits)))
    if not asked.split and split != "train" and len(splits) > 1:
        raise ValueError(f"has no split train, but {', '.join(splits)}: name one")
    if split not in splits:
        raise ValueError(f"has no split {split}, but {', '.join(splits)}")
    globs = [glob_of(pattern) for pattern in splits[split]]
    found = [file for file in files if any(glob.fullmatch(file) for glob in globs)]
    if not found:
        raise ValueError(f"has no file {shown(splits[split])} that can be read")
    return found


def by_words(files, split):
    """The files of a split by the words in their paths; all, where no path has a split's word."""
    words = WORDS.get(split or "train", (split,))
    found = [file for file in files if has_word(file, words)]
    if found:
        return found
    known = [name for name in WORDS if any(has_word(file, WORDS[name]) for file in files)]
    if split and split != "train" or known:
        has = f"but {', '.join(known)}" if known else "and its files tell none"
        raise ValueError(f"has no split {split or 'train'}, {has}: {shown(files)}")
    return files


def has_word(file, words):
    """Whether a path has one of these words, as a whole one: in train_sft-0.parquet, "train"."""
    either = "|".join(map(re.escape, words))
    return re.search(rf"(?i)(^|[/._ -])({either})([/._ \d-]|$)", file) is not None


def glob_of(pattern):
    """A regular expression of a pattern, in which ** stands for folders at any depth, too."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern.removeprefix("./"))
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.escape(part)
        elif part.startswith("[!"):
            part = f"[^{part[2:]}"
        text += meanings.get(part, part)
    return re.compile(text)
