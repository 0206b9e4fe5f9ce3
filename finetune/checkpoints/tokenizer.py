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

import contextlib
import functools
import os

import tiktoken

from finetune.checkpoints import chat
from finetune.checkpoints.fields import Fields
from finetune.checkpoints.paths import is_hub_name, local
from finetune.checkpoints.vocabularies import (content_of, from_json, from_ranks,
                                               from_sentencepiece, is_sentencepiece, read_ranks,
                                               settings_of)
from run.files import check_file
from run.text import valid


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
        return Tokenizer(name, folder, from_json(path))
    if path.endswith(".model") and is_sentencepiece(path):
        return Tokenizer(name, folder, from_sentencepiece(path, folder))
    encoding = read_ranks(path)
    if alone:  # a rank file
        return encoding
    return Tokenizer(name, folder, from_ranks(encoding, folder))


def _vocabulary_file(folder):
    for file in ("tokenizer.json", "tokenizer.model"):
        path = os.path.join(folder, file)
        if os.path.lexists(path):
            return path
    raise ValueError("the folder has neither tokenizer.json nor tokenizer.model")


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
        self._settings = settings_of(folder, "tokenizer_config.json")

        # which tokens start and end a text
        model = settings_of(folder, "config.json")
        self._ends = [model, settings_of(folder, "generation_config.json")]
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
                names[key] = content_of(self._settings, key)
        return names

    def _id(self, kind, model, default):
        """The id of "bos" or "eos".

        By the tokenizer's settings; else by config.json's, `model`; else `default`."""
        token = content_of(self._settings, f"{kind}_token")
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
