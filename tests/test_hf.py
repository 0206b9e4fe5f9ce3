"""
Tests of hf.py and of the LLaMA family in model.py: tiny random models that transformers makes, and what it computes.
    python -m pytest test_hf.py
"""

import json
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config

from finetune import hf
import quant
from run.checkpoint import load_model, save_checkpoint
from model import LLaMA, LLaMAConfig, QEmbedding, QLinear, plain_linear

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0, attn_implementation="eager")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILY = {
    "llama": (LlamaConfig, {}),
    "llama, tied, wide heads": (LlamaConfig, dict(tie_word_embeddings=True, head_dim=20)),
    "llama 3.1's rope": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "linear rope": (LlamaConfig, dict(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5})),
    "mistral": (MistralConfig, dict(sliding_window=7, head_dim=16)),
    "mistral, no window": (MistralConfig, dict(sliding_window=None)),
    "gemma": (GemmaConfig, dict(head_dim=16)),
    "gemma 2": (Gemma2Config, dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=3.0,
                                   final_logit_softcapping=4.0)),
    "gemma 2, bare": (Gemma2Config, dict(head_dim=16, sliding_window=64, query_pre_attn_scalar=16,
                                         attn_logit_softcapping=None, final_logit_softcapping=None)),
    "qwen 2": (Qwen2Config, {}),
    "qwen 2, window": (Qwen2Config, dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
}


def make(kind="llama", **changes):
    """transformers' model of that kind, whose norms and biases are not what a new model has."""
    make_config, special = FAMILY[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(**SIZES | special | changes)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape) * 0.3)
    return model


def saved(tmp_path, kind="llama", **changes):
    model, path = make(kind, **changes), str(tmp_path / "theirs")
    model.save_pretrained(path)
    return model, path


def text(batch=2, length=24, seed=0):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, idx, **more):
    return model(idx).logits if hasattr(model, "save_pretrained") else model.logits(model.hidden(idx, **more))


def close(a, b, error=1e-4):
    return a.shape == b.shape and (a - b).abs().max() < error


# -----------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("kind", FAMILY)
def test_each_kind_of_checkpoint_gives_transformers_logits(kind, tmp_path):
    theirs, path = saved(tmp_path, kind)
    ours, idx = hf.load(path, weight_bits=16, dtype=torch.float32), text()
    expected = logits(theirs, idx)
    assert close(logits(ours, idx), expected) and expected.std() > 0.1
    rounded = logits(hf.load(path, dtype=torch.float32, group_size=16), idx)
    assert 1e-4 < (rounded - expected).std() < 0.05 * expected.std()
    bfloat16 = hf.load(path)
    assert bfloat16.embed.weight.dtype == torch.bfloat16 and bfloat16.norm.weight.dtype == torch.float32
    assert (logits(bfloat16, idx) - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", FAMILY)
def test_tokens_after_a_cached_prefix_get_the_logits_of_one_pass(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model, idx = hf.load(path, 16, torch.float32), text()
    whole, caches, got, position = logits(model, idx), [{} for _ in model.blocks], [], 0
    for n in (5, 1, 9, 1, 1, 7):
        got.append(logits(model, idx[:, position : position + n], caches=caches, position=position))
        position += n
    assert position == 24 and close(torch.cat(got, dim=1), whole)


@pytest.mark.parametrize("kind", FAMILY)
def test_packed_documents_get_the_logits_that_each_gets_alone(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model = hf.load(path, 16, torch.float32)
    a, b, c = text(1, 10, 1), text(1, 8, 2), text(1, 6, 3)
    documents = torch.tensor([[0] * 10 + [1] * 8 + [2] * 6])
    packed = logits(model, torch.cat([a, b, c], dim=1), documents=documents)
    assert close(packed, torch.cat([logits(model, x) for x in (a, b, c)], dim=1))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma 2"])
def test_text_padded_on_the_left_and_continued_in_a_cache_does_not_see_the_padding(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    model, idx = hf.load(path, 16, torch.float32), text(1, 12)
    rows = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), idx[0, :8]]), text(1, 12, 5)[0]])
    documents = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    caches = [{} for _ in model.blocks]
    first = logits(model, rows, caches=caches, documents=documents)
    assert close(first[0, 4:], logits(model, idx[:, :8])[0])
    more = idx[:, 8:].expand(2, -1)
    for given in (None, torch.ones(2, 2, dtype=torch.long)):  # not given, the last document goes on
        then = logits(model, more[:, :2], caches=caches, position=12, documents=given)
        if given is None:
            assert close(then[0], logits(model, idx[:, :10])[0, 8:])


def test_a_cached_prefix_of_one_row_is_shared_by_all_rows_after_it(tmp_path):
    _, path = saved(tmp_path, "mistral")
    model, prefix, rest = hf.load(path, 16, torch.float32), text(1, 9, 1), text(3, 6, 2)
    caches = [{} for _ in model.blocks]
    logits(model, prefix, caches=caches)
    got = logits(model, rest, caches=caches, position=9)
    assert close(got, logits(model, torch.cat([prefix.expand(3, -1), rest], dim=1))[:, 9:])


def test_in_a_full_cache_each_token_sees_the_last_block_size_keys_however_many_come_at_once(tmp_path):
    _, path = saved(tmp_path, max_position_embeddings=10, num_hidden_layers=1)  # one: later ones would see further back
    model, idx = hf.load(path, 16, torch.float32), text(1, 40)
    got = []
    for cut in ([1] * 40, [4, 7, 1, 7, 21]):
        caches, position, parts = [{} for _ in model.blocks], 0, []
        for n in cut:
            parts.append(logits(model, idx[:, position : position + n], caches=caches, position=position))
            position += n
        assert caches[0]["k"].shape[2] == 9  # and the next token's own
        got.append(torch.cat(parts, dim=1))
    assert close(*got) and close(got[0][:, -1:], logits(model, idx[:, -10:])[:, -1:])


@pytest.mark.parametrize("kind", ["gemma 2", "qwen 2", "llama, tied, wide heads"])
@pytest.mark.parametrize("bits", [16, 8])
def test_gradients_are_those_of_transformers_with_and_without_checkpointed_blocks(kind, bits, tmp_path):
    theirs, path = saved(tmp_path, kind)
    idx, targets = text(2, 12), text(2, 12, 1)
    loss = torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    c = hf.settings(path) | {"checkpoint_activations": bits == 8}
    ours = LLaMA(LLaMAConfig(**c), plain_linear, "meta")
    hf.load_weights(ours, path)
    got = ours(idx, targets)
    got.backward()
    assert abs(got - loss) < 1e-5
    named, wanted = dict(theirs.named_parameters()), hf.hf_names(ours)
    for name, (module, part) in wanted.items():
        assert close(getattr(module, part).grad, named[name].grad, 1e-4 * (1 + named[name].grad.abs().max())), name


def test_a_frozen_embedding_and_head_have_no_gradient_and_leave_the_others_theirs(tmp_path):
    _, path = saved(tmp_path, "gemma 2")
    gradients = []
    for frozen in (False, True):
        for checkpointed in (False, True):
            c = LLaMAConfig(**hf.settings(path) | {"checkpoint_activations": checkpointed})
            model = LLaMA(c, plain_linear, "meta")
            model.embed.requires_grad_(not frozen)
            hf.load_weights(model, path)
            assert model.embed.weight.requires_grad == (not frozen) and model.head.weight is model.embed.weight
            model(text(), text(seed=1)).backward()
            assert (model.embed.weight.grad is None) == frozen
            gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
    assert all(close(g, gradients[0], 1e-5) for g in gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_embedding_and_head_are_their_own_values_and_pass_the_gradient_on(tied, tmp_path, monkeypatch):
    """As a float model that has the rounded values, whether the head comes in one slice of rows or in several."""
    _, path = saved(tmp_path, "gemma 2" if tied else "llama", tie_word_embeddings=tied)
    plain = hf.load(path, 8, torch.float32, group_size=16)
    coded = hf.load(path, 8, torch.float32, group_size=16, embed_bits=8)
    assert (coded.head is coded.embed) == tied and not list(coded.embed.parameters())
    with torch.no_grad():
        assert close(plain.embed.weight, coded.embed.base_weight(), 0.05) and len({*coded.embed.buffers()}) == 3
        plain.embed.weight.copy_(coded.embed.base_weight()), plain.head.weight.copy_(coded.head.base_weight())
    expected = plain(text(), text(seed=1))
    expected.backward()
    for slice_ in (QEmbedding.SLICE, 40):  # of 97 rows
        monkeypatch.setattr(QEmbedding, "SLICE", slice_)
        assert close(logits(coded, text()), logits(plain, text()), 1e-5)
        loss = coded(text(), text(seed=1))
        loss.backward()
        assert abs(loss - expected) < 1e-5
        assert close(coded.norm.weight.grad, plain.norm.weight.grad, 1e-5)
        coded.norm.weight.grad = None
    hf.save(coded, str(tmp_path / "int8"), int8=True)
    again = hf.load(str(tmp_path / "int8"), dtype=torch.float32, embed_bits=8)
    assert torch.equal(again.embed.q, coded.embed.q) and torch.equal(logits(again, text()), logits(coded, text()))
    hf.save(coded, str(tmp_path / "float"), dtype=torch.float32)
    assert close(logits(hf.load(str(tmp_path / "float"), 16, torch.float32), text()), logits(coded, text()))


def test_sharded_checkpoints_load(tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(tmp_path.glob("theirs/*.safetensors"))) > 3
    ours = hf.load(str(tmp_path / "theirs"), 16, torch.float32)
    assert close(logits(ours, text()), logits(theirs, text()))


def test_checkpoints_of_transformers_4_load(tmp_path):
    """Whose config.json has rope_theta and rope_scaling, and leaves out what is the class's default."""
    theirs, path = saved(tmp_path, "llama 3.1's rope")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit(path, lambda c: c.update(rope_theta=10000.0, rope_scaling=scaling, rope_parameters=None, head_dim=None))
    assert close(logits(hf.load(path, 16, torch.float32), text()), logits(theirs, text()))
    assert hf.settings(path)["rope_scaling"] == "llama3 8.0 1.0 4.0 32"
    shutil.rmtree(path)
    theirs, path = saved(tmp_path, "gemma")
    edit(path, lambda c: (c.pop("tie_word_embeddings"), c.update(hidden_act="gelu", hidden_activation=None)))
    assert close(logits(hf.load(path, 16, torch.float32), text()), logits(theirs, text()))


def test_a_head_stored_although_it_is_tied_and_old_rope_buffers_are_passed_over(tmp_path):
    theirs, path = saved(tmp_path, tie_word_embeddings=True)
    change(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                     "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    ours = hf.load(path, 16, torch.float32)
    assert ours.head.weight is ours.embed.weight and close(logits(ours, text()), logits(theirs, text()))


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    theirs, path = saved(tmp_path)
    ours = hf.load(path, 16, torch.float32)
    file = os.path.join(path, "model.safetensors")
    with open(file, "r+b") as f:
        f.seek(4096)
        f.write(b"\0" * (os.path.getsize(file) - 4096))
    assert close(logits(ours, text()), logits(theirs, text()))


class Floats(TorchDispatchMode):
    """The largest sum of bytes of float matrices alive at once, of at least `size` elements each."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.peak = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.device.type != "meta" \
                    and t.numel() >= self.size and (key := t.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = t.untyped_storage().nbytes()
                self.peak = max(self.peak, sum(self.alive.values()))
                weakref.finalize(t.untyped_storage(), self.alive.pop, key, None)
        return out


def test_loading_into_int8_holds_one_float_matrix_at_a_time(tmp_path, monkeypatch):
    """The file's own; of which a few rows at a time are copied."""
    _, path = saved(tmp_path, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    monkeypatch.setattr(quant, "CHUNK", 128 * 16)
    with Floats(128 * 8) as floats:
        hf.load(path, dtype=torch.float32, group_size=64, embed_bits=8)
    assert floats.peak <= 256 * 128 * 4 + 3 * 128 * 16 * 4 + 10000  # the largest matrix, and a block's temporaries


# -----------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("kind", FAMILY)
def test_an_exported_model_is_transformers_again(kind, tmp_path):
    theirs, path = saved(tmp_path, kind)
    ours, out = hf.load(path, dtype=torch.float32, group_size=16), str(tmp_path / "ours")
    hf.save(ours, out, like=path, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert type(again) is type(theirs) and close(logits(again, text()), logits(ours, text()))
    assert again.config.eos_token_id == 2 and os.path.exists(os.path.join(out, "generation_config.json"))
    got = again.generate(text(1, 6), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = torch.cat(list(ours.generate(text(1, 6), 12, temperature=0)), dim=1)
    assert torch.equal(got[:, 6:], expected)
    assert hf.settings(out) == hf.settings(path)
    hf.save(ours, str(tmp_path / "plain"))  # with no `like`, in bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16 and not os.path.exists(tmp_path / "plain.tmp")
    assert ("lm_head.weight" in load_file(tmp_path / "plain/model.safetensors")) == (not ours.config.tie_embedding)


@pytest.mark.parametrize("kind", ["llama", "gemma 2", "qwen 2"])
def test_int8_weights_go_out_and_come_back_bit_for_bit(kind, tmp_path):
    _, path = saved(tmp_path, kind)
    ours, out = hf.load(path, dtype=torch.float32, group_size=16), str(tmp_path / "int8")
    hf.save(ours, out, int8=True)
    again = hf.load(out, dtype=torch.float32)  # its own group size
    state, other = ours.state_dict(), again.state_dict()
    gemma = kind.startswith("gemma")  # (1 + (w - 1) may differ from w by its last bit)
    assert state.keys() == other.keys() and state["blocks.0.attn.q_proj.q"].dtype == torch.int8
    assert all(torch.equal(t, other[name]) or gemma and "norm" in name and close(t, other[name], 1e-6)
               for name, t in state.items())
    assert close(logits(ours, text()), logits(hf.load(out, 16, torch.float32), text()))
    plain = LLaMA(ours.config, plain_linear, "meta")  # full-rank training may start from it, too
    hf.load_weights(plain, out)
    assert close(logits(ours, text()), logits(plain, text()))
    with pytest.raises(ValueError, match="not INT8"):
        hf.save(plain, str(tmp_path / "no"), int8=True)


def test_a_large_model_goes_out_in_shards(tmp_path, monkeypatch):
    theirs, path = saved(tmp_path)
    monkeypatch.setattr(hf, "_shard", 30000)
    hf.save(hf.load(path, 16, torch.float32), str(tmp_path / "ours"), dtype=torch.float32)
    sizes = [os.path.getsize(file) for file in tmp_path.glob("ours/model-*-of-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 32000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert close(logits(again, text()), logits(theirs, text()))
    assert close(logits(hf.load(str(tmp_path / "ours"), 16, torch.float32), text()), logits(theirs, text()))


def test_adapters_are_merged_on_the_way_out(tmp_path):
    _, path = saved(tmp_path)
    lora = {"method": "lora", "weight_bits": 16, "weight_group_size": 256, "rank": 4, "lora_alpha": 8.0}
    c = hf.settings(path) | lora
    ours = LLaMA.from_settings(c, "cpu", torch.float32, lambda model: hf.load_weights(model, path))
    before = logits(ours, text())
    for layer in ours.modules():
        if isinstance(layer, QLinear):
            torch.nn.init.normal_(layer.adapter.b, std=0.1)
    hf.save(ours, str(tmp_path / "ours"), dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert close(logits(again, text()), logits(ours, text())) and not close(logits(again, text()), before, 0.01)


def test_a_model_that_its_architecture_does_not_have_is_not_exported(tmp_path):
    model = LLaMA(LLaMAConfig(n_layer=1, n_embd=16, n_head=2, n_kv_head=2, ffn_dim=16, vocab_size=10, qkv_bias=True))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no qkv_bias = True"):
        hf.save(model, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_not_overwritten(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        hf.save(hf.load(path), path)


def test_a_run_is_exported_by_the_command_line_and_read_by_load_model(tmp_path, monkeypatch, capsys):
    theirs, path = saved(tmp_path)
    ours = hf.load(path, dtype=torch.float32, group_size=16)
    config = hf.settings(path) | {"method": "qgalore", "weight_bits": 8, "weight_group_size": 16, "encoding": path}
    run = str(tmp_path / "run")
    os.makedirs(run)
    save_checkpoint(run, {"config": config, "model": ours.state_dict(), "optimizer": {}, "iter": 1, "position": 0})
    for int8 in (False, True):
        out = str(tmp_path / f"out{int8}")
        for key, value in dict(out_dir="out", export="", int8=False).items():
            monkeypatch.setattr(hf, key, value)
        monkeypatch.setattr("sys.argv", ["hf.py", f"--out_dir={run}", f"--export={out}", f"--int8={int8}"])
        hf.main()
        assert out in capsys.readouterr().out and hf.settings(out) == hf.settings(path)
        model, name = load_model(out, "cpu", torch.float32, 16)
        assert name == out and close(logits(model, text()), logits(ours, text()), 1e-4 if int8 else 0.5)
    model, name = load_model(run, "cpu")
    assert name == path and torch.equal(logits(model, text()), logits(ours, text()))


# -----------------------------------------------------------------------------
# what cannot be read


def edit(path, how, name="config.json"):
    with open(os.path.join(path, name)) as f:
        found = json.load(f)
    how(found)
    with open(os.path.join(path, name), "w") as f:
        json.dump(found, f)


def change(path, how, name="model.safetensors"):
    tensors = load_file(os.path.join(path, name))
    how(tensors)
    save_file(tensors, os.path.join(path, name), metadata={"format": "pt"})


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        hf.load(path, 16, torch.float32)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("key,value,word", [
    ("architectures", ["MambaForCausalLM"], "MambaForCausalLM"), ("architectures", None, "architecture none"),
    ("attention_bias", True, "attention_bias"), ("mlp_bias", True, "mlp_bias"), ("hidden_act", "relu", "relu"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "yarn"),
    ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0}, "dynamic"),
    ("rope_parameters", {"rope_type": "longrope"}, "longrope"), ("rope_parameters", {"rope_type": "linear"}, "factor"),
    ("rope_parameters", {"rope_type": "linear", "factor": "two"}, "config.json"), ("rope_parameters", [1], "rope_par"),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "RoPE"),
    ("quantization_config", {"quant_method": "gptq"}, "gptq"), ("hidden_size", None, "config.json"),
    ("hidden_size", "48", "config.json"), ("num_hidden_layers", 2.5, "n_layer"), ("head_dim", 7, "head"),
    ("num_key_value_heads", 3, "n_kv_head"),
])
def test_configurations_that_the_model_does_not_have_are_refused_in_one_line(key, value, word, tmp_path):
    _, path = saved(tmp_path)
    edit(path, lambda c: c.update({key: value}))
    refused(path, path, word)


def test_an_order_of_windows_that_the_model_does_not_have_is_refused(tmp_path):
    _, path = saved(tmp_path, "qwen 2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    refused(path, "order of sliding")
    edit(path, lambda c: c.pop("layer_types"))
    refused(path, "order of sliding")
    edit(path, lambda c: c.update(max_window_layers=3))
    assert hf.settings(path)["sliding_window"] == 0
    edit(path, lambda c: c.update(max_window_layers=0))
    assert hf.settings(path)["sliding_window"] == 5


@pytest.mark.parametrize("damage,words", [
    (lambda t: t.update({"model.norm.weight": torch.ones(47)}), ("model.norm.weight", "[47]", "[48]")),
    (lambda t: t.update({"lm_head.weight": torch.ones(48, 97)}), ("lm_head.weight", "[48, 97]", "[97, 48]")),
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ("no tensor model.layers.1.mlp.up_proj.weight",)),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(80, 48)}), ("layers.3.mlp.up_proj.weight",)),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), ("q_proj.bias", "no place")),
    (lambda t: t["model.layers.2.self_attn.k_proj.weight"][3].fill_(torch.nan), ("k_proj.weight", "not finite")),
    (lambda t: t["model.embed_tokens.weight"][0, :1].fill_(-torch.inf), ("embed_tokens.weight", "not finite")),
    (lambda t: t.update({"lm_head.weight": torch.ones(97, 48, dtype=torch.int8)}), ("lm_head.weight", "int8")),
])
def test_tensors_that_do_not_fit_are_refused_in_one_line(damage, words, tmp_path):
    _, path = saved(tmp_path)
    change(path, damage)
    refused(path, path, *words)


def test_files_that_are_missing_or_damaged_are_refused_in_one_line(tmp_path):
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


def test_indexes_that_do_not_tell_the_truth_are_refused_in_one_line(tmp_path):
    path, index = str(tmp_path / "theirs"), "model.safetensors.index.json"
    make().save_pretrained(path, max_shard_size="40KB")
    shards = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    edit(path, lambda c: c["weight_map"].update({"model.norm.weight": shards[0]}), index)
    refused(path, index, "model.norm.weight", shards[0])
    edit(path, lambda c: c["weight_map"].update({"model.norm.weight": "other.safetensors"}), index)
    refused(path, "other.safetensors", "missing")
    edit(path, lambda c: c["weight_map"].pop("model.norm.weight"), index)
    os.remove(os.path.join(path, shards[1]))
    refused(path, shards[1], "missing")
    edit(path, lambda c: c.pop("weight_map"), index)
    refused(path, index, "weight_map")


def test_int8_checkpoints_that_are_damaged_are_refused_in_one_line(tmp_path):
    _, path = saved(tmp_path)
    out = str(tmp_path / "int8")
    hf.save(hf.load(path, dtype=torch.float32, group_size=16), out, int8=True)
    name = "model.layers.0.mlp.up_proj"
    for damage, word in ((lambda t: t.pop(f"{name}.scale"), "no tensor"),
                         (lambda t: t.update({f"{name}.scale": torch.ones(80, 3).bfloat16()}), "bfloat16"),
                         (lambda t: t.update({f"{name}.scale": torch.full((80, 3), torch.inf)}), "not finite"),
                         (lambda t: t.update({f"{name}.scale": torch.ones(3)}), "expected [80, None]")):
        shutil.copytree(out, tmp_path / "copy", dirs_exist_ok=True)
        change(str(tmp_path / "copy"), damage)
        refused(str(tmp_path / "copy"), name, word)
