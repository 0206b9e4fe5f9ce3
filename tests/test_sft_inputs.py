"""
Tests of what prepare_sft reads: parquet, data sets of the hub, weights, forms of chat records, and
what it says of them.
    python -m pytest tests/test_sft_inputs.py
"""

import collections
import datetime
import decimal
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from configurator import configure
from finetune import prepare_sft
from finetune.data import hub_data, inputs, preview
from finetune.data.conversations import conversations
from finetune.data.examples import Example, examples, take
from finetune.data.messages import messages_of
from run import counts
from run.encodings import get_encoding
from run.shards import open_shard
from tests.common import HERE, TINY_MODEL, refused, run
from tests.test_sft import CALL, TOOL_TEMPLATE, TOOLS, chat, message, with_template, write_lines

PLAIN = {"encoding": "bytes", "block_size": 63, "packing": False, "val_fraction": 0}


def make(input, out_dir, **settings):
    """prepare_sft with these settings, as its command line gives them."""
    settings = PLAIN | {"input": input, "out_dir": out_dir} | settings
    argv = [f"--{name}={value}" for name, value in settings.items()]
    prepare_sft.prepare_sft(configure(prepare_sft, argv=argv))


def texts_in(folder, part="train"):
    """How often each text is in a folder's one shard of bytes, a Counter."""
    [name] = [name for name in os.listdir(folder) if f"_{part}_" in name]
    shard = open_shard(f"{folder}/{name}")
    rows = shard.tokens.reshape(-1, shard.row).tolist()
    return collections.Counter(bytes(t for t in row if t < 256).decode() for row in rows)


def pairs(texts):
    return [{"prompt": text, "completion": "!"} for text in texts]


def write_parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, **options)


# -----------------------------------------------------------------------------
# parquet


def test_parquet_rows_are_records(tmp_path):
    texts = [f"é {i}" for i in range(600)]
    write_parquet(tmp_path / "a_b.parquet", pairs(texts), row_group_size=100)
    make(f"{tmp_path}/a_b.parquet", f"{tmp_path}/out")
    assert texts_in(tmp_path / "out") == collections.Counter(f"{text}!" for text in texts)
    assert "a-b_train_00000.bin" in os.listdir(tmp_path / "out")


def test_parquet_values_become_what_json_spells(tmp_path):
    row = {"n": decimal.Decimal("1.50"), "day": datetime.date(2024, 5, 1), "image": b"123",
           "nan": float("nan"), "none": None, "some": [{"a": None, "b": 1}, {"a": "x", "b": None}]}
    write_parquet(tmp_path / "x.parquet", [row])
    found = list(inputs.records_of(inputs.File(f"{tmp_path}/x.parquet", None)))
    assert found == [("row 1", {"n": "1.50", "day": "2024-05-01", "image": {"bytes": 3},
                                "some": [{"b": 1}, {"a": "x"}]})]
    refusal = refused(make, f"{tmp_path}/x.parquet", f"{tmp_path}/out", prompt="{image}",
                      completion="{n}")
    assert "no usable example" in refusal


BAD_PARQUET = [
    ("text.parquet", {}, "text.parquet: is no parquet file"),
    ("cut.parquet", {}, "cut.parquet: incomplete or damaged"),
    ("folder.parquet", {}, "is a folder"),
    ("whole.parquet", {"prompt": "{question}"}, "has no column completion, question; it has "
     "prompt, answer: name those by --prompt and --completion"),
    ("whole.parquet", {}, "has no column completion; nor has it messages or conversations"),
    ("whole.parquet,cut.parquet", {"completion": "{answer}"}, "cut.parquet: incomplete"),
]


@pytest.mark.parametrize("names, settings, why", BAD_PARQUET)
def test_parquet_that_cannot_be_used_is_one_line(tmp_path, names, settings, why):
    write_parquet(tmp_path / "whole.parquet", [{"prompt": "a", "answer": "b"}] * 99)
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "text.parquet").write_text('{"prompt": "a"}')
    (tmp_path / "folder.parquet").mkdir()
    input = ",".join(f"{tmp_path}/{name}" for name in names.split(","))
    assert why in refused(make, input, f"{tmp_path}/out", **settings)
    assert not os.path.exists(tmp_path / "out")


def test_damage_within_a_parquet_file_is_one_line(tmp_path):
    write_parquet(tmp_path / "x.parquet", pairs(map(str, range(999))), compression="zstd")
    whole = bytearray((tmp_path / "x.parquet").read_bytes())
    whole[40:400] = bytes(360)
    (tmp_path / "x.parquet").write_bytes(whole)
    assert "x.parquet: incomplete" in refused(make, f"{tmp_path}/x.parquet", f"{tmp_path}/out")


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    answer = refused(make, f"{tmp_path}/x.parquet", f"{tmp_path}/out", encoding="nothing")
    assert "x.parquet: reading .parquet takes pyarrow: pip install pyarrow" in answer


def test_zstandard_lines_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    lines = "".join(json.dumps(record) + "\n" for record in pairs("abc"))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    make(f"{tmp_path}/x.jsonl.zst", f"{tmp_path}/out")
    assert texts_in(tmp_path / "out") == {"a!": 1, "b!": 1, "c!": 1}


# -----------------------------------------------------------------------------
# several files, and weights


@pytest.fixture
def two(tmp_path):
    write_lines(tmp_path / "a.jsonl", pairs(f"a{i}" for i in range(10)))
    write_lines(tmp_path / "b.jsonl", pairs(f"b{i}" for i in range(20)))
    return f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"


def test_weights_repeat_and_draw(two, tmp_path, capsys):
    a, b = two
    make(f"{a}*2,{b}*0.5", f"{tmp_path}/out")
    found = texts_in(tmp_path / "out")
    assert [found[f"a{i}!"] for i in range(10)] == [2] * 10
    drawn = {text for text in found if text.startswith("b")}
    assert len(drawn) == 10 and found.total() == 30
    said = capsys.readouterr().out
    assert f"{a}: 20 examples taken of its 10, by weight 2\n" in said
    assert f"{b}: 10 examples taken of its 20, by weight 0.5\n" in said

    # the same again is the same; another seed draws others
    before = open_shard(tmp_path / "out/out_train_00000.bin").tokens.tobytes()
    make(f"{a}*2, {b}*.5", f"{tmp_path}/out")
    assert open_shard(tmp_path / "out/out_train_00000.bin").tokens.tobytes() == before
    make(f"{a}*2,{b}*0.5", f"{tmp_path}/other", seed=1)
    assert {text for text in texts_in(tmp_path / "other") if text[0] == "b"} != drawn

    # other weights in the same folder are said
    capsys.readouterr()
    make(f"{a}*1.5,{b}", f"{tmp_path}/out")
    said = capsys.readouterr().out
    assert "is replaced: it had weights=[2.0, 0.5], not [1.5, 1.0]" in said
    assert sorted(texts_in(tmp_path / "out").values()) == [1] * 25 + [2] * 5


def test_what_a_weight_takes():
    assert take([*"abcd"], 1.0, [1]) == [*"abcd"]
    assert take([*"abcd"], 2.0, [1]) == [*"abcdabcd"]
    half = take([*"abcd"], 0.5, [1])
    assert len(half) == 2 and half == sorted(half)
    assert take([*"abcd"], 1.5, [1]) == [*"abcd", *half]
    assert take([], 3.0, [1]) == []
    draws = {tuple(take([*"abcd"], 0.5, [1, i])) for i in range(20)}
    assert len(draws) > 3  # each input draws its own


def test_a_weighted_example_is_on_one_side_of_the_split(two, tmp_path):
    make(f"{two[0]}*3,{two[1]}", f"{tmp_path}/out", val_fraction=0.3)
    train = texts_in(tmp_path / "out")
    val = texts_in(tmp_path / "out", "val")
    assert not train & val and (train + val).total() == 50


ITEMS = [
    ("a.jsonl", ["a.jsonl"]),
    ("a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
    ("a.jsonl*2, b.jsonl", ["a.jsonl*2", "b.jsonl"]),
    ("x,y*2.jsonl,a.jsonl", ["x,y*2.jsonl", "a.jsonl"]),
    ("x,y*2.jsonl*3", ["x,y*2.jsonl*3"]),
    ("x,*.jsonl,?.jsonl*2", ["x,*.jsonl", "?.jsonl*2"]),
    ("hf:o/n:train*2,a.jsonl", ["hf:o/n:train*2", "a.jsonl"]),
]


@pytest.mark.parametrize("text, items", ITEMS)
def test_names_with_commas_and_stars_are_whole(tmp_path, monkeypatch, text, items):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "x,y*2.jsonl"):
        write_lines(tmp_path / name, pairs("a"))
    assert inputs.items_of(text) == items


def test_a_name_that_looks_weighted_is_a_file_if_it_is_there(tmp_path):
    assert inputs.weighted(f"{tmp_path}/a.jsonl*2") == (f"{tmp_path}/a.jsonl", 2.0)
    assert inputs.weighted(f"{tmp_path}/*.jsonl") == (f"{tmp_path}/*.jsonl", 1.0)
    write_lines(tmp_path / "a.jsonl*2", pairs("a"))
    assert inputs.weighted(f"{tmp_path}/a.jsonl*2") == (f"{tmp_path}/a.jsonl*2", 1.0)


BAD_INPUTS = [
    ("{}/a.jsonl*0", "the weight of {}/a.jsonl must be above 0 and at most 1,000"),
    ("{}/a.jsonl*-1", "must be above 0"),
    ("{}/a.jsonl*nan", "must be above 0"),
    ("{}/a.jsonl*1e9", "must be above 0 and at most 1,000"),
    ("{}/a.jsonl*two", "no such file, and 'two' is no weight: a number above 0"),
    ("{}/a.jsonl,", "has nothing beside a comma"),
    ("{}/a.jsonl,{}/none.jsonl", "none.jsonl: no such file"),
    ("{}/a.jsonl,{}/?.jsonl", "both have {}/a.jsonl; to take a file twice, write *2"),
    ("{}/x.pdf", "x.pdf: expected .json"),
    ("{}/x.txt", "is text, where records were expected"),
    ("owner/name", "no such file; a data set of the hub is named hf:owner/name"),
    ("hf:name", "a data set of the hub is named hf:owner/name"),
    ("hf:owner/name/a.parquet:train", "names files, and then a split: leave out one"),
    ("hf:owner/name:train:test", "a data set of the hub is named"),
    ("hf:owner/../name", "a data set of the hub is named"),
    ("", "--input is missing"),
]


@pytest.mark.parametrize("input, why", BAD_INPUTS)
def test_an_input_that_names_nothing_is_one_line(two, tmp_path, input, why):
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "x.txt").write_text("")
    answer = refused(make, input.replace("{}", str(tmp_path)), f"{tmp_path}/out")
    assert why.replace("{}", str(tmp_path)) in answer
    assert not os.path.exists(tmp_path / "out")


# -----------------------------------------------------------------------------
# the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub with data sets {"owner/name": {file: bytes}}."""

    served = {}
    asked = []
    commit = "0123456789" * 4

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        parts = path.removeprefix("/api").split("/")
        repo = "/".join(parts[2:4])
        files = self.served.get(repo)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if len(parts) > 5 and parts[5] not in ("main", self.commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            info = {"id": repo, "sha": self.commit, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(info).encode(), {})
        body = files.get("/".join(parts[6:]))
        if body is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, body, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": self.commit})

    do_HEAD = do_GET

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub is one on this machine, for processes that start from here on."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": f"{tmp_path}/hf", "HF_TOKEN": "",
                   "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Hub.asked.clear()
    Hub.served = {}
    yield server
    server.shutdown()
    server.server_close()


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def prepare(tmp_path, input, *more):
    settings = PLAIN | {"input": input, "out_dir": f"{tmp_path}/out"}
    return run("finetune.prepare_sft", *(f"--{k}={v}" for k, v in settings.items()), *more)


README = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files: socratic/*.jsonl
---
# A data set
"""


def test_a_data_set_of_the_hub_is_read_by_config_and_split(hub, tmp_path):
    write_parquet(tmp_path / "x", pairs("ab"))
    Hub.served["some/set_1"] = {
        "README.md": README,
        "main/train-00000-of-00002.parquet": (tmp_path / "x").read_bytes(),
        "main/train-00001-of-00002.jsonl.gz": gzip.compress(json_lines(pairs("c"))),
        "main/test-00000-of-00001.jsonl": json_lines(pairs("t")),
        "socratic/train.jsonl": json_lines(pairs("s")),
        "set_1.py": b"raise SystemExit('a program of the data set was run')",
    }
    code, out, err = prepare(tmp_path, "hf:some/set_1/main")
    assert code == 0, err
    assert texts_in(tmp_path / "out") == {"a!": 1, "b!": 1, "c!": 1}
    assert "hf:some/set_1/main: 2 files" in out and "set-1_train_00000.bin" in out
    assert not any("socratic" in path or "test-" in path for path in Hub.asked)

    # shards.json tells the files and the commit, and no folder of the cache
    entry = json.loads((tmp_path / "out/shards.json").read_bytes())["shards"]
    [entry] = entry.values()
    assert [source["path"] for source in entry["sources"]] == [
        "hf:some/set_1/main/train-00000-of-00002.parquet",
        "hf:some/set_1/main/train-00001-of-00002.jsonl.gz",
    ]
    assert entry["settings"]["commits"] == {"hf:some/set_1/main": Hub.commit}

    # without the hub, what the cache has is read
    hub.shutdown()
    hub.server_close()
    code, out, err = prepare(tmp_path, "hf:some/set_1/main")
    assert code == 0 and "the hub was not reached: its files are those in the cache" in out, err
    lines = refusals("hf:some/set_1/socratic", "hf:some/other")
    assert "error: hf:some/set_1/socratic: has no file socratic/*.jsonl" in lines[0]
    assert "error: hf:some/other: was not fetched, and is not in the cache: " in lines[1]


def refusals(*names):
    """The lines with which these inputs are refused, by a process of its own."""
    code = ("import sys\nfrom finetune.data.inputs import inputs_of\n"
            "for name in sys.argv[1:]:\n try: inputs_of(name)\n except SystemExit as e: print(e)")
    command = [sys.executable, "-c", code, *names]
    out = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
    lines = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(names)
    return lines


def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path):
    Hub.served["some/set"] = {"README.md": README, "main/train-0.jsonl": json_lines(pairs("a"))}
    Hub.served["some/bad"] = {"README.md": b"---\nconfigs: [3]\n---\n", "a.jsonl": b""}
    Hub.served["some/programs"] = {"set.py": b""}
    cases = [
        ("hf:some/programs", "has no .parquet, .jsonl, .json, .csv or .tsv"),
        ("hf:some/none", "hf:some/none: the hub has no such data set"),
        ("hf:some/set@v2", "has no revision v2"),
        ("hf:some/set", "has several configurations: main, socratic; name one: hf:some/set/main"),
        ("hf:some/bad", "its README.md has configs that are malformed"),
    ]
    for line, (name, why) in zip(refusals(*dict(cases)), cases):
        assert line.startswith(f"error: {name}: ") and why in line


FILES = ["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet",
         "extra/train_sft/0000.parquet", "extra/train_gen/0000.parquet"]
ONLY = ["a.jsonl", "b.csv.gz", "notes.txt"]
CONFIGS = {"a": {"train": ["data/train-*"], "test": ["data/test-*"]}, "b": {"x": ["extra/**"]}}
CHOICES = [  # files, configurations, the name, and what is chosen: names, or words of a refusal
    (FILES, {}, "hf:o/n:test", ["data/test-00000-of-00001.parquet"]),
    (FILES, {}, "hf:o/n/data", ["data/train-00000-of-00001.parquet"]),
    (FILES, {}, "hf:o/n@refs/convert/parquet/extra:train_sft", ["extra/train_sft/0000.parquet"]),
    (FILES, {}, "hf://datasets/o/n/data/*-0*.parquet", FILES[2:0:-1]),
    (FILES, {}, "hf:o/n/**/*.parquet", sorted(FILES[1:])),
    (FILES, {}, "hf:o/n/data:validation", "has no split validation, but train, test"),
    (FILES, {}, "hf:o/n/other", "has no configuration or folder other"),
    (FILES, {}, "hf:o/n/other.parquet", "has no file other.parquet; it has data/test"),
    (ONLY, {}, "hf:o/n", ["a.jsonl", "b.csv.gz"]),
    (ONLY, {}, "hf:o/n:test", "has no split test, and its files tell none: a.jsonl"),
    (["n.py"], {}, "hf:o/n", "try hf:o/n@refs/convert/parquet"),
    (FILES, CONFIGS, "hf:o/n", "several configurations: a, b; name one"),
    (FILES, CONFIGS, "hf:o/n/a", ["data/train-00000-of-00001.parquet"]),
    (FILES, CONFIGS, "hf:o/n/a:dev", "has no split dev, but train, test"),
    (FILES, CONFIGS, "hf:o/n/b", sorted(FILES[3:])),
    (FILES, CONFIGS, "hf:o/n/c", "has no configuration or folder c; it has its configurations: a"),
    (FILES, {"a": {"train": ["no/*"]}}, "hf:o/n", "has no file no/* that can be read"),
    (FILES, CONFIGS | {"default": {"test": ["data/test*"]}}, "hf:o/n", [FILES[2]]),
]


@pytest.mark.parametrize("files, configs, name, chosen", CHOICES)
def test_the_files_of_a_name_are_chosen(files, configs, name, chosen):
    asked = hub_data.wanted(name)
    if isinstance(chosen, list):
        assert hub_data.choose(sorted(files), configs, asked) == chosen
    else:
        with pytest.raises(ValueError) as e:
            hub_data.choose(sorted(files), configs, asked)
        assert chosen in str(e.value)


CARDS = [  # of a README's head, and its configurations
    (None, {}),
    ({"license": "mit"}, {}),
    ({"configs": [{"config_name": "a", "data_files": "x/*.csv", "default": True}]},
     {"a": {"train": ["x/*.csv"]}, "default": {"train": ["x/*.csv"]}}),
    ({"configs": [{"config_name": "a", "data_dir": "/d/", "data_files": {"dev": ["p", "q"]}}]},
     {"a": {"dev": ["d/p", "d/q"]}}),
    ({"configs": [{"config_name": "a", "data_dir": "d"}]}, {"a": {"train": ["d/**"]}}),
]


@pytest.mark.parametrize("card, configs", CARDS)
def test_a_readmes_configurations_are_read(card, configs):
    assert hub_data.configs_of(card) == configs


# -----------------------------------------------------------------------------
# chat records


SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "human", "value": "how many"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 films"},
    ],
}


def test_sharegpt_is_read_as_messages(chat, tmp_path):
    expected = [
        message("system", "Be brief."),
        message("user", "how many"),
        message("assistant", "") | {"tool_calls": [CALL]},
        message("tool", "3"),
        message("assistant", "3 films"),
    ]
    assert messages_of(SHAREGPT) == expected
    assert messages_of(SHAREGPT, {"system"}) == expected[1:]  # the template has its own place
    spelled = SHAREGPT | {"conversations": json.dumps(SHAREGPT["conversations"])}
    assert messages_of(spelled) == expected
    both = {"messages": expected, "tools": TOOLS}
    template = TOOL_TEMPLATE.replace(" if m.role != 'system'", "").replace("m.name", "'sum'")
    enc = get_encoding(with_template(chat, tmp_path, template))
    [found] = examples(enc, SHAREGPT)
    [same] = examples(enc, both)
    assert found.tokens.tolist() == same.tokens.tolist()
    assert found.flags.tolist() == same.flags.tolist()
    text = enc.decode(found.tokens.tolist())
    assert "<|start|>system\nBe brief.<|end|>" in text and json.dumps(TOOLS) in text


def test_a_chat_in_parquet_is_as_in_lines(chat, tmp_path, capsys):
    template = TOOL_TEMPLATE.replace(" if m.role != 'system'", "").replace("m.name", "'sum'")
    folder = with_template(chat, tmp_path, template)
    plain = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a"}]}
    write_parquet(tmp_path / "x.parquet", [SHAREGPT, plain, SHAREGPT])
    write_lines(tmp_path / "y.jsonl", [SHAREGPT, plain, SHAREGPT])
    settings = {"encoding": folder, "block_size": 255}
    for name in ("x.parquet", "y.jsonl"):
        make(f"{tmp_path}/{name}", f"{tmp_path}/{name[0]}", **settings)
    assert "not used" not in capsys.readouterr().out
    found = [open_shard(tmp_path / name).tokens.tolist()
             for name in ("x/x_train_00000.bin", "y/y_train_00000.bin")]
    assert found[0] == found[1]


def test_arguments_that_are_spelled_are_what_they_spell(chat, tmp_path):
    enc = get_encoding(with_template(chat, tmp_path, TOOL_TEMPLATE))
    function = CALL["function"]
    spelled = CALL | {"function": function | {"arguments": json.dumps(function["arguments"])}}
    texts = []
    for calls in ([CALL], [spelled], json.dumps([spelled])):
        said = message("assistant", None) | {"tool_calls": calls}
        [found] = examples(enc, {"messages": [message("user", "a"), said]})
        texts.append(enc.decode(found.tokens.tolist()))
    assert texts[0] == texts[1] == texts[2] and '"arguments": {"a": [1, 2]}' in texts[0]
    for bad in ("sum", ["sum"], {"a": 1}):
        said = message("assistant", "a") | {"tool_calls": bad}
        with pytest.raises(ValueError, match="tool_calls are no list"):
            examples(enc, {"messages": [message("user", "a"), said]})
    with pytest.raises(ValueError, match="function_call is no JSON"):
        messages_of({"conversations": [{"from": "function_call", "value": "sum"}]})


THINKING = """{%- for m in messages %}
    {{- '<|start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% endif %}"""


def test_a_template_like_qwen3s_makes_an_example_an_answer(chat, tmp_path, capsys):
    folder = with_template(chat, tmp_path, THINKING)
    enc = get_encoding(folder)
    said = [message("user", "a"), message("assistant", "b"), message("user", "c"),
            message("assistant", "d")]
    assert conversations(enc, said[:2]) == [[
        ("<|start|>user\na<|end|>\n<|start|>assistant\n", False),
        ("<think>\n\n</think>\n\nb<|end|>", True),
        ("\n", False),
    ]]
    assert conversations(enc, said) == [conversations(enc, said[:2])[0], [
        ("<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n<|start|>user\nc<|end|>\n"
         "<|start|>assistant\n", False),
        ("<think>\n\n</think>\n\nd<|end|>", True),
        ("\n", False),
    ]]
    write_lines(tmp_path / "x.jsonl", [{"messages": said}, {"messages": said[:2]}])
    make(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", encoding=folder, block_size=127)
    out = capsys.readouterr().out
    assert "x.jsonl: 1 conversations make an example for each answer" in out
    assert "3 examples to train on" in out


ENDED = """{%- for m in messages %}{{- '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% else %}{{- '<|pad|>' }}{% endif %}"""

LAST_ENDS_OTHERWISE = """{%- for m in messages %}
    {{- '<|start|>' + m.role + '\n' + m.content }}
    {{- '<|pad|>' if loop.last and m.role == 'assistant' else '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% endif %}"""


def test_a_template_like_phis_ends_the_whole_text_once(chat, tmp_path):
    enc = get_encoding(with_template(chat, tmp_path, ENDED))
    said = [message("user", "a"), message("assistant", "b"), message("user", "c"),
            message("assistant", "d")]
    [pieces] = conversations(enc, said)
    assert [text for text, counts in pieces if counts] == ["b<|end|>", "d<|end|>\n<|pad|>"]
    # a token that a last answer alone has is no such end: both ways the answer ends
    other = tmp_path / "other"
    other.mkdir()
    enc = get_encoding(with_template(chat, other, LAST_ENDS_OTHERWISE))
    found = conversations(enc, said)
    assert [[text for text, counts in pieces if counts] for pieces in found] == [
        ["b<|pad|>"], ["d<|pad|>"]]


# -----------------------------------------------------------------------------
# what is said


def example_of(enc, *parts):
    """An Example of [text, whether it counts]."""
    ids = [enc.encode_ordinary(text) for text, _ in parts]
    flags = [[int(counts)] * len(piece) for piece, (_, counts) in zip(ids, parts)]
    return Example(np.concatenate(ids), np.concatenate(flags).astype(np.uint8))


def test_what_counts_is_in_brackets(chat):
    for enc in (get_encoding("bytes"), get_encoding(chat)):
        found = example_of(enc, ("what film\n", False), (" é good", True), ("\n", False), ("x", 1))
        assert preview.marked(enc, found) == "what film\n[[ é good]]\n[[x]]"
        assert preview.marked(enc, found, preview.GREEN).count("\x1b[32m") == 2


def test_a_terminal_shows_what_counts_in_green(monkeypatch, capsys):
    enc = get_encoding("bytes")
    found = example_of(enc, ("a", False), ("b", True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    preview.show(enc, found, 1)
    assert "1 count in the loss, in green\n    a\x1b[32mb\x1b[0m\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    preview.show(enc, found, 1)
    assert "in [[ ]]\n    a[[b]]\n" in capsys.readouterr().out


def test_what_a_terminal_obeys_is_spelled():
    enc = get_encoding("bytes")
    found = example_of(enc, ("a\x1b[2J\tb\r\nc\x9b\xa0d", False), ("e\x00", True))
    assert preview.marked(enc, found) == "a\\x1b[2J\\tb\\r\nc\\x9b\\xa0d[[e\\x00]]"
    long = example_of(enc, ("a" * 5000, True))
    assert len(preview.marked(enc, long)) < 700
    assert " ... (4,400 characters) ... " in preview.marked(enc, long)


def test_examples_are_shown_of_each_input(two, tmp_path, capsys):
    make(two[1], f"{tmp_path}/one")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["--- example 1: 4 tokens; 2 count in the loss, in [[ ]]",
                        "    b0[[!<|endoftext|>]]"]
    assert sum(line.startswith("--- example") for line in said) == 3
    make(f"{two[0]},{two[1]}", f"{tmp_path}/both")
    said = capsys.readouterr().out
    assert "    a0[[" in said and "    b0[[" in said and "--- example 4" in said


def test_a_dry_run_says_all_and_writes_nothing(two, tmp_path, capsys):
    make(two[1], f"{tmp_path}/out", dry_run=True)
    said = capsys.readouterr().out
    assert "20 examples to train on: 90 tokens, of which 40 (44.4%) count in the loss" in said
    assert "wrote" not in said and not os.path.exists(tmp_path / "out")


def test_train_says_what_prepare_sft_said(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", pairs(f"a{i}" for i in range(40)) + [{"prompt": "no"}])
    make(f"{tmp_path}/a.jsonl", f"{tmp_path}/data", block_size=32, val_fraction=0.2)
    said = [line for line in capsys.readouterr().out.splitlines()
            if " examples to " in line or "left out of " in line]
    assert len(said) == 3 and "1 that make no example" in said[2]
    flags = [*TINY_MODEL, "--method=adamw", "--max_iters=1"]
    code, out, err = run("train.py", f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out",
                         *flags)
    assert code == 0, err
    before = out.partition("step 0: val loss")[0].splitlines()
    assert [line for line in before if line in said] == said

    # what is damaged is not said, and keeps no run from its data
    path = tmp_path / "data/shards.json"
    entries = json.loads(path.read_bytes())
    for entry in entries["shards"].values():
        entry["counts"]["tokens"] = "many"
    path.write_text(json.dumps(entries))
    assert counts.counts_in(str(tmp_path / "data")) == {}
    path.write_text("{")
    assert counts.counts_in(str(tmp_path / "data")) == {}
