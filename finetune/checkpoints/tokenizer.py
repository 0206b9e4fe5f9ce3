"""
A checkpoint's own tokenizer: text to tokens and back, special tokens, and conversations.

get_tokenizer reads it from the checkpoint's folder, or from one file of it:

- tokenizer.json, which the `tokenizers` library reads;
- tokenizer.model, a sentencepiece model (LLaMA-2) or a tiktoken rank file (LLaMA-3);
- the same from the Hugging Face hub, by "organisation/name".

A Tokenizer has what the code uses of tiktoken.Encoding: n_vocab, eot_token, encode_ordinary and
decode. It has more: special tokens, and the chat template that its conversations are written in.
What lies beside the vocabulary (tokenizer_config.json, config.json, chat_template.jinja) says
which tokens begin and end a text.
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

from finetune.checkpoints import chat
from finetune.checkpoints.fields import Fields, read_json, shown
from finetune.checkpoints.paths import is_hub_name, local
from run.files import check_file
from run.text import first_line, valid

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

def get_tokenizer(name):
    """The tokenizer at a path or in a hub repository: a Tokenizer, or a tiktoken.Encoding.

    name: a checkpoint's folder; its tokenizer.json or *.model; "organisation/name" on the hub; or a
    file of "base64-token rank" lines, which by itself is a tiktoken.Encoding. Exits with one line
    if there is no such tokenizer."""
    try:
        return _read(name)
    except OSError as e:
        raise SystemExit(f"error: encoding {name}: {e.filename}: {e.strerror}")
    except ValueError as e:
        raise SystemExit(f"error: encoding {name}: {e}")


def _read(name):
    # a folder or a file here goes before a repository of that name
    path = os.path.expanduser(name)
    if not os.path.lexists(path):
        if not is_hub_name(name):
            names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
            raise ValueError(f"not one of {names}: No such file or folder")
        path = local(name, weights=False)
    folder = path
    alone = not os.path.isdir(path)
    if alone:
        folder = os.path.dirname(path)
    else:
        path = _vocabulary_file(folder)
    check_file(path)  # a pipe would never end

    # *.model is of two formats
    if path.endswith(".json"):
        return Tokenizer(name, folder, _read_json(path))
    if path.endswith(".model") and _is_sentencepiece(path):
        return Tokenizer(name, folder, _read_sentencepiece(path, folder))
    encoding = _read_ranks(path)
    if alone:  # a rank file
        return encoding
    return Tokenizer(name, folder, _with_special_tokens(encoding, folder))


def _vocabulary_file(folder):
    for file in ("tokenizer.json", "tokenizer.model"):
        path = os.path.join(folder, file)
        if os.path.lexists(path):
            return path
    raise ValueError("the folder has neither tokenizer.json nor tokenizer.model")


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


class Tokenizer:
    """A checkpoint's own tokenizer.

    name: as given to get_encoding. folder: of tokenizer_config.json and the other settings, each of
    which may be missing. vocabulary: a Vocabulary.
    """

    def __init__(self, name, folder, vocabulary):
        self.name = name
        self.vocabulary = vocabulary.ids
        self.special = vocabulary.special
        self.decode = vocabulary.decode
        self.cuts_at_spaces = vocabulary.cuts_at_spaces
        self.n_vocab = max(vocabulary.ids.values()) + 1
        self._encode = vocabulary.encode
        self._settings = _settings(folder, "tokenizer_config.json")

        # which tokens start and end a text
        model = _settings(folder, "config.json")
        self._ends = [model, _settings(folder, "generation_config.json")]
        self.bos_token = self._id("bos", model, vocabulary.bos)
        self.eot_token = self._id("eos", model, vocabulary.eos)
        if self.eot_token is None:
            raise ValueError("no end-of-text token: give tokenizer_config.json an eos_token")
        adds = self._settings.truth("add_bos_token", vocabulary.adds_bos)
        if adds is None:
            adds = self._processor_adds_bos()
        self.add_bos_token = self.bos_token is not None and adds
        self.token_names = self._names_of_tokens()  # {"bos_token": token, ...}
        named = _chat_templates(folder, self._settings)
        self.chat_template = named.get("default")
        self.tool_template = named.get("tool_use", self.chat_template)

    def encode_ordinary(self, text):
        """The ids of `text`, in which nothing is special; no bos before them."""
        return self._encode(valid(text), False)

    def encode_with_special(self, text):
        """The ids of `text`, in which a special token, as a chat template writes it, is one id."""
        return self._encode(valid(text), True)

    def with_bos(self, ids):
        """`ids` as the model expects a text to start.

        That is after bos, if the tokenizer adds one, and if it is not there yet."""
        if self.add_bos_token and ids[:1] != [self.bos_token]:
            return [self.bos_token, *ids]
        return ids

    def render(self, messages, add_generation_prompt=False, fields=None):
        """The text of `messages`, [{"role", "content"}], by the chat template.

        add_generation_prompt: with the start of the assistant's next one. fields: what else the
        template may ask for, by name; with tools it is the one for tools, if there is such. Raises
        ValueError with the template's reason if it does not take them."""
        if self.chat_template is None:
            raise SystemExit(
                f"error: encoding {self.name}: has no chat template; "
                "messages need an instruct model's"
            )
        given = {"tools": None, "documents": None} | (fields or {}) | self.token_names
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        template = self.chat_template if given["tools"] is None else self.tool_template
        return self._asked(chat.render, template, given)

    @functools.cached_property
    def template_names(self):
        """What the chat templates ask for, a set of names."""
        names = set()
        for template in (self.chat_template, self.tool_template):
            names.update(self._asked(chat.names, template))
        return names

    @functools.cached_property
    def end_tokens(self):
        """The ids that end an answer: of the settings, and what the chat template writes there."""
        found = {self.eot_token}
        for settings in self._ends:
            value = settings.take("eos_token_id", (int, list), "a token's number, or several", [])
            found.update([value] if type(value) is int else value)
        if self.chat_template is not None:
            with contextlib.suppress(ValueError):  # it refuses the two
                asked = {"role": "user", "content": "a question"}
                said = {"role": "assistant", "content": "the answer"}
                _, _, after = self.render([asked, said]).rpartition(said["content"])
                ids = self.encode_with_special(after.strip())[:1]
                found.update({self.vocabulary[token] for token in self.special}.intersection(ids))
        return found

    def _asked(self, what, *args):
        """What chat's function says of a template."""
        try:
            return what(*args)
        except chat.Damaged as e:
            raise SystemExit(f"error: encoding {self.name}: its chat template is damaged: {e}")
        except ValueError as e:
            raise ValueError(f"the chat template refuses it: {e}")

    def _names_of_tokens(self):
        """{"bos_token": token, ...}: what a template may ask for."""
        # by their ids
        names = {}
        token_of = {i: token for token, i in self.vocabulary.items()}
        for key, i in (("bos_token", self.bos_token), ("eos_token", self.eot_token)):
            if isinstance(token_of.get(i), str):  # not bytes, of a rank file
                names[key] = token_of[i]
        # those that the settings name, unk_token and others, too
        for key, value in self._settings.found.items():
            if key.endswith("_token") and isinstance(value, (str, dict)):  # not add_bos_token
                names[key] = _content(self._settings, key)
        return names

    def _id(self, kind, model, default):
        """The id of "bos" or "eos".

        By the tokenizer's settings; else by config.json's, `model`; else `default`."""
        token = _content(self._settings, f"{kind}_token")
        if token in self.vocabulary:
            return self.vocabulary[token]
        key = f"{kind}_token_id"
        found = model.found.get(key)
        if isinstance(found, list) and found:
            found = found[0]  # LLaMA-3-Instruct stops at any of three
        if type(found) not in (int, type(None)):
            model.refuse(key, "a token's number")
        for i in (found, default):
            if i is not None and 0 <= i < self.n_vocab:
                return i
        return None

    def _processor_adds_bos(self):
        """Whether tokenizer.json's post-processor starts a text with bos: try it."""
        plain = self._encode("x", True)[:1]
        processed = self._encode("x", None)[:1]
        return processed == [self.bos_token] != plain


# -----------------------------------------------------------------------------
# tokenizer.json


def _read_json(path):
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


def _is_sentencepiece(path):
    with contextlib.suppress(OSError), open(path, "rb") as f:
        # the tag of a protobuf's first field; a rank file starts with a letter of base64
        return f.read(1) == b"\n"
    return False


def _read_sentencepiece(path, folder):
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


def _read_ranks(path):
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


def _with_special_tokens(encoding, folder):
    """The Vocabulary of a checkpoint's rank file, its special tokens by their names.

    encoding: as _read_ranks gives it. The folder's settings name the tokens' places; else they are
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


def _settings(folder, file):
    """The Fields of the JSON object in folder/file; none if there is no such file."""
    return Fields(read_json(folder, file, needed=False), os.path.join(folder, file))


def _content(fields, key):
    """A token's text; settings give it plainly, or as an object that has more to say of it."""
    if isinstance(fields.found.get(key), dict):
        return fields.object(key).text("content")
    return fields.text(key, None)


def _added_tokens(folder):
    """{token: id} of what the settings add to a vocabulary that has no place for it."""
    added = {}
    plain = _settings(folder, "added_tokens.json")
    for token in plain.found:
        added[token] = plain.whole(token, least=0)
    listed = _settings(folder, "tokenizer_config.json").object("added_tokens_decoder")
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


# -----------------------------------------------------------------------------
# chat templates


def _chat_templates(folder, settings):
    """{name: source} of the chat templates, of their own file or in tokenizer_config.json."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.lexists(path):
        check_file(path)
        try:
            with open(path, encoding="utf-8") as f:
                return {"default": f.read()}
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: {e}")
    if not isinstance(settings.found.get("chat_template"), list):
        template = settings.text("chat_template", None)
        return {} if template is None else {"default": template}
    named = {}  # "default", "tool_use", "rag"
    for entry in settings.list("chat_template"):
        entry = Fields(entry if isinstance(entry, dict) else {}, f"{settings.where}: chat_template")
        named[entry.text("name")] = entry.text("template")
    return named
