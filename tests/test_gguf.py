"""
Tests of finetune/checkpoints/gguf_model.py and gguf_tokenizer.py: models as files for llama.cpp.
    python -m pytest tests/test_gguf.py

transformers' own reader of such files is the judge, where it knows the architecture.
"""

import base64
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from configurator import configure
from finetune import hf
from finetune.checkpoints import gguf_model
from finetune.adapters import LoRA
from finetune.checkpoints.gguf_tokenizer import SPLIT_SAMPLE, SPLITS
from finetune.checkpoints.tokenizer import get_tokenizer
from finetune.checkpoints.vocabularies import GPT2_SPLIT
from model import LLaMA, QLinear
from run.encodings import get_encoding
from tests.common import refused, tiny
from tests.test_hf import FAMILY, MINISTRAL3, Floats, close, logits, saved, text

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# whose rows are whole blocks of 32, with a vocabulary that has all bytes
SIZES = dict(vocab_size=300, hidden_size=64, intermediate_size=96)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def byte_level(cuts=(), special=("<|start|>", "<|end|>", "<|endoftext|>"), merges=(), **more):
    """A byte-level tokenizer's object, whose text is split by these patterns, one after another."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    first = len(vocab)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges), **more))
    split = tokenizers.pre_tokenizers.Split
    steps = [split(tokenizers.Regex(cut), "isolated") for cut in cuts]
    steps.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(s, special=True) for s in special])
    bpe.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    assert bpe.token_to_id(special[0]) == first
    return bpe


def put_tokenizer(folder, bpe, **settings):
    """Give a checkpoint directory a tokenizer."""
    os.makedirs(folder, exist_ok=True)
    bpe.save(os.path.join(folder, "tokenizer.json"))
    names = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast"} | names | settings, f)
    return str(folder)


# of heads of 16 numbers, of which half turn
LONGROPE16 = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2, 3],
    "long_factor": [2.0, 4.5, 6, 9.25],
}
# what llama.cpp's code fixes: the scale of attention is by head_dim, every fourth layer has no RoPE
WHOLE = {
    "gemma 2": dict(query_pre_attn_scalar=16),
    "gemma 3": dict(
        query_pre_attn_scalar=16,
        final_logit_softcapping=None,
        num_hidden_layers=7,
        layer_types=[*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    ),
    "smollm 3": dict(no_rope_layer_interval=4, num_hidden_layers=5),
    "olmo 3": dict(num_hidden_layers=5, layer_types=None),
    "ministral 3": dict(
        rope_parameters=MINISTRAL3["rope_parameters"]
        | {"original_max_position_embeddings": 256, "mscale": 1.5}
    ),
    "phi 4 mini": dict(original_max_position_embeddings=256, rope_scaling=LONGROPE16),
}
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("12", "3"), ("Ċ", "Ċ"), ("i", "s")]


def checkpoint(tmp_path, kind="llama", **changes):
    """(transformers' model, its directory with a tokenizer)."""
    theirs, path = saved(tmp_path, kind, **SIZES | WHOLE.get(kind, {}) | changes)
    put_tokenizer(path, byte_level(merges=MERGES))
    return theirs, path


def read_back(file, **more):
    """transformers' model of a GGUF file."""
    folder, name = os.path.split(file)
    how = dict(attn_implementation="eager", dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **how, **more).eval()


def fields(file):
    """{name: value} of what a GGUF file says."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def arrays(file):
    """{name: (GGML type, float32 array)} of a GGUF file."""
    found = {}
    for t in gguf.GGUFReader(file).tensors:
        found[t.name] = t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)
    return found


# -----------------------------------------------------------------------------
# models

UNREAD = ("gemma", "ministral 3", "olmo 2", "olmo 3", "smollm 3")  # for which transformers has no reader
READ = [kind for kind in FAMILY if kind not in (*UNREAD, "gemma 2, bare")]
# of these transformers leaves in the file what the logits depend on
UNSAID = ("llama 3.1's rope", "linear rope", "yarn", "gemma 2", "gemma 3", "qwen 3", "phi")


@pytest.mark.parametrize("kind", READ)
def test_transformers_reads_the_same_logits(kind, tmp_path):
    theirs, path = checkpoint(tmp_path, kind)
    ours = hf.load(path, dtype=torch.float32, group_size=16)
    expected = logits(ours, text(length=5))  # within the window, where there is one
    more = {"config": theirs.config} if kind.startswith(UNSAID) else {}
    errors = {"f16": 2e-3}
    if kind in ("llama", "gemma 2"):
        errors["q8_0"] = 5e-2
    for weights, error in errors.items():
        file = str(tmp_path / f"{weights}.gguf")
        gguf_model.save(ours, file, weights, path)
        got = logits(read_back(file, **more), text(length=5))
        assert 0 < (got - expected).std() < error * expected.std()


NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("kind", UNREAD)
def test_tensors_put_back_by_hand_are_the_model(kind, tmp_path):
    """The first Gemma's norms are there with their 1, and SmolLM3's pairs are neighbours."""
    theirs, path = checkpoint(tmp_path, kind)
    ours = hf.load(path, 16, torch.float32)
    gguf_model.save(ours, str(tmp_path / "x.gguf"), "f16", path)
    state = {}
    for name, (_, array) in arrays(str(tmp_path / "x.gguf")).items():
        *layer, part, ending = name.split(".")
        at = f"model.layers.{layer[1]}." if layer else ""
        if kind == "gemma" and part.endswith("norm"):
            array = array - 1
        if kind in ("smollm 3", "ministral 3") and part in ("attn_q", "attn_k"):
            array = array.reshape(-1, 8, 2, 64).swapaxes(1, 2).reshape(array.shape)
        state[f"{at}{NAMES[part]}.{ending}"] = torch.tensor(array)
    expected = logits(theirs, text())
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    theirs.load_state_dict(state)
    assert 0 < (logits(theirs, text()) - expected).std() < 5e-3 * expected.std()
    said = fields(str(tmp_path / "x.gguf"))
    names = {"olmo 3": "olmo2", "ministral 3": "mistral3"}
    assert said["general.architecture"] == names.get(kind, kind.replace(" ", ""))


SERVE = """
import json, sys, urllib.request, xllamacpp
p = xllamacpp.CommonParams()
p.model.path = sys.argv[1]
p.n_ctx = 128
p.cpuparams.n_threads = 1
p.warmup = False
p.n_parallel = 1
server = xllamacpp.Server(p)
for path, body in json.load(sys.stdin):
    head = {"Content-Type": "application/json"}
    body = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, body, head)
    print(urllib.request.urlopen(request).read().decode(), flush=True)
"""


def llama_cpp(file, *requests):
    """What llama.cpp's server answers to (path, body)s, with this file."""
    args = [sys.executable, "-c", SERVE, file]
    result = subprocess.run(args, input=json.dumps(requests), capture_output=True, text=True)
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(requests), result.stderr
    return answers


# one of each architecture, with the fields that change what it computes
KINDS = ["llama 3.1's rope", "linear rope", "yarn", "mistral, no window", "ministral 3", "phi 3", "phi 4 mini",
         "qwen 2", "qwen 3", "smollm 3", "olmo 2", "olmo 3", "gemma", "gemma 2", "gemma 3"]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind, tmp_path):
    """Its tokens are ours, and its log-probabilities in float16."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    _, path = checkpoint(tmp_path, kind, max_position_embeddings=512)
    ours = hf.load(path, 16, torch.float32)
    file = str(tmp_path / "x.gguf")
    gguf_model.save(ours, file, "f16", path)
    prompts = [text(1, n, seed=n)[0].tolist() for n in (20, 40, 60)]
    asked = [["/tokenize", {"content": SPLIT_SAMPLE, "add_special": False, "parse_special": False}]]
    tokenizer = get_tokenizer(path)
    (letter,) = tokenizer.encode_ordinary("a")
    for prompt in prompts:
        # it is made to draw a letter: of half a character, or an end token, it tells nothing
        asked.append(["/completion", {"prompt": prompt, "n_predict": 1, "n_probs": 300,
                                      "temperature": 0, "logit_bias": [[letter, 100]]}])
    tokens, *completions = llama_cpp(file, *asked)
    assert tokens["tokens"] == tokenizer.encode_ordinary(SPLIT_SAMPLE)
    seen = 0
    for prompt, completion in zip(prompts, completions):
        expected = logits(ours, torch.tensor([prompt]))[0, -1].log_softmax(-1)
        (drawn,) = completion["completion_probabilities"]
        for token in drawn["top_logprobs"]:
            assert abs(token["logprob"] - expected[token["id"]]) < 0.06
            seen += 1
    assert seen == 3 * 300


@pytest.mark.parametrize("group_size", [0, 16])
def test_q8_0_is_int8_within_half_a_step(group_size, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "CHUNK", 64 * 7)  # seven rows at a time
    _, path = checkpoint(tmp_path, "qwen 2")
    ours = hf.load(path, dtype=torch.float32, group_size=group_size)
    file = str(tmp_path / "x.gguf")
    gguf_model.save(ours, file, like=path)
    found = arrays(file)
    for name, matrix in (("down", "down_proj"), ("gate", "gate_proj")):
        type_, array = found[f"blk.1.ffn_{name}.weight"]
        w = getattr(ours.blocks[1].mlp, matrix).float_weight().numpy()
        assert type_ == "Q8_0"
        blocks = w.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        wrong = np.abs(array.reshape(-1, 32) - blocks)
        assert (wrong <= step * 0.5 + 127 * step * 2.0**-11).all()  # and of the scale's float16
        assert wrong.max() > 0
    assert found["blk.0.attn_q.bias"][0] == "F32" and found["output_norm.weight"][0] == "F32"
    assert "output.weight" in found


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    _, path = checkpoint(tmp_path, hidden_size=64, intermediate_size=80)
    gguf_model.save(hf.load(path), str(tmp_path / "x.gguf"), like=path)
    found = arrays(str(tmp_path / "x.gguf"))
    assert found["blk.0.ffn_down.weight"][0] == "F16"
    assert found["blk.0.ffn_up.weight"][0] == "Q8_0"


def test_a_file_says_what_the_model_is(tmp_path):
    theirs, path = checkpoint(tmp_path, "gemma 2", query_pre_attn_scalar=16)
    gguf_model.save(hf.load(path), str(tmp_path / "x.gguf"), like=path)
    said = fields(str(tmp_path / "x.gguf"))
    expected = {
        "general.architecture": "gemma2",
        "general.file_type": 7,
        "gemma2.context_length": 64,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 16,
        "gemma2.attention.sliding_window": 6,
        "gemma2.attn_logit_softcapping": 3.0,
        "gemma2.final_logit_softcapping": 4.0,
        "gemma2.vocab_size": 300,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert expected.items() <= said.items()
    assert len(said["tokenizer.ggml.tokens"]) == 300
    assert "output.weight" not in arrays(str(tmp_path / "x.gguf"))  # tied


def test_ropes_are_in_the_file(tmp_path):
    theirs, path = checkpoint(tmp_path, "llama 3.1's rope")
    gguf_model.save(hf.load(path), str(tmp_path / "x.gguf"), like=path)
    _, factors = arrays(str(tmp_path / "x.gguf"))["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert close(plain / torch.tensor(factors), theirs.model.rotary_emb.inv_freq, 1e-6)
    assert factors.max() > 1.5

    theirs, path = checkpoint(tmp_path / "linear", "linear rope")
    gguf_model.save(hf.load(path), str(tmp_path / "y.gguf"), like=path)
    said = fields(str(tmp_path / "y.gguf"))
    assert said["llama.rope.scaling.type"] == "linear"
    assert said["llama.rope.scaling.factor"] == 2.5 and said["llama.rope.freq_base"] == 500.0


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path, capsys):
    _, path = checkpoint(tmp_path, "mistral")
    gguf_model.save(hf.load(path), str(tmp_path / "x.gguf"), like=path)
    assert fields(str(tmp_path / "x.gguf"))["llama.context_length"] == 7
    assert "context is 7 tokens" in capsys.readouterr().out


def test_adapters_are_merged_into_the_file(tmp_path):
    _, path = checkpoint(tmp_path)
    ours = hf.load(path, 16, torch.float32)
    for layer in ours.modules():
        if isinstance(layer, QLinear):
            layer.adapter = LoRA(layer.out_features, layer.in_features, rank=4, alpha=8.0)
            torch.nn.init.normal_(layer.adapter.b, std=0.1)
    gguf_model.save(ours, str(tmp_path / "x.gguf"), "f16", path)
    got = logits(read_back(str(tmp_path / "x.gguf")), text())
    assert close(got, logits(ours, text()), 0.05)


def test_a_file_is_made_some_rows_at_a_time(tmp_path, monkeypatch):
    sizes = dict(hidden_size=128, intermediate_size=256, vocab_size=400)
    _, path = checkpoint(tmp_path, **sizes)
    ours = hf.load(path, dtype=torch.float32, group_size=64, embed_bits=8)
    monkeypatch.setattr(gguf_model, "CHUNK", 128 * 16)
    with Floats(128 * 8) as floats:
        gguf_model.save(ours, str(tmp_path / "x.gguf"), like=path)
    assert 0 < floats.peak <= 3 * 128 * 16 * 4  # of 256 * 128 * 4 bytes of a matrix


@pytest.mark.parametrize("kind,changes,words", [
    ("gemma 2", dict(query_pre_attn_scalar=20), "attn_scale"),
    ("smollm 3", dict(no_rope_layer_interval=2), "nope_every is 2"),
    ("llama", dict(rope_parameters=LONGROPE16, head_dim=8), "has no RoPE of the kind longrope"),
    ("gemma 3", dict(num_hidden_layers=1, layer_types=["full_attention"]), "sliding_window is 0"),
    ("gemma 2, bare", {}, "attn_softcap is 0.0"),
    ("gemma", dict(hidden_act="silu"), "activation is 'silu'"),
    ("llama", dict(hidden_act="gelu"), "activation is 'gelu_erf'"),
    ("gemma", dict(tie_word_embeddings=False), "no place for the tensor lm_head.weight"),
    ("llama", dict(vocab_size=200), "267 tokens, the model's vocabulary 200"),
])
def test_what_llama_cpp_lacks_is_refused(kind, changes, words, tmp_path):
    _, path = checkpoint(tmp_path, kind, **changes)
    os.mkdir(tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        gguf_model.save(hf.load(path), str(tmp_path / "out/x.gguf"), like=path)
    assert os.listdir(tmp_path / "out") == []


def test_an_architecture_without_a_place_is_refused(tmp_path):
    model = LLaMA(tiny(architecture="MambaForCausalLM"))
    with pytest.raises(ValueError, match="MambaForCausalLM has no place in GGUF"):
        gguf_model.save(model, str(tmp_path / "x.gguf"), encoding=get_encoding("bytes"))


def test_values_beyond_float16_are_refused(tmp_path):
    _, path = checkpoint(tmp_path)
    ours = hf.load(path, 16, torch.float32)
    for value in (7e4, float("nan")):
        ours.embed.weight.data[2, 3] = value
        with pytest.raises(ValueError, match="token_embd"):
            gguf_model.save(ours, str(tmp_path / "x.gguf"), like=path)
    assert not os.path.exists(tmp_path / "x.gguf")


def test_the_command_line_says_what_is_wrong_at_once(tmp_path, monkeypatch):
    def said(*args):
        return refused(lambda: hf.main(configure(hf, argv=[*args])))

    file = str(tmp_path / "x.gguf")
    assert "--gguf=q8_0" in said(f"--export={file}", "--int8=True")
    assert "NAME.gguf" in said(f"--export={tmp_path}/x", "--gguf=f16")
    open(file, "w").close()
    assert "exists; name a new file" in said(f"--export={file}")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in said(f"--export={tmp_path}/y.gguf")


# -----------------------------------------------------------------------------
# tokenizers


def written(tmp_path, like=None, encoding=None, **fields):
    """A GGUF file with this tokenizer, of a tiny model."""
    file = str(tmp_path / "words.gguf")
    sizes = dict(n_layer=1, n_embd=32, n_head=2, n_kv_head=2, ffn_dim=32, vocab_size=600)
    gguf_model.save(LLaMA(tiny(**sizes | fields)), file, "f16", like, encoding)
    return file


def encodes_alike(tmp_path, like, file):
    """Whether transformers makes the same tokens by the file as we do by the folder."""
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=os.path.basename(file))
    ours = get_tokenizer(like)
    for t in (SPLIT_SAMPLE, "the  the\n\n\nthe 123<|end|> <think>x", "is", ""):
        ids = theirs(t, add_special_tokens=False).input_ids
        assert ids == ours.encode_with_special(t), t
    return theirs


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "dbrx"])
def test_transformers_encodes_alike_by_the_file(name, tmp_path):
    cuts = SPLITS["llama-bpe" if name == "dbrx" else name]
    bpe = byte_level(cuts, merges=MERGES, ignore_merges=name == "llama-bpe")
    like = put_tokenizer(tmp_path / "like", bpe)
    file = written(tmp_path, like)
    assert fields(file)["tokenizer.ggml.pre"] == name
    theirs = encodes_alike(tmp_path, like, file)
    assert theirs.eos_token == "<|end|>" and theirs.chat_template == TEMPLATE
    assert len(theirs) <= 600


def test_a_llama_2_tokenizer_has_scores(tmp_path, sentencepiece):
    """By its tokenizer.model, and by the tokenizer.json that is made of it."""
    like, whole = sentencepiece
    for i, folder in enumerate((like, whole)):
        (tmp_path / str(i)).mkdir()
        file = written(tmp_path / str(i), folder)
        said = fields(file)
        assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_bos_token"]
        assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, a byte
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(i), gguf_file="words.gguf")
        ours = get_tokenizer(folder)
        for t in (SPLIT_SAMPLE, "the film  is good", "a"):
            assert theirs(t, add_special_tokens=False).input_ids == ours.encode_ordinary(t)


def test_a_gemma_tokenizer_starts_no_text_with_a_space(tmp_path, sentencepiece):
    like, whole = sentencepiece
    vocab = get_tokenizer(like).vocabulary
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2} | {t: i for t, i in vocab.items() if i > 2}
    merges = get_json(whole)["model"]["merges"]
    tokenizer = GemmaTokenizer(vocab=vocab | {"<unk>": len(vocab)}, merges=list(map(tuple, merges)))
    tokenizer.add_tokens(["\u2581\u2581\u2581", "<unused1>"])
    tokenizer.save_pretrained(tmp_path / "gemma")
    gemma = dict(architecture="Gemma2ForCausalLM", activation="gelu", tie_embedding=True)
    gemma |= dict(post_norms=True, attn_softcap=50.0, logit_softcap=30.0)
    file = written(tmp_path, str(tmp_path / "gemma"), **gemma)
    said = fields(file)
    assert said["tokenizer.ggml.add_space_prefix"] is False
    assert "   " in said["tokenizer.ggml.tokens"]  # which is sought in the text as it is
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="words.gguf")
    ours = get_tokenizer(str(tmp_path / "gemma"))
    for t in ("the film  is good<unused1>", " is", "a 12\n\n", "日本"):
        assert theirs(t, add_special_tokens=False).input_ids == ours.encode_ordinary(t)


def get_json(folder):
    with open(os.path.join(folder, "tokenizer.json")) as f:
        return json.load(f)


def test_a_run_from_scratch_has_its_encoding_in_the_file(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b" th": 257, b"the": 258}
    special = {"<|endoftext|>": 259}
    pattern = GPT2_SPLIT.replace("+", "++").replace(r"\s++(?!\S)", r"\s+(?!\S)")
    mine = tiktoken.Encoding(
        "mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    file = written(tmp_path, encoding=mine)
    assert fields(file)["tokenizer.ggml.pre"] == "gpt-2"
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="words.gguf")
    ids = theirs("the  théor 12\n", add_special_tokens=False).input_ids
    assert ids == mine.encode_ordinary("the  théor 12\n")
    assert theirs.eos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="bytes: has no merges"):
        gguf_model.save(LLaMA(tiny(vocab_size=257)), file + "2", encoding=get_encoding("bytes"))


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    def said(bpe):
        with pytest.raises(ValueError) as e:
            written(tmp_path, put_tokenizer(tmp_path / "like", bpe))
        assert not (tmp_path / "words.gguf").exists()
        return str(e.value)

    assert "splits text as none of those" in said(byte_level(["[a-m]+|[^a-m]+"], merges=MERGES))
    bpe = byte_level(merges=MERGES)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert "spells no bytes" in said(bpe)
    vocab = [(letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([*vocab, ("<|end|>", 0.0)]))
    assert "is a Unigram tokenizer" in said(unigram)
    with pytest.raises(ValueError, match="holds the tokenizer"):
        written(tmp_path)
    (tmp_path / "ranks").mkdir()
    lines = [b"%s %d\n" % (base64.b64encode(bytes([b])), b) for b in range(256)]
    (tmp_path / "ranks/tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="takes tokenizer.json"):
        written(tmp_path, str(tmp_path / "ranks"))


@pytest.fixture
def sentencepiece(tmp_path):
    """A checkpoint's folder with a sentencepiece model, and the same as tokenizer.json."""
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    like = tmp_path / "like"
    like.mkdir()
    words = "the film is good a bad review of very long films who said that it was".split()
    lines = [" ".join(words[i % 13 : i % 13 + 3 + i % 4]) for i in range(200)]
    (like / "text").write_text("\n".join(lines))
    library.SentencePieceTrainer.train(
        input=str(like / "text"),
        model_prefix=str(like / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True}
    (like / "tokenizer_config.json").write_text(json.dumps(settings))

    # the same as tokenizer.json: a piece's merges stand where the piece stands
    model = library.SentencePieceProcessor(model_file=str(like / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for token in list(vocab)[3 + 256 :]:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(a, b) for a, b in cuts if a in vocab and b in vocab]
    whole = tmp_path / "whole"
    LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(whole)
    return str(like), str(whole)
