"""
The formats of a tokenizer's own file, each read into a Vocabulary.

    tokenizer.json      by the `tokenizers` library
    tokenizer.model     a sentencepiece model (LLaMA-2), or tiktoken's ranks (LLaMA-3)
"""

import base64
import contextlib
import functools
import importlib
import itertools
import os
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

import tiktoken

from finetune.checkpoints.fields import Fields, read_json, shown
from run.text import first_line

# what each splits a text by, before it looks for tokens
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MOST = 2**24  # tokens of a vocabulary, gaps among them
LETTERS = string.ascii_lowercase + string.digits  # what every vocabulary spells, or calls unknown

# the special tokens of LLaMA-3.1 that have a use, by their place after the ranks; 256 are reserved
LLAMA3_SPECIAL = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


@dataclass
class Vocabulary:
    """What a tokenizer's own file says, in any of the formats."""

    ids: dict  # {token: id}, the special ones included
    special: set  # tokens that text may not spell

    # (text, special) -> ids. special False: special tokens in it are text; True: each is its one
    # id; None, of tokenizer.json alone: so, and after that the file's post-processor
    encode: Callable
    decode: Callable  # ids -> text

    # where the settings beside the file do not say:
    bos: int = None
    eos: int = None
    adds_bos: bool = None  # a text starts with bos; None: if the post-processor puts it there

    cuts_at_spaces: bool = False  # text may be tokenised in pieces, cut as prepare_c4.blocks does


# -----------------------------------------------------------------------------
# tokenizer.json


def from_json(path):
    """The Vocabulary in a tokenizer.json."""
    tokenizers = library("tokenizers", path)
    try:
        parts = read_json(*os.path.split(path))
        tokenizer = tokenizers.Tokenizer.from_file(path)
        tokenizer.no_truncation()  # the file may ask for both
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        lost = [c for c in LETTERS if not tokenizer.encode(c, add_special_tokens=False).ids]
        if lost:  # without an unknown token, what is in no token is left out, and nobody says so
            raise ValueError(f"no token spells {' '.join(lost)}: texts would lose them")
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"{path}: not a whole tokenizer.json ({first_line(e)}); get it again")
    _check_ids(ids, path)

    def encode(text, special):
        tokenizer.encode_special_tokens = special is False  # as text
        return tokenizer.encode(text, add_special_tokens=special is None).ids

    added = parts.get("added_tokens") or []
    return Vocabulary(
        ids=ids,
        special={token["content"] for token in added if token.get("special")},
        encode=encode,
        decode=functools.partial(tokenizer.decode, skip_special_tokens=False),
        cuts_at_spaces=_cuts_at_spaces(parts, added),
    )


def _cuts_at_spaces(parts, added):
    """Whether a tokenizer.json splits text as GPT-2 or LLaMA-3 does, and nothing spans a split.

    parts: the file; added: the tokens that it adds to its model's."""
    if parts.get("normalizer"):  # it may add or join spaces
        return False
    before = parts.get("pre_tokenizer") or {}
    before = before.get("pretokenizers", [before])  # of a Sequence, or the one
    for part in before:
        if part.get("type") not in ("ByteLevel", "Split", "Digits"):
            return False  # Metaspace marks each piece's start
        if part.get("add_prefix_space"):  # likewise
            return False
    for token in added:
        spans = re.search(r"\s", token["content"]) or token.get("lstrip") or token.get("rstrip")
        if spans and not token.get("special"):  # a cut before it or in it would change its text
            return False
    return any(map(_splits, before))


def _splits(part):
    """Whether a pre-tokenizer splits by GPT-2's pattern or LLaMA-3's, with digits in any groups."""
    if part["type"] == "ByteLevel":
        return part.get("use_regex", True)  # GPT-2's
    if part["type"] != "Split" or part.get("invert"):
        return False
    pattern = part["pattern"].get("Regex")
    for known in (GPT2_SPLIT, LLAMA3_SPLIT):
        if pattern in (known, known.replace("{1,3}", "")):
            return True
    return False


# -----------------------------------------------------------------------------
# tokenizer.model: sentencepiece


def is_sentencepiece(path):
    with contextlib.suppress(OSError), open(path, "rb") as f:
        # the tag of a protobuf's first field; a rank file starts with a letter of base64
        return f.read(1) == b"\n"
    return False


def from_sentencepiece(path, folder):
    """The Vocabulary in a sentencepiece model, with what the folder's settings add to it."""
    sentencepiece = library("sentencepiece", path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as e:  # RuntimeError, and OSError without an errno
        raise ValueError(f"{path}: not a whole sentencepiece model ({first_line(e)}); get it again")
    size = model.vocab_size()
    ids = {model.id_to_piece(i): i for i in range(size)}
    special = {token for token, i in ids.items() if model.is_control(i) or model.is_unknown(i)}
    added = _added_tokens(folder)  # beyond the model's size
    for token, i in added.items():
        if ids.get(token, i) != i or i < size and model.id_to_piece(i) != token:
            raise ValueError(f"{folder}: the added token {shown(token)} is not {i} in {path}")
    ids.update(added)
    special |= added.keys()

    # where two special tokens start alike, the longer one is meant
    longest_first = sorted(special, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    name_of = {ids[token]: token for token in special}

    def encode(text, special):
        if not special:
            return model.encode(text)
        found = []
        for n, piece in enumerate(pattern.split(text)):
            if n % 2:  # every second one is a special token
                found.append(ids[piece])
            elif piece:
                found += model.encode(piece)
        return found

    def is_apart(i):
        return i in name_of or i >= size  # a padded vocabulary's ids are in no model

    def decode(ids):
        # what lies between special tokens is decoded as one: a character may span several ids
        texts = []
        for apart, run in itertools.groupby(ids, is_apart):
            if apart:
                texts += [name_of.get(i, "") for i in run]
            else:
                texts.append(model.decode(list(run)))
        return "".join(texts)

    return Vocabulary(
        ids=ids,
        special=special,
        encode=encode,
        decode=decode,
        bos=model.bos_id(),  # -1: none
        eos=model.eos_id(),
        adds_bos=True,  # LlamaTokenizer's default
    )


# -----------------------------------------------------------------------------
# tokenizer.model: tiktoken's ranks


def read_ranks(path):
    """The tiktoken.Encoding of a file of "base64-token rank" lines.

    It splits as LLaMA-3 does, and has end-of-text where LLaMA-3 has it."""
    ranks = {}
    # not tiktoken's load_tiktoken_bpe, which answers from its cache when the file has changed
    with open(path, "rb") as f, contextlib.suppress(ValueError):
        for line in f:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    n = len(ranks)
    lacks_a_byte = any(bytes([b]) not in ranks for b in range(256))
    if lacks_a_byte or sorted(ranks.values()) != list(range(n)):
        raise ValueError(
            f'{path}: expected lines "base64-token rank", ranks 0, 1, ..., and every byte'
        )
    # 256 of them, as in LLaMA-3; tiktoken's eot_token is the one that has this name
    special = {"<|begin_of_text|>": n, "<|endoftext|>": n + 1}
    for i in range(254):
        special[f"<|reserved_{i}|>"] = n + 2 + i
    return tiktoken.Encoding(
        path, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


def from_ranks(encoding, folder):
    """The Vocabulary of a checkpoint's rank file, its special tokens by their names.

    encoding: as read_ranks gives it. The folder's settings name the tokens' places; else they are
    LLaMA-3.1's."""
    first = encoding.n_vocab - 256
    names = {}
    for token, i in _added_tokens(folder).items():
        if i < first:
            raise ValueError(f"{folder}: the added token {shown(token)} has the number of a rank")
        names[i] = token
    # LLaMA-3.1's, where the settings have no name for a place, and the name for no other place
    given = set(names.values())
    for place in range(256):
        token = f"<|{LLAMA3_SPECIAL.get(place, f'reserved_special_token_{place}')}|>"
        if token in given:
            token = f"<|unused_{place}|>"
        names.setdefault(first + place, token)
    special = {token: i for i, token in names.items()}

    # the same encoding, with these names
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(first)}
    whole = tiktoken.Encoding(
        encoding.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )

    def encode(text, special):
        if special:
            return whole.encode(text, allowed_special="all")
        return whole.encode_ordinary(text)

    return Vocabulary(
        ids=ranks | special,
        special=set(special),
        encode=encode,
        decode=whole.decode,
        bos=first,
        eos=first + 1,
        adds_bos=True,
        cuts_at_spaces=True,  # it splits by LLaMA-3's pattern
    )


# -----------------------------------------------------------------------------
# what lies beside the vocabulary


def library(name, path):
    """A library that only some checkpoints need, and that may be missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{path}: reading it takes the {name} library: pip install {name}")


def settings_of(folder, file):
    """The Fields of the JSON object in folder/file; none if there is no such file."""
    return Fields(read_json(folder, file, needed=False), os.path.join(folder, file))


def content_of(fields, key):
    """A token's text; settings give it plainly, or as an object that has more to say of it."""
    if isinstance(fields.found.get(key), dict):
        return fields.object(key).text("content")
    return fields.text(key, None)


def _added_tokens(folder):
    """{token: id} of what the settings add to a vocabulary that has no place for it."""
    added = {}
    plain = settings_of(folder, "added_tokens.json")
    for token in plain.found:
        added[token] = plain.whole(token, least=0)
    listed = settings_of(folder, "tokenizer_config.json").object("added_tokens_decoder")
    for i in listed.found:
        if not re.fullmatch("[0-9]{1,9}", i):
            raise ValueError(f"{listed.where}: {shown(i)} is no token's number")
        added[listed.object(i).text("content")] = int(i)
    _check_ids(added, folder)
    return added


def _check_ids(ids, path):
    """Raise ValueError if two tokens have one number, or a number is beyond all vocabularies."""
    token_of = {}
    for token, i in ids.items():
        if i >= MOST:
            raise ValueError(f"{path}: the token {shown(token)} has the number {i}")
        if token_of.setdefault(i, token) != token:
            both = f"{shown(token_of[i])} and {shown(token)}"
            raise ValueError(f"{path}: the tokens {both} have one number, {i}")
