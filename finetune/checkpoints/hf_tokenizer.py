"""
The tokenizer of an exported checkpoint: the files of the one that the model came from, or a
tokenizer.json that says what an encoding of tiktoken's is.
"""

import glob
import os
import re
import shutil

from finetune.checkpoints.hf_files import write_json
from finetune.checkpoints.tokenizer import get_tokenizer
from run.encodings import tiktoken_vocabulary
from run.files import check_file
from run.text import first_line

# what an exported directory takes over from the one that the model came from
FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)

# what both tokenizers must encode alike
SAMPLE = (
    "It's THE  sample,\n\n  we'll see: 1234567 x=3.14; \tdéjà vu 日本語 🙂 ﬀ\r\n"
    "<|endoftext|> don't; A\u0301bc   \n \u3000x…  end  "
)


# -----------------------------------------------------------------------------
# a checkpoint's own


def tokenizer_files(like):
    """The files of the directory `like` that its tokenizer is. Raises ValueError for one that is
    no file, or that a link takes from elsewhere: what is exported may be given to others."""
    found = []
    for pattern in FILES:
        found += glob.glob(os.path.join(glob.escape(like), pattern))
    for file in found:
        try:
            check_file(file)
            with open(file, "rb"):
                pass
        except OSError as e:
            raise ValueError(f"{file}: {e.strerror}")
        target = os.path.realpath(file)
        if not any(_is_inside(target, folder) for folder in _own_folders(like)):
            raise ValueError(
                f"{file}: is a link to {target}, outside of the checkpoint, and is not copied; "
                "put the file itself there"
            )
    return found


def _own_folders(like):
    """The directory, and where the hub's cache keeps the files that its snapshots link to."""
    yield like
    snapshots, _ = os.path.split(os.path.realpath(like))
    if os.path.basename(snapshots) == "snapshots":
        yield os.path.join(os.path.dirname(snapshots), "blobs")


def _is_inside(path, folder):
    folder = os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def copy_tokenizer(files, folder):
    for file in files:
        shutil.copyfile(file, os.path.join(folder, os.path.basename(file)))


# -----------------------------------------------------------------------------
# an encoding's


def write_tokenizer(encoding, folder):
    """Write a tiktoken.Encoding as tokenizer.json, for transformers. Returns None, or in a line why
    there is none: it is read back, and must encode a text as the encoding does."""
    file = os.path.join(folder, "tokenizer.json")
    settings = os.path.join(folder, "tokenizer_config.json")
    end = encoding.decode([encoding.eot_token])
    write_json(file, tokenizer_json(encoding))
    write_json(settings, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    try:
        ids = get_tokenizer(folder).encode_ordinary(SAMPLE)
        if ids == encoding.encode_ordinary(SAMPLE):
            return None
        why = "its splits are not the tokenizers library's"
    except SystemExit as e:  # the library is missing
        why = first_line(e).removeprefix("error: ")
    os.unlink(file)
    os.unlink(settings)
    return why


def tokenizer_json(encoding):
    """tokenizer.json's object of a tiktoken.Encoding.

    Both merge the pair of tokens first whose union has the lowest rank; the library wants all such
    pairs listed."""
    special = {}
    ranks = {}
    for token, i in tiktoken_vocabulary(encoding).items():
        if encoding.is_special_token(i):
            special[token.decode()] = i
        else:
            ranks[token] = i
    letters = byte_letters()

    def spelled(token):
        return "".join(letters[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spelled(a), spelled(b)] for a, b in pairs]
    split = split_pattern(encoding._pat_str)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    before = [byte_level | {"trim_offsets": False}]
    if split:
        cut = {"type": "Split", "pattern": {"Regex": split}}
        before.insert(0, cut | {"behavior": "Isolated", "invert": False})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": True} for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "post_processor": None,
        "decoder": byte_level | {"trim_offsets": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(split),  # a whole piece that is a token is that token
            "vocab": {spelled(token): i for token, i in ranks.items()} | special,
            "merges": merges,
        },
    }


def split_pattern(pattern):
    """tiktoken's pattern as the tokenizers library reads it; None where no split is needed.

    The library knows no possessive quantifiers, and takes "$" for a line's end."""
    if pattern == "(?s:.)":  # of "bytes", which are apart anyhow
        return None
    pattern = re.sub(r"(?<!\\)([+*?}])\+", r"\1", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", pattern)


def byte_letters():
    """The letter that GPT-2's vocabulary has for each byte: itself, if it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {b: chr(b) for b in seen}
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + len(letters) - len(seen))
    return letters
