"""
Text to tokens and back. get_encoding gives one of three kinds, all with what the code uses of tiktoken.Encoding
(n_vocab, eot_token, encode_ordinary, decode):

- tiktoken's own, by name: "gpt2", "cl100k_base" ...; "bytes", the 256 bytes and an end-of-text token; a rank file;
- a checkpoint's tokenizer, from its folder or one file of it: tokenizer.json (the `tokenizers` library), or
  tokenizer.model, which is a sentencepiece model (LLaMA-2) or a tiktoken rank file (LLaMA-3);
- the same from the Hugging Face hub, by "organisation/name".

A checkpoint's has more: special tokens, and the chat template that its conversations are written in.
"""

import base64
import contextlib
import datetime
import functools
import json
import os
import re
import zlib

import tiktoken

from run.encodings import first_line, valid

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = ["tokenizer*.json", "tokenizer.model", "chat_template.jinja", "config.json", "generation_config.json"]


@functools.lru_cache
def get_tokenizer(name):
    """The encoding of a path or hub repository: a Tokenizer, or of a rank file a tiktoken.Encoding.

    name: a file of "base64-token rank", a checkpoint's folder, its tokenizer.json or *.model, or
    "organisation/name" on the hub. Exits with one line if there is no such encoding."""
    path = name if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else _fetch(name)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if folder == path:
        files = [os.path.join(path, file) for file in ("tokenizer.json", "tokenizer.model")]
        path = next(filter(os.path.exists, files), None)
        if path is None:
            raise SystemExit(f"error: encoding {name}: the folder has neither tokenizer.json nor tokenizer.model")
    if path.endswith(".json"):
        return Tokenizer(name, folder, *_json_tokenizer(path))
    if path.endswith(".model") and _is_sentencepiece(path):
        return Tokenizer(name, folder, *_sentencepiece_tokenizer(path, folder))
    encoding = _rank_file(path)
    return encoding if path == name else Tokenizer(name, folder, *_rank_tokenizer(encoding, folder))


class Tokenizer:
    """A checkpoint's own tokenizer.

    name: as given to get_encoding; folder: of tokenizer_config.json and the other settings, which may be missing;
    vocabulary: {token: id}, the special ones included; special: those that text may not spell, as a set;
    encode: (text, whether special tokens in it count as such) -> ids; decode: ids -> text;
    bos, eos: ids, where the settings do not say; adds_bos: likewise, whether each text starts with bos;
    cuts_at_spaces: a text may be tokenised in pieces, cut where prepare_c4.blocks does.
    """

    def __init__(self, name, folder, vocabulary, special, encode, decode, bos=None, eos=None, adds_bos=None,
                 cuts_at_spaces=False):
        self.name, self.vocabulary, self.special, self.cuts_at_spaces = name, vocabulary, special, cuts_at_spaces
        self._encode, self.decode = encode, decode
        self.n_vocab = max(vocabulary.values()) + 1
        self._settings = _settings(folder, "tokenizer_config.json")
        model = _settings(folder, "config.json")
        self.bos_token, self.eot_token = self._id("bos", model, bos), self._id("eos", model, eos)
        if self.eot_token is None:
            raise SystemExit(f"error: encoding {name}: no end-of-text token: give tokenizer_config.json an eos_token")
        adds = self._settings.get("add_bos_token")
        adds = adds if isinstance(adds, bool) else adds_bos if adds_bos is not None else self._post_processor_adds_bos()
        self.add_bos_token = adds and self.bos_token is not None
        self.chat_template = _chat_template(folder, self._settings)

    def encode_ordinary(self, text):
        """The ids of `text`, in which nothing is special; no bos before them."""
        return self._encode(valid(text), False)

    def encode_with_special(self, text):
        """The ids of `text`, special tokens in it, as a chat template writes them, as the one id that each has."""
        return self._encode(valid(text), True)

    def with_bos(self, ids):
        """`ids` as the model expects a text to start: after bos, if the tokenizer adds one that is not there yet."""
        return [self.bos_token, *ids] if self.add_bos_token and ids[:1] != [self.bos_token] else ids

    def render(self, messages, add_generation_prompt=False):
        """The text of `messages`, [{"role", "content"}], by the chat template; add_generation_prompt: and the start of
        the assistant's next one. Raises ValueError with the template's reason if it does not take them."""
        import jinja2

        if self.chat_template is None:
            raise SystemExit(f"error: encoding {self.name}: has no chat template; messages need an instruct model's")
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                         documents=None, **self._token_names)
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as e:
            raise ValueError(f"the chat template refuses it: {first_line(e)}")

    @functools.cached_property
    def _template(self):
        return _compile(self.name, self.chat_template)

    @functools.cached_property
    def _token_names(self):
        names = {key: _content(value) for key, value in self._settings.items() if key.endswith("_token")}
        names = {key: value for key, value in names.items() if isinstance(value, str)}
        of = {i: token for token, i in self.vocabulary.items()}
        ids = {"bos_token": self.bos_token, "eos_token": self.eot_token}
        return {key: of[i] for key, i in ids.items() if i in of} | names

    def _id(self, kind, model, default):
        token = _content(self._settings.get(f"{kind}_token"))
        if isinstance(token, str) and token in self.vocabulary:
            return self.vocabulary[token]
        i = model.get(f"{kind}_token_id")
        i = i[0] if isinstance(i, list) and i else i  # LLaMA-3-Instruct stops at any of three
        return i if isinstance(i, int) and 0 <= i < self.n_vocab else default

    def _post_processor_adds_bos(self):
        return self._encode("x", None)[:1] == [self.bos_token] != self._encode("x", True)[:1]


# -----------------------------------------------------------------------------
# the formats: each gives Tokenizer's arguments after the folder


def _json_tokenizer(path):
    tokenizers = _library("tokenizers", path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        with open(path, encoding="utf-8") as f:
            parts = json.load(f)
        tokenizer.no_truncation()  # the file may ask for both
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
    except Exception as e:  # the library raises plain Exception, and OSError without an errno
        why = "No such file or directory" if not os.path.exists(path) else first_line(e)
        raise SystemExit(f"error: encoding {path}: not a whole tokenizer.json ({why}); get it again")
    added = parts.get("added_tokens") or []

    def encode(text, special):
        tokenizer.encode_special_tokens = special is False  # as text
        return tokenizer.encode(text, add_special_tokens=special is None).ids

    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    special = {token["content"] for token in added if token.get("special")}
    return vocabulary, special, encode, decode, None, None, None, _cuts_at_spaces(parts, added)


def _cuts_at_spaces(parts, added):
    """Whether a tokenizer.json splits text as GPT-2 or LLaMA-3 does, and nothing reaches over the split."""
    before = parts.get("pre_tokenizer") or {}
    before = before.get("pretokenizers", [before])
    known = [split.replace("{1,3}", digits) for split in (GPT2_SPLIT, LLAMA3_SPLIT) for digits in ("{1,3}", "")]
    splits = any(part.get("type") == "Split" and part["pattern"].get("Regex") in known and not part.get("invert")
                 or part.get("type") == "ByteLevel" and part.get("use_regex", True) for part in before)
    plain = {part.get("type") for part in before} <= {"ByteLevel", "Split", "Digits"}  # Metaspace marks each piece
    marks = any(part.get("add_prefix_space") for part in before)
    unsplit = any(not t.get("special") and (re.search(r"\s", t["content"]) or t.get("lstrip") or t.get("rstrip"))
                  for t in added)
    return splits and plain and not marks and not unsplit and not parts.get("normalizer")


def _is_sentencepiece(path):
    with contextlib.suppress(OSError), open(path, "rb") as f:
        return f.read(1) == b"\n"  # the tag of a protobuf's first field; a rank file starts with a letter of base64
    return False


def _sentencepiece_tokenizer(path, folder):
    sentencepiece = _library("sentencepiece", path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as e:  # RuntimeError, and OSError without an errno
        raise SystemExit(f"error: encoding {path}: not a whole sentencepiece model ({first_line(e)}); get it again")
    size = model.vocab_size()
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    special = {token for token, i in vocabulary.items() if model.is_control(i) or model.is_unknown(i)}
    added = _added_tokens(folder)
    vocabulary.update(added)
    special |= added.keys()
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    names = {vocabulary[token]: token for token in special}

    def encode(text, special):
        if not special:
            return model.encode(text)
        pieces = enumerate(pattern.split(text))  # every second one is special
        return [i for n, piece in pieces if piece for i in ([vocabulary[piece]] if n % 2 else model.encode(piece))]

    def decode(ids):
        texts, run = [], []
        for i in (*ids, None):
            if i is None or i in names or i >= size:
                texts += [model.decode(run)] if run else []
                texts, run = texts + [names.get(i, "")], []
            else:
                run.append(i)
        return "".join(texts)

    bos, eos = ((i if i >= 0 else None) for i in (model.bos_id(), model.eos_id()))
    return vocabulary, special, encode, decode, bos, eos, True  # LlamaTokenizer's default


def _rank_file(path):
    """The tiktoken.Encoding of a file of "base64-token rank", with LLaMA-3's split pattern and special tokens."""
    try:  # not tiktoken's load_tiktoken_bpe, which answers from its cache when the file has changed
        with open(path, "rb") as f:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}
    except OSError as e:
        names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise SystemExit(f"error: encoding {path}: not one of {names}, and as a file or folder: {e.strerror}")
    except ValueError:
        ranks = {}
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or any(bytes([b]) not in ranks for b in range(256)):
        raise SystemExit(f'error: encoding {path}: expected lines "base64-token rank", ranks 0, 1, ..., and every byte')
    special = ["<|begin_of_text|>", "<|endoftext|>", *(f"<|reserved_{i}|>" for i in range(254))]  # LLaMA-3's places
    special = {token: n + i for i, token in enumerate(special)}
    return tiktoken.Encoding(path, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def _rank_tokenizer(encoding, folder):
    """As above, the special tokens by the names that the folder's settings or else LLaMA-3.1's give to their places."""
    first = encoding.n_vocab - 256
    names = {first + i: f"<|reserved_special_token_{i}|>" for i in range(256)}
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
             8: "eom_id", 9: "eot_id", 10: "python_tag"}
    names.update({first + place: f"<|{token}|>" for place, token in named.items()})
    names.update({i: token for token, i in _added_tokens(folder).items() if first <= i < first + 256})
    special = {token: i for i, token in names.items()}
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(first)}
    whole = tiktoken.Encoding(encoding.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(text, special):
        return whole.encode(text, allowed_special="all") if special else whole.encode_ordinary(text)

    return ranks | special, set(special), encode, whole.decode, first, first + 1, True, True


# -----------------------------------------------------------------------------
# what lies beside the vocabulary


def _library(name, path):
    try:
        return __import__(name)
    except ImportError:
        raise SystemExit(f"error: encoding {path}: reading it takes the {name} library: pip install {name}")


def _fetch(name):
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=FILES)
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise SystemExit(f"error: encoding {name}: no such file, and not fetched from the hub ({first_line(e)})")


def _settings(folder, file):
    """The JSON object in folder/file; {} if there is no such file."""
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8") as f:
            settings = json.load(f)
        if isinstance(settings, dict):
            return settings
        why = "not a JSON object"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        why = first_line(e)
    raise SystemExit(f"error: {path}: damaged ({why}); get it again")


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(folder):
    """{token: id} of what the settings add to a vocabulary that has no place for it."""
    listed = _settings(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    return _settings(folder, "added_tokens.json") | {_content(token): int(i) for i, token in listed.items()}


def _chat_template(folder, settings):
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "chat_template.jinja"),
                                                      encoding="utf-8") as f:
        return f.read()
    template = settings.get("chat_template")
    if isinstance(template, list):  # named ones, for tools or retrieval
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _compile(name, template):
    """A jinja2 template in the environment that transformers gives it: sandboxed, for it is a stranger's program."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, which only marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    # jinja2's own tojson escapes HTML
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as e:
        raise SystemExit(f"error: encoding {name}: its chat template is damaged: {first_line(e)}")
