"""
Tests of finetune/hf.py, and of the LLaMA family in model.py.
    python -m pytest tests/test_hf.py

transformers makes tiny random models; what it computes is what we must compute.
"""

import copy
import json
import os
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import quant
import sample
from configurator import configure
from finetune import hf, welore
from finetune.checkpoints import hf_files
from finetune.adapters import LoRA
from finetune.checkpoints.architectures import ARCHITECTURES
from model import LLaMA, LLaMAConfig, QEmbedding, QLinear, plain_linear
from qgalore import QGaLore
from run.checkpoint import load_model, save_checkpoint

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    attn_implementation="eager",
)
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MINISTRAL3 = dict(
    head_dim=16,
    rope_parameters=YARN
    | {
        "original_max_position_embeddings": 24,
        "mscale": 1.5,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
)
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 3],
    "long_factor": [2.0, 4.5, 9.25],
}
GEMMA2 = dict(
    head_dim=16,
    sliding_window=6,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=4.0,
)
BARE_GEMMA2 = dict(
    head_dim=16,
    sliding_window=64,  # as long as the text: no layer slides
    query_pre_attn_scalar=16,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
GEMMA3 = dict(
    head_dim=16,
    sliding_window=6,
    query_pre_attn_scalar=20,
    final_logit_softcapping=4.0,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
)
OLMO3 = dict(
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": YARN | {"attention_factor": 1.3, "beta_fast": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
)
PHI4_MINI = dict(
    original_max_position_embeddings=24,
    partial_rotary_factor=0.5,
    rope_scaling=LONGROPE,
    tie_word_embeddings=True,
)
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
QWEN2_WINDOW = dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)
FAMILY = {
    "llama": (LlamaConfig, {}),
    "llama, tied, wide heads": (LlamaConfig, dict(tie_word_embeddings=True, head_dim=20)),
    "llama 3.1's rope": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "linear rope": (LlamaConfig, dict(rope_parameters=LINEAR)),
    "yarn": (LlamaConfig, dict(rope_parameters=YARN)),
    "mistral": (MistralConfig, dict(sliding_window=7, head_dim=16)),
    "mistral, no window": (MistralConfig, dict(sliding_window=None)),
    "ministral 3": (Ministral3Config, MINISTRAL3),
    "gemma": (GemmaConfig, dict(head_dim=16)),
    "gemma 2": (Gemma2Config, GEMMA2),
    "gemma 2, bare": (Gemma2Config, BARE_GEMMA2),
    "qwen 2": (Qwen2Config, {}),
    "qwen 2, window": (Qwen2Config, QWEN2_WINDOW),
    "qwen 3": (Qwen3Config, dict(head_dim=16)),
    "qwen 3, window": (Qwen3Config, QWEN2_WINDOW | dict(head_dim=16)),
    "gemma 3": (Gemma3TextConfig, GEMMA3),
    "olmo 2": (Olmo2Config, {}),
    "olmo 3": (Olmo3Config, OLMO3),
    "smollm 3": (SmolLM3Config, dict(no_rope_layer_interval=2)),
    "phi 3": (Phi3Config, {}),
    "phi 3, window": (Phi3Config, dict(sliding_window=7)),
    "phi 4 mini": (Phi3Config, PHI4_MINI),
}


def make(kind="llama", **changes):
    """transformers' model of that kind; its norms and biases are not what a new model has."""
    make_config, special = FAMILY[kind]
    torch.manual_seed(0)
    fields = copy.deepcopy(SIZES | special | changes)  # a config writes into its dicts
    model = AutoModelForCausalLM.from_config(make_config(**fields))
    model.float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape) * 0.3)
    return model


def saved(tmp_path, kind="llama", **changes):
    """(transformers' model, the directory that it is in)."""
    model = make(kind, **changes)
    path = str(tmp_path / "theirs")
    model.save_pretrained(path)
    return model, path


def read_back(path):
    """transformers' model of a directory that we made."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def text(batch=2, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (batch, length), generator=generator)


@torch.no_grad()
def logits(model, idx, **more):
    """Of transformers' model, or of ours."""
    if hasattr(model, "save_pretrained"):
        return model(idx).logits
    return model.logits(model.hidden(idx, **more))


def close(a, b, error=1e-4):
    return a.shape == b.shape and (a - b).abs().max() < error


# -----------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("kind", FAMILY)
def test_each_kind_gives_transformers_logits(kind, tmp_path):
    theirs, path = saved(tmp_path, kind)
    idx = text()
    expected = logits(theirs, idx)
    assert expected.std() > 0.1

    ours = hf.load(path, weight_bits=16, dtype=torch.float32)
    assert close(logits(ours, idx), expected)

    rounded = hf.load(path, dtype=torch.float32, group_size=16)
    assert 1e-4 < (logits(rounded, idx) - expected).std() < 0.05 * expected.std()

    bfloat16 = hf.load(path)
    assert bfloat16.embed.weight.dtype == torch.bfloat16
    assert bfloat16.norm.weight.dtype == torch.float32
    assert (logits(bfloat16, idx) - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", FAMILY)
def test_cached_tokens_get_the_logits_of_one_pass(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model = hf.load(path, 16, torch.float32)
    idx = text()
    caches = [{} for _ in model.blocks]
    got = []
    position = 0
    for n in (5, 1, 9, 1, 1, 7):
        part = idx[:, position : position + n]
        got.append(logits(model, part, caches=caches, position=position))
        position += n
    assert position == 24
    assert close(torch.cat(got, dim=1), logits(model, idx))


@pytest.mark.parametrize("kind", FAMILY)
def test_packed_documents_get_the_logits_of_each_alone(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model = hf.load(path, 16, torch.float32)
    texts = [text(1, 10, 1), text(1, 8, 2), text(1, 6, 3)]
    documents = torch.tensor([[0] * 10 + [1] * 8 + [2] * 6])
    packed = logits(model, torch.cat(texts, dim=1), documents=documents)
    alone = [logits(model, x) for x in texts]
    assert close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma 3", "smollm 3"])
def test_text_does_not_see_the_padding_at_its_left(kind, tmp_path):
    """Nor does it when it is continued in a cache."""
    _, path = saved(tmp_path, kind)
    model = hf.load(path, 16, torch.float32)
    idx = text(1, 12)
    padded = torch.cat([torch.zeros(4, dtype=torch.long), idx[0, :8]])
    rows = torch.stack([padded, text(1, 12, 5)[0]])
    documents = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    caches = [{} for _ in model.blocks]
    first = logits(model, rows, caches=caches, documents=documents)
    assert close(first[0, 4:], logits(model, idx[:, :8])[0])

    more = idx[:, 8:10].expand(2, -1)
    expected = logits(model, idx[:, :10])[0, 8:]
    for documents in (None, torch.ones(2, 2, dtype=torch.long)):  # None: the last one goes on
        copies = [dict(cache) for cache in caches]
        then = logits(model, more, caches=copies, position=12, documents=documents)
        assert close(then[0], expected)


def test_a_cached_prefix_of_one_row_is_shared_by_all_rows(tmp_path):
    _, path = saved(tmp_path, "mistral")
    model = hf.load(path, 16, torch.float32)
    prefix = text(1, 9, 1)
    rest = text(3, 6, 2)
    caches = [{} for _ in model.blocks]
    logits(model, prefix, caches=caches)
    got = logits(model, rest, caches=caches, position=9)
    whole = torch.cat([prefix.expand(3, -1), rest], dim=1)
    assert close(got, logits(model, whole)[:, 9:])


def test_in_a_full_cache_a_token_sees_block_size_keys(tmp_path):
    """The last ones, however many tokens come at once."""
    # one layer: later ones would see further back
    _, path = saved(tmp_path, max_position_embeddings=10, num_hidden_layers=1)
    model = hf.load(path, 16, torch.float32)
    idx = text(1, 40)
    got = []
    for cut in ([1] * 40, [4, 7, 1, 7, 21]):
        caches = [{} for _ in model.blocks]
        position = 0
        parts = []
        for n in cut:
            part = idx[:, position : position + n]
            parts.append(logits(model, part, caches=caches, position=position))
            position += n
        assert caches[0]["k"].shape[2] == 9  # and the next token's own
        got.append(torch.cat(parts, dim=1))
    assert close(*got)
    assert close(got[0][:, -1:], logits(model, idx[:, -10:])[:, -1:])


NORMED = ["qwen 3", "gemma 3", "olmo 2"]


@pytest.mark.parametrize("kind", ["gemma 2", "qwen 2", "smollm 3", "yarn", "olmo 3", *NORMED])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_transformers(kind, checkpointed, tmp_path):
    theirs, path = saved(tmp_path, kind)
    idx = text(2, 12)
    targets = text(2, 12, 1)
    loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    loss.backward()

    c = hf.settings(path) | {"checkpoint_activations": checkpointed}
    ours = LLaMA(LLaMAConfig(**c), plain_linear, "meta")
    hf.load_weights(ours, path)
    got = ours(idx, targets)
    got.backward()

    assert abs(got - loss) < 1e-5
    parameters = dict(theirs.named_parameters())
    for name, (module, part) in hf.hf_names(ours).items():
        expected = parameters[name].grad
        error = 1e-4 * (1 + expected.abs().max())
        assert close(getattr(module, part).grad, expected, error), name


def test_a_frozen_embedding_leaves_other_gradients_alone(tmp_path):
    _, path = saved(tmp_path, "gemma 2")
    gradients = []
    for frozen in (False, True):
        for checkpointed in (False, True):
            c = hf.settings(path) | {"checkpoint_activations": checkpointed}
            model = LLaMA(LLaMAConfig(**c), plain_linear, "meta")
            model.embed.requires_grad_(not frozen)
            hf.load_weights(model, path)
            assert model.embed.weight.requires_grad == (not frozen)
            assert model.head.weight is model.embed.weight
            model(text(), text(seed=1)).backward()
            assert (model.embed.weight.grad is None) == frozen
            gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
    assert all(close(g, gradients[0], 1e-5) for g in gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_embedding_is_its_own_values(tied, tmp_path, monkeypatch):
    """It and the head compute, and pass gradients on, as floats of the rounded values do."""
    _, path = saved(tmp_path, "gemma 2" if tied else "llama", tie_word_embeddings=tied)
    plain = hf.load(path, 8, torch.float32, group_size=16)
    coded = hf.load(path, 8, torch.float32, group_size=16, embed_bits=8)
    assert (coded.head is coded.embed) == tied
    assert not list(coded.embed.parameters())
    assert len({*coded.embed.buffers()}) == 3
    with torch.no_grad():
        assert close(plain.embed.weight, coded.embed.base_weight(), 0.05)
        plain.embed.weight.copy_(coded.embed.base_weight())
        plain.head.weight.copy_(coded.head.base_weight())
    expected = plain(text(), text(seed=1))
    expected.backward()

    # the head's 97 rows in one slice, and in several
    for rows in (QEmbedding.SLICE, 40):
        monkeypatch.setattr(QEmbedding, "SLICE", rows)
        assert close(logits(coded, text()), logits(plain, text()), 1e-5)
        loss = coded(text(), text(seed=1))
        loss.backward()
        assert abs(loss - expected) < 1e-5
        assert close(coded.norm.weight.grad, plain.norm.weight.grad, 1e-5)
        coded.norm.weight.grad = None

    # out, and back
    hf.save(coded, str(tmp_path / "int8"), int8=True)
    again = hf.load(str(tmp_path / "int8"), dtype=torch.float32, embed_bits=8)
    assert torch.equal(again.embed.q, coded.embed.q)
    assert torch.equal(logits(again, text()), logits(coded, text()))
    hf.save(coded, str(tmp_path / "float"), dtype=torch.float32)
    floats = hf.load(str(tmp_path / "float"), 16, torch.float32)
    assert close(logits(floats, text()), logits(coded, text()))


def test_sharded_checkpoints_load(tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(tmp_path.glob("theirs/*.safetensors"))) > 3
    ours = hf.load(str(tmp_path / "theirs"), 16, torch.float32)
    assert close(logits(ours, text()), logits(theirs, text()))


def test_checkpoints_of_transformers_4_load(tmp_path):
    """Their config.json has rope_theta and rope_scaling, and leaves out a class's defaults."""
    theirs, path = saved(tmp_path, "llama 3.1's rope")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = dict(rope_theta=10000.0, rope_scaling=scaling, rope_parameters=None, head_dim=None)
    edit(path, lambda c: c.update(old))
    assert close(logits(hf.load(path, 16, torch.float32), text()), logits(theirs, text()))
    assert hf.settings(path)["rope_scaling"] == "llama3 8.0 1.0 4.0 32"

    shutil.rmtree(path)
    theirs, path = saved(tmp_path, "gemma")
    edit(path, lambda c: c.pop("tie_word_embeddings"))
    edit(path, lambda c: c.update(hidden_act="gelu", hidden_activation=None))
    assert close(logits(hf.load(path, 16, torch.float32), text()), logits(theirs, text()))


def test_a_stored_tied_head_and_rope_buffers_are_passed_over(tmp_path):
    theirs, path = saved(tmp_path, tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change(path, add)
    ours = hf.load(path, 16, torch.float32)
    assert ours.head.weight is ours.embed.weight
    assert close(logits(ours, text()), logits(theirs, text()))


@pytest.mark.parametrize("kind", ["llama", "gemma 2"])
def test_a_head_of_its_own_is_not_dropped(kind, tmp_path):
    """What merges of adapters write: config.json says tied, and the file has another head."""
    _, path = saved(tmp_path, kind, tie_word_embeddings=True)
    head = torch.randn(97, 48)
    change(path, put(HEAD, head))
    theirs = read_back(path)
    ours = hf.load(path, 16, torch.float32)
    assert ours.head is not ours.embed and torch.equal(ours.head.weight, head)
    assert close(logits(ours, text()), logits(theirs, text()), 1e-3)

    # and it stays in what is made of it
    hf.save(ours, str(tmp_path / "again"), dtype=torch.float32)
    assert close(logits(read_back(tmp_path / "again"), text()), logits(theirs, text()), 1e-3)
    welore.compress(path, str(tmp_path / "low"))
    assert torch.equal(hf.load(str(tmp_path / "low"), 16, torch.float32).head.weight, head)

    # of another type, but the same: tied
    change(path, lambda t: t.update({EMBED: t[EMBED].bfloat16()}))
    change(path, lambda t: t.update({HEAD: t[EMBED].float()}))
    assert hf.load(path, 16, torch.float32).config.tie_embedding


def test_a_tied_embedding_may_be_stored_as_the_head(tmp_path):
    theirs, path = saved(tmp_path, tie_word_embeddings=True)
    change(path, lambda t: t.update({HEAD: t.pop(EMBED)}))
    assert close(logits(read_back(path), text()), logits(theirs, text()))
    ours = hf.load(path, 16, torch.float32)
    assert ours.head is ours.embed
    assert close(logits(ours, text()), logits(theirs, text()))
    low, *_ = welore.compress(path, str(tmp_path / "low"), keep=0.3)
    assert low and hf.load(str(tmp_path / "low"), 16).config.tie_embedding
    # but not where they are two
    edit(path, lambda c: c.update(tie_word_embeddings=False))
    refused(path, EMBED)


TANH = "gelu_pytorch_tanh"
T = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
OLD_ROPE = {"type": "linear", "factor": 3}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
SAID = [  # kind, what config.json says besides
    ("gemma", dict(hidden_act="gelu", hidden_activation="gelu")),
    ("gemma", dict(hidden_act=TANH, hidden_activation="gelu")),
    ("gemma", dict(hidden_act="silu", hidden_activation=TANH)),
    ("gemma 2", dict(hidden_act=TANH, hidden_activation="gelu")),
    ("gemma 2", dict(hidden_act="gelu", hidden_activation=TANH)),
    ("gemma 2", dict(hidden_act="relu", hidden_activation="silu")),
    ("llama", dict(hidden_act="gelu")),
    ("llama", dict(hidden_act="gelu_new")),
    ("qwen 2", dict(hidden_act="swish")),
    ("llama", dict(rope_parameters=LINEAR, rope_scaling=LLAMA3)),
    ("llama", dict(rope_parameters=LLAMA3, rope_scaling=LINEAR)),
    ("gemma 2", dict(rope_parameters=None, rope_scaling=OLD_ROPE, rope_theta=50)),
    ("llama", dict(rope_parameters={"rope_type": "default"}, rope_theta=50.0)),
    ("llama", dict(rope_parameters=T)),
    ("llama", dict(rope_parameters=LLAMA3, original_max_position_embeddings=16)),
    ("mistral", dict(layer_types=SLIDES[1:] + SLIDES[1:2])),
    ("mistral", dict(layer_types=SLIDES)),
    ("gemma 2", dict(layer_types=["full_attention"] * 3)),
    ("qwen 2, window", dict(layer_types=SLIDES)),
    ("qwen 2", dict(max_window_layers=0, layer_types=None)),
    ("llama", dict(sliding_window=3, query_pre_attn_scalar=3, final_logit_softcapping=1.0)),
    ("gemma 2", dict(query_pre_attn_scalar=3, rms_norm_eps=0.01)),
    ("gemma 3", dict(layer_types=None, sliding_window_pattern=2)),
    ("gemma 3", dict(layer_types=None)),
    ("gemma 3", dict(rope_parameters=None, rope_theta=90.0, rope_local_base_freq=20.0)),
    ("gemma 3", dict(rope_parameters=None, rope_scaling=OLD_ROPE | {"rope_type": "linear"})),
    ("gemma 3", dict(attn_logit_softcapping=1.0)),
    ("gemma 3", dict(final_logit_softcapping=None)),
    ("smollm 3", dict(no_rope_layers=[1, 1, 0])),
    ("smollm 3", dict(no_rope_layers=[0, 0, 0, 0])),
    ("smollm 3", dict(no_rope_layers=[1, 1, 1])),
    ("smollm 3", dict(no_rope_layers=None)),
    ("smollm 3", dict(sliding_window=3)),
    ("olmo 2", dict(rms_norm_eps=0.01, tie_word_embeddings=True)),
    ("phi 3", dict(original_max_position_embeddings=16)),
    ("phi 3", dict(partial_rotary_factor=0.5)),
    ("phi 3", dict(rope_parameters={"rope_theta": 70.0, "partial_rotary_factor": 0.5})),
    ("phi 4 mini", dict(rope_parameters=None, rope_scaling=LONGROPE, rope_theta=70.0)),
    ("phi 4 mini", dict(max_position_embeddings=4096)),
    ("yarn", dict(rope_parameters=YARN | {"beta_fast": 3, "beta_slow": 2, "factor": 1.5})),
    ("yarn", dict(rope_parameters=YARN | {"mscale": 2, "mscale_all_dim": 0.5})),
    ("yarn", dict(rope_parameters=None, rope_theta=70.0, rope_scaling=YARN)),
    ("ministral 3", dict(rope_parameters=None)),
    ("olmo 3", dict(layer_types=None)),
    ("olmo 3", dict(rope_parameters=None, rope_scaling=YARN, rope_theta=5e5)),
    ("qwen 3", dict(rope_theta=70.0, rope_parameters=None)),
    ("llama", dict(pretraining_tp=2, attention_dropout=0.5, rms_norm_eps=0.1)),
]


@pytest.mark.parametrize("kind,said", SAID)
def test_what_config_json_says_is_heard_as_transformers_does(kind, said, tmp_path):
    """Each key that changes the logits is honoured, or refused by its name."""
    _, path = saved(tmp_path, kind)
    edit(path, lambda c: c.update(said))
    try:
        ours = hf.load(path, 16, torch.float32)
    except ValueError as e:
        assert "order of sliding" in str(e) and said["layer_types"][1] != SLIDES[1]
        return
    assert close(logits(ours, text()), logits(read_back(path), text()))
    # and the export says the same
    hf.save(ours, str(tmp_path / "again"), like=path, dtype=torch.float32)
    assert close(logits(ours, text()), logits(read_back(tmp_path / "again"), text()))


@pytest.mark.parametrize(
    "kind,said,word",
    [
        ("smollm 3", dict(no_rope_layers=[0, 1, 1]), "no_rope_layers"),
        ("smollm 3", dict(use_sliding_window=True, sliding_window=3, layer_types=None), "order"),
        ("gemma 3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma 3", dict(rope_parameters={"sliding_attention": LINEAR}), "rope_type is linear"),
        ("phi 3", dict(rope_parameters={"rope_type": "longrope"}), "has no short_factor"),
        ("phi 3", dict(rope_parameters=YARN), "has no short_factor"),  # as transformers takes it
        ("phi 3", dict(rope_parameters={"partial_rotary_factor": 0.3}), "partial_rotary_factor"),
        ("phi 3", dict(rope_parameters={"partial_rotary_factor": 2}), "partial_rotary_factor"),
        ("phi 4 mini", dict(rope_scaling=LONGROPE | {"short_factor": [1, 2]}), "3 numbers above 0"),
        ("phi 4 mini", dict(rope_scaling=LONGROPE | {"long_factor": [1, 2, 0]}), "long_factor is"),
        ("phi 4 mini", dict(rope_scaling=LONGROPE | {"attention_factor": 1.5}), "attention_factor"),
        ("phi 4 mini", dict(rope_scaling=LONGROPE | {"factor": 2.0}), "factor is 2.0"),
        ("phi 4 mini", dict(original_max_position_embeddings=1), "original_max_position"),
        ("yarn", dict(rope_parameters=YARN | {"truncate": False}), "truncate"),
        ("yarn", dict(rope_parameters=YARN | {"mscale": -1.0}), "mscale"),
        ("yarn", dict(rope_parameters=YARN | {"rope_theta": 1}), "rope_theta"),
        ("yarn", dict(rope_parameters=YARN | {"beta_fast": 0}), "beta_fast"),
        ("phi 3", dict(num_key_value_heads=1), "qkv_proj.weight is [96, 48], expected [72, 48]"),
    ],
)
def test_what_a_kind_has_and_ours_does_not_is_refused(kind, said, word, tmp_path):
    _, path = saved(tmp_path, kind)
    edit(path, lambda c: c.update(said))
    refused(path, path, word)


def test_longrope_has_an_older_name(tmp_path):
    theirs, path = saved(tmp_path, "phi 4 mini")
    edit(path, lambda c: c.update(rope_parameters=None, rope_scaling=LONGROPE | {"type": "su"}))
    assert close(logits(hf.load(path, 16, torch.float32), text()), logits(theirs, text()))


@pytest.mark.parametrize("kind", ["phi 4 mini", "ministral 3"])
def test_a_model_ends_where_longer_texts_need_another(kind, tmp_path):
    theirs, path = saved(tmp_path, kind)
    assert hf.load(path).config.block_size == 24
    ours = LLaMA(LLaMAConfig(**hf.settings(path) | {"block_size": 64}), plain_linear, "meta")
    hf.load_weights(ours, path)
    idx = text(length=26)
    assert not close(logits(theirs, idx)[:, -1], logits(ours, idx)[:, -1])


VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
    patch_size=4, head_dim=8,
)


def that_sees(kind):
    """transformers' model with a part that sees images, and a text part of that kind."""
    make_config, special = FAMILY[kind]
    text_config = copy.deepcopy(SIZES | special)
    torch.manual_seed(0)
    if kind == "gemma 3":
        text_config["final_logit_softcapping"] = None  # of the text part alone
        config = Gemma3Config(
            text_config=make_config(**text_config).to_dict(), vision_config=VISION,
            mm_tokens_per_image=4,
        )
        return Gemma3ForConditionalGeneration(config).float().eval()
    config = Mistral3Config(
        text_config=make_config(**text_config).to_dict(),
        tie_word_embeddings=kind == "ministral 3",  # whatever its text part says
        vision_config=VISION | {"model_type": "pixtral"},
    )
    return Mistral3ForConditionalGeneration(config).float().eval()


@pytest.mark.parametrize("kind", ["gemma 3", "ministral 3", "mistral, no window"])
@pytest.mark.parametrize("names", ["of version 5", "of the hub"])
def test_of_a_model_that_sees_images_the_text_part_is_read(names, kind, tmp_path, capsys):
    theirs = that_sees(kind)
    path = str(tmp_path / "theirs")
    theirs.save_pretrained(path)
    assert any("vision_tower" in name for name in hf_files.tensor_files(path))
    if names == "of the hub":
        change(path, lambda t: [t.update({old_name(name): t.pop(name)}) for name in list(t)])
    ours = hf.load(path, 16, torch.float32)
    assert "images is left out" in capsys.readouterr().out
    assert close(logits(ours, text()), logits(theirs, text()))

    out = str(tmp_path / "ours")
    hf.save(ours, out, like=path, dtype=torch.float32)
    again = read_back(out)
    assert again.config.model_type == FAMILY[kind][0].model_type
    assert again.config.max_position_embeddings == 64
    assert close(logits(again, text()), logits(theirs, text()))


def test_a_text_part_of_another_kind_is_refused(tmp_path):
    path = str(tmp_path / "theirs")
    that_sees("ministral 3").save_pretrained(path)
    edit(path, lambda c: c["text_config"].update(model_type="qwen3"))
    refused(path, path, "text_config: model_type is qwen3, expected mistral or ministral3")


def old_name(name):
    """A tensor's name in the hub's own files of such models."""
    if name == HEAD:
        return "language_model." + name
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    theirs, path = saved(tmp_path)
    ours = hf.load(path, 16, torch.float32)
    file = os.path.join(path, "model.safetensors")
    with open(file, "r+b") as f:
        f.seek(4096)
        f.write(b"\0" * (os.path.getsize(file) - 4096))
    assert close(logits(ours, text()), logits(theirs, text()))


class Floats(TorchDispatchMode):
    """The largest sum of bytes of float matrices alive at once, of `size` elements or more."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.alive = {}  # {storage: its bytes}
        self.peak = 0

    def counts(self, t):
        if not isinstance(t, torch.Tensor) or t.device.type == "meta":
            return False
        return t.is_floating_point() and t.numel() >= self.size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in filter(self.counts, tree_leaves(out)):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.peak = max(self.peak, sum(self.alive.values()))
                weakref.finalize(storage, self.alive.pop, key, None)
        return out


def test_loading_into_int8_holds_one_float_matrix_at_a_time(tmp_path, monkeypatch):
    """The file's own; of which a few rows at a time are copied."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    _, path = saved(tmp_path, **sizes)
    monkeypatch.setattr(quant, "CHUNK", 128 * 16)
    with Floats(128 * 8) as floats:
        hf.load(path, dtype=torch.float32, group_size=64, embed_bits=8)
    largest = 256 * 128 * 4  # bytes of a matrix
    temporaries = 3 * 128 * 16 * 4  # of a block of rows
    assert floats.peak <= largest + temporaries + 10000


# -----------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("kind", FAMILY)
def test_an_exported_model_is_transformers_again(kind, tmp_path):
    theirs, path = saved(tmp_path, kind)
    ours = hf.load(path, dtype=torch.float32, group_size=16)
    out = str(tmp_path / "ours")
    hf.save(ours, out, like=path, dtype=torch.float32)
    assert hf.settings(out) == hf.settings(path)
    assert os.path.exists(os.path.join(out, "generation_config.json"))

    again = read_back(out)
    assert type(again) is type(theirs)
    assert close(logits(again, text()), logits(ours, text()))
    assert again.config.eos_token_id == 2
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = again.generate(text(1, 6), **how)
    expected = torch.cat(list(sample.generate(ours, text(1, 6), 12, temperature=0)), dim=1)
    assert torch.equal(got[:, 6:], expected)

    # with no `like`, in bfloat16
    hf.save(ours, str(tmp_path / "plain"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    assert not os.path.exists(tmp_path / "plain.tmp")
    stored = load_file(tmp_path / "plain/model.safetensors")
    assert ("lm_head.weight" in stored) == (not ours.config.tie_embedding)


@pytest.mark.parametrize("kind", ["llama", "gemma 2", "qwen 2", "phi 3"])
def test_int8_weights_go_out_and_come_back_bit_for_bit(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    ours = hf.load(path, dtype=torch.float32, group_size=0 if kind == "llama" else 16)
    out = str(tmp_path / "int8")
    hf.save(ours, out, int8=True)
    again = hf.load(out, dtype=torch.float32)  # its own group size

    state = ours.state_dict()
    other = again.state_dict()
    assert state.keys() == other.keys()
    assert state["blocks.0.attn.q_proj.q"].dtype == torch.int8
    for name, t in state.items():
        if kind == "gemma 2" and "norm" in name:  # 1 + (w - 1) may differ from w by its last bit
            assert close(t, other[name], 1e-6), name
        else:
            assert torch.equal(t, other[name]), name
    assert close(logits(ours, text()), logits(hf.load(out, 16, torch.float32), text()))

    # full-rank training may start from it, too
    plain = LLaMA(ours.config, plain_linear, "meta")
    hf.load_weights(plain, out)
    assert close(logits(ours, text()), logits(plain, text()))
    with pytest.raises(ValueError, match="not INT8"):
        hf.save(plain, str(tmp_path / "no"), int8=True)


def test_a_large_model_goes_out_in_shards(tmp_path, monkeypatch):
    theirs, path = saved(tmp_path)
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 30000)
    out = str(tmp_path / "ours")
    hf.save(hf.load(path, 16, torch.float32), out, dtype=torch.float32)
    sizes = [os.path.getsize(file) for file in tmp_path.glob("ours/model-*-of-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 32000
    assert close(logits(read_back(out), text()), logits(theirs, text()))
    assert close(logits(hf.load(out, 16, torch.float32), text()), logits(theirs, text()))


def test_adapters_are_merged_on_the_way_out(tmp_path):
    _, path = saved(tmp_path)
    ours = hf.load(path, 16, torch.float32)
    before = logits(ours, text())
    for layer in ours.modules():
        if isinstance(layer, QLinear):
            layer.adapter = LoRA(layer.out_features, layer.in_features, rank=4, alpha=8.0)
            torch.nn.init.normal_(layer.adapter.b, std=0.1)
    out = str(tmp_path / "ours")
    hf.save(ours, out, dtype=torch.float32)
    again = logits(read_back(out), text())
    assert close(again, logits(ours, text()))
    assert not close(again, before, 0.01)


ONE_OF_EACH = [kind for kind in FAMILY if "," not in kind and "rope" not in kind]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_tuned_model_of_each_kind_goes_to_transformers(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model = hf.load(path, dtype=torch.float32, group_size=16)
    optimizer = QGaLore(model, lr=0.01, rank=8)
    idx = text(4, 16)
    losses = []
    for _ in range(8):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3

    hf.save(model, str(tmp_path / "tuned"), like=path, dtype=torch.float32)
    assert close(logits(read_back(tmp_path / "tuned"), text()), logits(model, text()))


def test_one_of_each_architecture_is_here():
    kinds = {FAMILY[kind][0].model_type for kind in ONE_OF_EACH}
    assert kinds == {arch.kind for arch in ARCHITECTURES.values()}


def test_a_model_its_architecture_does_not_have_stays(tmp_path):
    sizes = dict(n_layer=1, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=16, vocab_size=10)
    model = LLaMA(LLaMAConfig(**sizes, qkv_bias=True))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no qkv_bias = True"):
        hf.save(model, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_overwritten(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        hf.save(hf.load(path), path)


def test_a_run_is_exported_by_the_command_line(tmp_path, capsys):
    """And load_model reads it, as it reads the run."""
    theirs, path = saved(tmp_path)
    ours = hf.load(path, dtype=torch.float32, group_size=16)
    method = {"method": "qgalore", "weight_bits": 8, "weight_group_size": 16, "encoding": path}
    method |= {"matmul": "float", "freeze_embedding": False, "embed_bits": 16}
    config = hf.settings(path) | method
    run = str(tmp_path / "run")
    os.makedirs(run)
    checkpoint = dict(config=config, model=ours.state_dict(), optimizer={}, iter=1, position=0)
    save_checkpoint(run, checkpoint)

    for int8, error in ((False, 0.5), (True, 1e-4)):
        out = str(tmp_path / f"out{int8}")
        args = [f"--out_dir={run}", f"--export={out}", f"--int8={int8}"]
        hf.main(configure(hf, argv=args))
        assert out in capsys.readouterr().out
        assert hf.settings(out) == hf.settings(path)
        model, name = load_model(out, "cpu", torch.float32, 16)
        assert name == out
        assert close(logits(model, text()), logits(ours, text()), error)

    model, name = load_model(run, "cpu")
    assert name == path
    assert torch.equal(logits(model, text()), logits(ours, text()))


# -----------------------------------------------------------------------------
# what cannot be read


def edit(path, how, name="config.json"):
    """Change the object in a JSON file of a checkpoint by the function `how`."""
    with open(os.path.join(path, name)) as f:
        found = json.load(f)
    how(found)
    with open(os.path.join(path, name), "w") as f:
        json.dump(found, f)


def change(path, how, name="model.safetensors"):
    """Change the tensors {name: tensor} of a checkpoint by the function `how`."""
    tensors = load_file(os.path.join(path, name))
    how(tensors)
    save_file(tensors, os.path.join(path, name), metadata={"format": "pt"})


def refused(path, *words):
    """Loading fails in one line that has these words."""
    with pytest.raises(ValueError) as caught:
        hf.load(path, 16, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key,value,word",
    [
        ("architectures", ["MambaForCausalLM"], "MambaForCausalLM"),
        ("architectures", None, "architecture none"),
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("is_causal", False, "is_causal"),
        ("model_type", "mistral", "model_type"),
        ("partial_rotary_factor", 0.0, "partial_rotary_factor"),
        ("rope_parameters", LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_parameters", LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor"),
        ("num_hidden_layers", 10**12, "num_hidden_layers"),
        ("num_hidden_layers", 4, "num_hidden_layers 4"),
        ("hidden_size", 10**9, "hidden_size"),
        ("hidden_size", 64, "hidden_size"),
        ("hidden_act", "relu", "relu"),
        ("rope_parameters", {"rope_type": "yarn"}, "has no factor"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0}, "dynamic"),
        ("rope_parameters", {"rope_type": "linear"}, "factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": "two"}, "config.json"),
        ("rope_parameters", {"rope_type": ["linear"]}, "rope_type is ['linear']"),
        ("rope_parameters", [1], "rope_par"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "RoPE"),
        ("quantization_config", {"quant_method": "gptq"}, "gptq"),
        ("hidden_size", None, "config.json"),
        ("hidden_size", "48", "config.json"),
        ("num_hidden_layers", 2.5, "num_hidden_layers"),
        ("head_dim", 7, "head"),
        ("num_key_value_heads", 3, "n_kv_head"),
        ("low_rank", "blocks.0.attn.q_proj=x", "config.json"),
    ],
)
def test_what_the_model_does_not_have_is_refused(key, value, word, tmp_path):
    _, path = saved(tmp_path)
    edit(path, lambda c: c.update({key: value}))
    refused(path, path, word)


def test_another_order_of_windows_is_refused(tmp_path):
    _, path = saved(tmp_path, "qwen 2", **QWEN2_WINDOW | dict(max_window_layers=1))
    refused(path, "order of sliding")
    edit(path, lambda c: c.pop("layer_types"))
    refused(path, "order of sliding")
    edit(path, lambda c: c.update(max_window_layers=3))
    assert hf.settings(path)["sliding_window"] == 0
    edit(path, lambda c: c.update(max_window_layers=0))
    assert hf.settings(path)["sliding_window"] == 5


def put(name, tensor):
    """A change that puts `tensor` under that name."""
    return lambda tensors: tensors.update({name: tensor})


UP = "mlp.up_proj.weight"
K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "damage,words",
    [
        (put("model.norm.weight", torch.ones(47)), ("model.norm.weight", "[47]", "[48]")),
        (put("lm_head.weight", torch.ones(48, 97)), ("lm_head.weight", "[48, 97]", "[97, 48]")),
        (put("lm_head.weight", torch.ones(97, 48).char()), ("lm_head.weight", "int8")),
        (put(f"model.layers.3.{UP}", torch.ones(80, 48)), (f"layers.3.{UP}",)),
        (put("model.layers.0.self_attn.q_proj.bias", torch.ones(48)), ("q_proj.bias", "no place")),
        (lambda t: t.pop(f"model.layers.1.{UP}"), (f"no tensor model.layers.1.{UP}",)),
        (lambda t: t[K_PROJ][3].fill_(torch.nan), ("k_proj.weight", "not finite")),
        (lambda t: t[EMBED][0, :1].fill_(-torch.inf), ("embed_tokens.weight", "not finite")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(damage, words, tmp_path):
    _, path = saved(tmp_path)
    change(path, damage)
    refused(path, path, *words)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    refused(str(tmp_path / "nowhere"), "nowhere", "neither a directory")
    os.makedirs(tmp_path / "empty")
    refused(str(tmp_path / "empty"), "config.json", "No such file")

    _, path = saved(tmp_path)
    file = os.path.join(path, "model.safetensors")
    with open(file, "rb") as f:
        whole = f.read()
    for part in (b"", whole[:6], whole[:1000], whole[:-1], whole + b"x", b"\xff" * 64):
        with open(file, "wb") as f:
            f.write(part)
        refused(path, file, "damaged")

    os.rename(file, os.path.join(path, "pytorch_model.bin"))
    refused(path, "no model.safetensors", ".bin")
    for config in (b"{", b"[]", b"\xff"):
        with open(os.path.join(path, "config.json"), "wb") as f:
            f.write(config)
        refused(path, "config.json", "JSON")


def test_indexes_that_do_not_tell_the_truth_are_refused(tmp_path):
    path = str(tmp_path / "theirs")
    index = "model.safetensors.index.json"
    make().save_pretrained(path, max_shard_size="40KB")
    shards = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))

    def list_norm_in(file):
        edit(path, lambda c: c["weight_map"].update({"model.norm.weight": file}), index)

    list_norm_in(shards[0])
    refused(path, index, "model.norm.weight", shards[0])
    list_norm_in("other.safetensors")
    refused(path, "other.safetensors", "missing")
    edit(path, lambda c: c["weight_map"].pop("model.norm.weight"), index)
    os.remove(os.path.join(path, shards[1]))
    refused(path, shards[1], "missing")
    edit(path, lambda c: c.pop("weight_map"), index)
    refused(path, index, "weight_map")


def test_int8_checkpoints_that_are_damaged_are_refused(tmp_path):
    _, path = saved(tmp_path)
    out = str(tmp_path / "int8")
    hf.save(hf.load(path, dtype=torch.float32, group_size=16), out, int8=True)
    name = "model.layers.0.mlp.up_proj"
    scale = f"{name}.scale"  # (80, 3)
    cases = (
        (lambda t: t.pop(scale), "no tensor"),
        (put(scale, torch.ones(80, 3).bfloat16()), "bfloat16"),
        (put(scale, torch.full((80, 3), torch.inf)), "not finite"),
        (put(scale, torch.ones(3)), "expected [80, None]"),
    )
    for damage, word in cases:
        shutil.copytree(out, tmp_path / "copy", dirs_exist_ok=True)
        change(str(tmp_path / "copy"), damage)
        refused(str(tmp_path / "copy"), name, word)
