"""
A checkpoint's tokenizer as a GGUF file says it.

llama.cpp has two kinds. "gpt2" is byte-level BPE: tokens in the letters of GPT-2's vocabulary, and
merges; what splits a text before them is a name, which is found by what it does to SAMPLE. "llama"
is sentencepiece's BPE: each token has a score, and of two neighbours those merge first whose union
has the highest. A tokenizer.json has merges instead; a union's score is the place of its merge.
"""

import json
import os
import re

from finetune.checkpoints.fields import read_json
from finetune.checkpoints.hf_tokenizer import SAMPLE, tokenizer_json
from finetune.checkpoints.tokenizer import get_tokenizer
from finetune.checkpoints.vocabularies import GPT2_SPLIT, LLAMA3_SPLIT, library
from run.text import first_line

SPACE = "\u2581"  # sentencepiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's types of tokens

# letters of one case, or of both, as the vocabularies of GPT-4o and Tekken cut words
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# llama.cpp's names of what splits a text, and the patterns that do so, one after the other
SPLITS = {
    "gpt-2": [GPT2_SPLIT],
    "smollm": [r"\p{N}", GPT2_SPLIT],
    "llama-bpe": [LLAMA3_SPLIT],
    "qwen2": [LLAMA3_SPLIT.replace("{1,3}", "")],
    "gpt-4o": [
        rf"{BEFORE}{UPPER}*{LOWER}+{SHORT}|{BEFORE}{UPPER}+{LOWER}*{SHORT}|\p{{N}}{{1,3}}|{REST}"
    ],
    "tekken": [rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{REST}"],
}
SPLIT_SAMPLE = SAMPLE + "camelCase HTTPServer WE'LL a//\n\n  b/\n\nเขาไป 12 ½ ²3"


def vocabulary(like, encoding, size):
    """{what gguf.GGUFWriter adds: value} of a tokenizer.

    like: a checkpoint directory. encoding: a tiktoken.Encoding, where there is none. size: the
    model's vocabulary, which has no fewer tokens. Raises ValueError for a tokenizer that llama.cpp
    does not have."""
    if like is None and encoding is None:
        raise ValueError("a GGUF file holds the tokenizer, and the run's is not at hand")
    try:
        if like is None:
            found = _of_json(tokenizer_json(encoding), encoding.name)
            special = {"eos_token_id": encoding.eot_token, "add_bos_token": False}
        else:
            enc = get_tokenizer(like)
            special = _special(enc)
            file = os.path.join(like, "tokenizer.json")
            if os.path.lexists(file):
                found = _of_json(read_json(like, "tokenizer.json"), file)
            else:
                found = _of_sentencepiece(os.path.join(like, "tokenizer.model"), enc)
    except SystemExit as e:  # what get_tokenizer cannot read
        raise ValueError(first_line(e).removeprefix("error: "))
    tokens = found["token_list"]
    if found["tokenizer_model"] == "llama" and "unk_token_id" in special:
        found["token_types"][special["unk_token_id"]] = UNKNOWN
    if len(tokens) > size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model's vocabulary {size}")
    # a vocabulary may be padded beyond the tokenizer's
    for i in range(len(tokens), size):
        tokens.append(f"[PAD{i}]")
        found["token_types"].append(UNUSED)
        if "token_scores" in found:
            found["token_scores"].append(0.0)
    return found | special


def _special(enc):
    """The tokens that have a use, by their ids, and the chat template."""
    found = {"eos_token_id": enc.eot_token, "add_bos_token": enc.add_bos_token}
    if enc.bos_token is not None:
        found["bos_token_id"] = enc.bos_token
    for kind in ("pad", "unk"):
        i = enc.vocabulary.get(enc.token_names.get(f"{kind}_token"))
        if i is not None:
            found[f"{kind}_token_id"] = i
    if enc.chat_template is not None:
        found["chat_template"] = enc.chat_template
    return found


# -----------------------------------------------------------------------------
# tokenizer.json


def _of_json(parts, where):
    """What a tokenizer.json's object says: tokens, types, and merges or scores."""
    tokenizer = library("tokenizers", where).Tokenizer.from_str(json.dumps(parts))
    model = parts["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{where}: is a {model.get('type')} tokenizer; a GGUF file here has BPE")
    before = parts.get("pre_tokenizer") or {}
    before = before.get("pretokenizers", [before])
    byte_level = any(part.get("type") == "ByteLevel" for part in before)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens, types = _listed(ids)
    for added in parts.get("added_tokens") or []:
        types[ids[added["content"]]] = CONTROL if added.get("special") else USER_DEFINED
    # a merge is "a b" in older files
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if byte_level and not merges:
        raise ValueError(f"{where}: has no merges, which llama.cpp asks for: text is bytes in it")
    if byte_level:
        return {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": _split_name(tokenizer, model, where),
            "token_list": tokens,
            "token_types": types,
            "token_merges": [" ".join(pair) for pair in merges],
        }

    if not model.get("byte_fallback"):
        raise ValueError(f"{where}: spells no bytes: llama.cpp has no such tokenizer")
    place = {}  # of the first merge that makes a token
    for a, b in merges:
        place.setdefault(a + b, len(place))
    scores = [-float(place.get(token, len(place))) for token in tokens]
    spelled = tokenizer.encode("x", add_special_tokens=False).tokens[0]
    return _sentencepiece(tokens, types, scores, spelled.startswith(SPACE))


def _listed(ids):
    """(tokens, types) by id; ids that no token has are unused."""
    tokens = [f"[PAD{i}]" for i in range(max(ids.values()) + 1)]
    types = [UNUSED] * len(tokens)
    for token, i in ids.items():
        tokens[i] = token
        types[i] = NORMAL
    return tokens, types


def _split_name(tokenizer, model, where):
    """llama.cpp's name for what splits a text before it is tokenised."""
    tokenizers = library("tokenizers", where)
    before = tokenizers.pre_tokenizers
    letters = before.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs = tokenizer.pre_tokenizer.pre_tokenize_str(SPLIT_SAMPLE)
    for name, patterns in SPLITS.items():
        cuts = [before.Split(tokenizers.Regex(p), "isolated") for p in patterns]
        if before.Sequence([*cuts, letters]).pre_tokenize_str(SPLIT_SAMPLE) == theirs:
            if name == "llama-bpe" and not model.get("ignore_merges"):
                return "dbrx"  # the same, but a whole piece is merged even if it is a token
            return name
    known = ", ".join(SPLITS)
    raise ValueError(f"{where}: splits text as none of those that are known to llama.cpp: {known}")


# -----------------------------------------------------------------------------
# sentencepiece


def _of_sentencepiece(path, enc):
    """What a sentencepiece model says, with the tokens that its folder adds to it."""
    sentencepiece = library("sentencepiece", path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception:  # RuntimeError, and OSError without an errno
        raise ValueError(f"{path}: no sentencepiece model; a GGUF file here takes tokenizer.json")
    tokens, types = _listed(enc.vocabulary)
    scores = [0.0] * len(tokens)
    for token in enc.special:
        types[enc.vocabulary[token]] = CONTROL
    for i in range(model.vocab_size()):
        scores[i] = model.get_score(i)
        if model.is_unknown(i):
            types[i] = UNKNOWN
    prefix = bool(model.encode("x", out_type=str)[0].startswith(SPACE))
    return _sentencepiece(tokens, types, scores, prefix)


def _sentencepiece(tokens, types, scores, space_prefix):
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
        elif types[i] == USER_DEFINED:  # which are sought in the text as it is
            tokens[i] = token.replace(SPACE, " ")
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_types": types,
        "token_scores": scores,
        "add_space_prefix": space_prefix,
    }
