"""
Checkpoints and tokenizers from elsewhere, and exports: a part of tests/test_faults.py.
    python -m pytest tests/test_faults_files.py
"""

import copy
import json
import os
import random
import shutil
import struct
import sys
from functools import partial

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from configurator import configure
from finetune import hf, welore
from finetune.checkpoints import chat, hf_files
from finetune.checkpoints.paths import is_hub_name
from finetune.checkpoints.tokenizer import get_tokenizer
from model import LLaMA, LLaMAConfig, QLinear
from run.checkpoint import load_model, starting_model
from run.data import Windows
from run.encodings import get_encoding
from run.shards import write_shard
from tests.common import TINY_RUN, refused, run, settings

# -----------------------------------------------------------------------------
# files that are not trusted


def tiny_checkpoint(path, **changes):
    """A Hugging Face directory of a tiny LLaMA on bytes."""
    shape = {"vocab_size": 257, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    config = LLaMAConfig(**(shape | {"ffn_dim": 48, "block_size": 64} | changes))
    model = LLaMA(config, partial(QLinear, bits=16))
    hf.save(model, str(path), dtype=torch.float32, encoding=get_encoding("bytes"))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_checkpoint(path)
    return str(path)


def load_all(path):
    """All that a checkpoint is read for."""
    hf.load(str(path), 16, torch.float32)
    encoding = get_tokenizer(str(path))
    encoding.decode(encoding.encode_ordinary("a b"))


def refusal(function, *args):
    """The line that a function ends with, or None if it does not."""
    try:
        function(*args)
    except (ValueError, SystemExit) as e:
        line = str(e)
        assert line and "\n" not in line and len(line) < 500, line
        return line
    return None


WRONG = [None, True, [], [None], {}, {"a\nb": [1]}, "x", "a\nb\ud800"]
WRONG += [-1, 0, 1.5, 10**12, 10**400]


def places(value, at=()):
    """The paths of what lies in a JSON value; of long objects and lists those at the top alone."""
    found = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in found:
        yield (*at, key)
        if isinstance(inner, (dict, list)) and len(inner) < 60:
            yield from places(inner, (*at, key))


def changed(value, place, new):
    """A JSON value with another one at a place in it."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


MORE_CONFIG = {
    "attention_bias": False, "low_rank": "", "layer_types": ["full_attention"] * 2,
    "quantization_config": {"quant_method": "qgalore", "bits": 8, "group_size": 32},
    "partial_rotary_factor": 1, "original_max_position_embeddings": 8, "is_causal": True,
    "use_sliding_window": True, "max_window_layers": 1, "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "hidden_activation": "gelu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2"])
def test_a_wrong_value_in_config_json_is_one_line(kind, value, checkpoint, tmp_path):
    name = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2", "qwen2": "Qwen2"}[kind]
    config = read_json(f"{checkpoint}/config.json") | MORE_CONFIG
    config |= {"model_type": kind, "architectures": [f"{name}ForCausalLM"]}
    for place in places(config):
        write_json(tmp_path / "config.json", changed(config, place, value))
        line = refusal(hf.settings, str(tmp_path))
        assert line is None or f"{tmp_path}/config.json" in line


TOKENIZER_CONFIG = {
    "bos_token": {"content": "a"}, "eos_token": "<|endoftext|>", "unk_token": "b",
    "add_bos_token": True, "added_tokens_decoder": {"256": {"content": "<|endoftext|>"}},
    "chat_template": [{"name": "default", "template": "x"}], "model_max_length": 10**30,
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: ascii(value)[:20])
def test_a_wrong_value_in_a_tokenizer_is_one_line(value, checkpoint, tmp_path):
    files = {
        "tokenizer.json": read_json(f"{checkpoint}/tokenizer.json"),
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "config.json": {"bos_token_id": 1, "eos_token_id": [256, 3]},
        "added_tokens.json": {"<|endoftext|>": 256},
    }
    for name, whole in files.items():
        for other, content in files.items():
            write_json(tmp_path / other, content)
        for place in places(whole):
            write_json(tmp_path / name, changed(whole, place, value))
            line = refusal(get_tokenizer, str(tmp_path))
            assert line is None or line.startswith(f"error: encoding {tmp_path}: ")


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff\xfe\xff", b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
])
def test_json_that_is_none_is_one_line(content, checkpoint, tmp_path):
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        path = tmp_path / name.removesuffix(".json")
        shutil.copytree(checkpoint, path)
        (path / name).write_bytes(content)
        assert f"{path}/{name}" in refusal(load_all, path)
    path = tmp_path / "index"
    shutil.copytree(checkpoint, path)
    os.unlink(path / "model.safetensors")
    (path / hf_files.INDEX).write_bytes(content)
    assert f"{path}/{hf_files.INDEX}" in refusal(load_all, path)


def test_damaged_tensor_files_are_one_line(checkpoint, tmp_path):
    """Cut short, a bit of the header flipped, a field of a tensor replaced."""
    path = tmp_path / "tiny"
    shutil.copytree(checkpoint, path)
    whole = (path / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]  # of the header
    header = json.loads(whole[8:end])
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(30)]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    odd = ["F64", "I64", [0, 4], [4, 0], [1, 1], [2**63, 2**64 - 1], [257, -32]]
    for value in [*WRONG, *odd]:
        for field in ("dtype", "shape", "data_offsets"):
            name = rng.choice([name for name in header if name != "__metadata__"])
            text = json.dumps(changed(header, (name, field), value)).encode()
            damaged.append(struct.pack("<Q", len(text)) + text + whole[end:])
    for content in damaged:
        (path / "model.safetensors").write_bytes(content)
        assert str(path) in refusal(hf.load, str(path), 16)


def sharded(checkpoint, path):
    """A copy in which an index names the one file; returns the index."""
    shutil.copytree(checkpoint, path)
    os.rename(path / "model.safetensors", path / "model-1.safetensors")
    names = hf_files.tensor_files(checkpoint)
    return {"weight_map": dict.fromkeys(names, "model-1.safetensors")}


@pytest.mark.parametrize("name", [
    "../tiny/model.safetensors", "{folder}/model.safetensors", "..", ".", "", "a\nb",
    "./model-1.safetensors", "sub/model.safetensors", "..\\model.safetensors", "C:model",
])
def test_an_index_leads_out_of_no_checkpoint(name, checkpoint, tmp_path):
    path = tmp_path / "copy"
    index = sharded(checkpoint, path)
    write_json(path / hf_files.INDEX, index)
    load_all(path)  # as it should be
    folder = os.path.dirname(checkpoint)
    key = "model.norm.weight"
    index["weight_map"][key] = name.format(folder=f"{folder}/tiny")
    write_json(path / hf_files.INDEX, index)
    line = refusal(load_all, path)
    assert hf_files.INDEX in line and key in line and "in the directory" in line


NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
         hf_files.INDEX, "chat_template.jinja"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_or_folder_in_a_files_place_is_said(name, make, checkpoint, tmp_path):
    path = tmp_path / "copy"
    index = sharded(checkpoint, path)
    if name != hf_files.INDEX:
        write_json(path / hf_files.INDEX, index)
    (path / name).unlink(missing_ok=True)
    make(path / name)
    words = {os.mkfifo: "no ordinary file", os.mkdir: "is a folder"}[make]
    line = refusal(load_all, path)
    assert str(path / name) in line and words in line
    # nor is it exported, and that is known before the work
    model = hf.load(checkpoint, 16)
    if name.startswith(("tokenizer", "chat")):
        line = refusal(hf.save, model, str(tmp_path / "out"), str(path))
        assert str(path / name) in line and words in line
        assert os.listdir(tmp_path) == ["copy"]


def test_links_out_of_a_checkpoint_are_not_exported(checkpoint, tmp_path):
    """But those that the hub's cache is made of are."""
    model = hf.load(checkpoint, 16)
    (tmp_path / "private").write_text("secret")
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "12ab"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(os.listdir(checkpoint)):
        shutil.copy(f"{checkpoint}/{name}", blobs / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / name)
    load_all(snapshot)
    hf.save(model, str(tmp_path / "out"), str(snapshot))
    assert get_tokenizer(str(tmp_path / "out")).eot_token == 256
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())

    for at, target in ((snapshot, "../../../private"), (checkpoint, str(tmp_path / "private"))):
        path = tmp_path / "copy"
        shutil.copytree(at, path, symlinks=True)
        if at == snapshot:
            path = snapshot
        os.symlink(target, path / "generation_config.json")
        line = refusal(hf.save, model, str(tmp_path / "no"), str(path))
        assert str(path / "generation_config.json") in line and "is a link to" in line
        shutil.rmtree(tmp_path / "copy")
    assert not os.path.exists(tmp_path / "no")


@pytest.mark.parametrize("key,value", [
    ("num_hidden_layers", 10**12), ("hidden_size", 10**9), ("intermediate_size", 10**9),
    ("vocab_size", 10**9), ("num_attention_heads", 10**9), ("head_dim", 10**9),
    ("num_hidden_layers", 900), ("hidden_size", 64), ("vocab_size", 300),
])
def test_a_model_that_the_files_do_not_hold_is_not_built(key, value, checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    config = read_json(path / "config.json")
    write_json(path / "config.json", config | {key: value})
    line = refusal(starting_model, settings(f"--init_from={path}", "--block_size=16"))
    assert key in line and str(value) in line and str(path) in line
    code, out, err = run("train.py", f"--init_from={path}", "--dry_run=True", "--block_size=16")
    assert code == 1 and err.strip() == line


TOO_MUCH = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '%9999999999s' | format('a') }}",
    "{{ 'x' * 2**25 }}",
    "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "{{ (" + "(" * 5000 + "1" + ")" * 5000 + ") }}",
]


@pytest.mark.skipif(chat.resource is None, reason="the system has no limits of memory")
@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_chat_template_has_limits(template, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(template)
    encoding = get_tokenizer(str(path))
    monkeypatch.setattr(chat, "SECONDS", 0.3 if "99999" in template else 60.0)
    line = refusal(encoding.render, [{"role": "user", "content": "a"}])
    assert line.startswith(f"error: encoding {path}: its chat template is damaged: ")
    # the next one is rendered all the same
    monkeypatch.setattr(chat, "SECONDS", 60.0)
    assert chat.render("{{ x }}", {"x": "fine"}) == "fine"


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no\nno') }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ 'a' + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__ }}", "{% for i in range(10**9) %}{% endfor %}",
])
def test_a_chat_template_that_raises_is_one_line(template):
    assert refusal(chat.render, template, {})


def test_a_fork_has_a_renderer_of_its_own():
    assert chat.render("{{ 1 + 1 }}", {}) == "2"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, chat.render("{{ 1 + 2 }}", {}).encode())
        os._exit(0)
    assert os.read(read, 9) == b"3"
    os.waitpid(pid, 0)
    assert chat.render("{{ 2 + 2 }}", {}) == "4"


def test_a_vocabulary_spells_letters(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    found = read_json(tmp_path / "c" / "tokenizer.json")
    vocabulary = found["model"]["vocab"]
    vocabulary["missing"] = vocabulary.pop("t")
    write_json(tmp_path / "c" / "tokenizer.json", found)
    assert "no token spells t: texts would lose" in refusal(get_tokenizer, str(tmp_path / "c"))


def test_a_checkpoint_that_does_not_fit_is_told_why(tmp_path):
    config = settings(*TINY_RUN).as_dict()
    model = LLaMA(LLaMAConfig(block_size=32, vocab_size=61, n_layer=1, n_head=2, n_embd=16))
    weights = model.state_dict()
    parts = {"format": 3, "optimizer": {}, "iter": 0, "position": 0}
    for encoding, word in ((5, "encoding is 5"), ("bytes", "Missing key(s)")):
        changed = config | {"encoding": encoding}
        torch.save(parts | {"config": changed, "model": weights}, tmp_path / "ckpt.pt")
        assert word in refused(load_model, str(tmp_path), "cpu")


# -----------------------------------------------------------------------------
# exports


def test_an_export_deletes_nothing_of_the_users(checkpoint, tmp_path):
    model = hf.load(checkpoint, 16)
    for name in ("out.tmp", f"out.qgalore-{os.getpid()}-0.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("years of work")
    before = sorted(os.listdir(tmp_path))
    hf.save(model, str(tmp_path / "out") + "/")
    welore.compress(checkpoint, str(tmp_path / "low"))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "low", "out"])
    assert all((tmp_path / name / "thesis").read_text() == "years of work" for name in before)


def fail(*args, **kwargs):
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("module,key", [(hf, "export"), (welore, "out")])
def test_a_place_that_cannot_be_written_is_said_first(module, key, checkpoint, tmp_path,
                                                      monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.symlink("nowhere", tmp_path / "link")
    monkeypatch.setattr(hf, "load_model", fail)
    monkeypatch.setattr(welore, "compress", fail)
    other = {"out": f"--model={checkpoint}", "export": f"--out_dir={checkpoint}"}[key]
    for place, word in (("file", "exists"), ("folder", "exists"), ("folder/", "exists"),
                        ("link", "exists"), ("file/x", "cannot be made")):
        s = configure(module, argv=[other, f"--{key}={tmp_path}/{place}"])
        line = refusal(module.main, s)
        assert line.startswith(f"error: {tmp_path}/{place}: {word}")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_welore_drops_no_tensor_and_asks_first(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer_config.json").mkdir()
    monkeypatch.setattr(welore, "settings", fail)
    assert "is a folder" in refusal(welore.compress, str(path), f"{tmp_path}/out")
    assert "exists" in refusal(welore.compress, checkpoint, str(path))
    monkeypatch.undo()
    (path / "tokenizer_config.json").rmdir()
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.layers.0.bias": torch.ones(3)}, path / "model.safetensors")
    assert "model.layers.0.bias" in refusal(welore.compress, str(path), f"{tmp_path}/out")


def test_an_export_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    model = hf.load(checkpoint, 16)
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    line = refusal(hf.save, model, str(tmp_path / "out"))
    assert "model.layers.1.mlp.up_proj.weight" in line and "not finite" in line
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = 1e5  # infinite in float16
    assert "not finite" in refusal(partial(hf.save, dtype=torch.float16), model, f"{tmp_path}/out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_files, "save_file", full)
    line = refusal(hf.save, model, str(tmp_path / "out"))
    assert str(tmp_path / "out") in line and "No space left" in line
    assert os.listdir(tmp_path) == []


def words_encoding():
    """A tiktoken.Encoding made by hand, with gaps between its special tokens."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"he", b"the", b" the", b"in", b"ing", b"12", b"\n\n", "é".encode()]
    ranks = {token: i for i, token in enumerate(tokens)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++|\s++$"
    pattern += r"|\s+(?!\S)|\s"
    special = {"<|endoftext|>": 270, "<|pad|>": 275}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


TEXTS = ["", "the thing in there, 12345 it's\n\n x  ", "<|endoftext|>", "$\n a$\r\n \t",
         "h\u00e9l\u00e0 \u65e5\u672c \U0001f642 \u3000x\u00a0"]


@pytest.mark.parametrize("make", [partial(get_encoding, "bytes"), words_encoding])
def test_an_export_of_a_run_from_scratch_has_its_tokenizer(make, tmp_path):
    from transformers import AutoTokenizer

    encoding = make()
    path = str(tmp_path / "out")
    model = LLaMA(LLaMAConfig(n_layer=1, n_embd=16, n_head=2, ffn_dim=8, vocab_size=320))
    hf.save(model, path, encoding=encoding)
    assert read_json(f"{path}/config.json")["eos_token_id"] == encoding.eot_token
    theirs = AutoTokenizer.from_pretrained(path)
    ours = get_tokenizer(path)
    assert theirs.eos_token_id == ours.eot_token == encoding.eot_token
    rng = random.Random(0)
    letters = "theing 12\n\r'.$\u00e9\u3000"
    more = ["".join(rng.choices(letters, k=20)) for _ in range(200)]
    for text in TEXTS + more:
        ids = encoding.encode_ordinary(text)
        assert theirs.encode(text, split_special_tokens=True) == ids
        assert ours.encode_ordinary(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.encode("the<|endoftext|>") == [*encoding.encode("the"), encoding.eot_token]


def test_an_export_without_its_tokenizer_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    model = hf.load(checkpoint, 16)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    hf.save(model, str(tmp_path / "out"), encoding=get_encoding("bytes"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no tokenizer" in out and "pip install tokenizers" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


# -----------------------------------------------------------------------------
# names of checkpoints


ODD_NAMES = ["tiny", "./tiny", "sub/tiny", "tiny/", "~/tiny", "{here}/tiny", "{here}/tiny/",
             "my tiny one", "[v1] tiny", "$HOME tiny", "#1", "it's \"tiny\"", "h\u00e9 \u65e5",
             "tiny*", "-tiny", "../up/tiny"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_checkpoint_may_lie_anywhere(name, checkpoint, tmp_path, monkeypatch, capsys):
    here = tmp_path / "up"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    name = name.format(here=here)
    shutil.copytree(checkpoint, os.path.expanduser(name))
    load_all(name)
    s = settings(f"--init_from={name}", "--block_size=16")
    fill = starting_model(s)
    model = LLaMA(LLaMAConfig(**hf.settings(hf.local(name))), partial(QLinear, bits=16), "meta")
    fill(model)
    assert get_encoding(s.encoding).eot_token == 256
    hf.main(configure(hf, argv=[f"--out_dir={name}", f"--export={name.rstrip('/')}-out/"]))
    load_all(f"{name.rstrip('/')}-out")
    argv = [f"--model={name}", f"--out={name.rstrip('/')}-low"]
    welore.main(configure(welore, argv=argv))
    load_all(f"{name.rstrip('/')}-low")


def test_a_run_starts_from_a_checkpoint_anywhere(checkpoint, tmp_path):
    def before():
        os.chdir(tmp_path)
        os.environ["HOME"] = str(tmp_path)

    shutil.copytree(checkpoint, tmp_path / "a b")
    args = ["--init_from=~/a b/", "--dry_run=True", "--block_size=16"]
    code, out, err = run("train.py", *args, before=before)
    assert code == 0, err


@pytest.mark.parametrize("name,is_one", [
    ("meta-llama/Llama-2-7b-hf", True), ("a/b", True), ("a.b/c_d", True), ("gpt2", False),
    ("a/b/c", False), ("a/b/", False), ("./a", False), ("../a", False), ("~/a", False),
    ("/a/b", False), ("a b/c", False), ("a/..", False), ("a/b..c", False), ("-a/b", False),
    ("h\u00e9/b", False), ("a\\b", False), ("", False),
])
def test_the_hub_is_asked_for_names_alone(name, is_one, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **options):
        asked.append(name)
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == is_one
    for function in (hf.load, get_tokenizer):
        assert refusal(function, name)
    assert asked == [name] * 2 * is_one

    # a file of that name is no checkpoint
    if name == "a/b":
        os.mkdir("a")
        (tmp_path / "a/b").write_text("")
        assert "is no directory" in refusal(hf.load, name)
        assert len(asked) == 2


def test_an_adapter_beside_the_weights_is_not_passed_over(checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    write_json(path / "adapter_config.json", {"peft_type": "LORA"})
    assert "merge it" in refusal(hf.load, str(path))


def test_welore_says_that_there_is_no_gpu(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [f"--model={checkpoint}", f"--out={tmp_path}/low", "--device=cuda"]
    assert "finds no CUDA GPU" in refusal(welore.main, configure(welore, argv=argv))


def test_a_token_that_no_row_uses_may_be_beyond_the_model(tmp_path):
    """As the pad token that a fine-tune adds to the tokenizer alone."""
    path = f"{tmp_path}/x_train_0.bin"
    write_shard(path, [1, 2, 3, 4, 5, 6, 7, 8], 10)
    windows = Windows(f"{tmp_path}/*_train_*.bin", block_size=4, vocab_size=9)
    windows.batch(1)
    write_shard(path, [1, 2, 3, 4, 5, 6, 7, 9], 10)
    line = refusal(Windows, f"{tmp_path}/*_train_*.bin", 4, 9)
    assert path in line and "vocab_size is 9" in line
