"""
prepare_c4.py, from a hub on this machine and from files:
    python -m pytest test_prepare.py
"""

import base64
import contextlib
import glob
import gzip
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

import prepare_c4
from prepare_c4 import get_encoding, prepare, read_shard, write_shard
from tests.common import HERE

EOT = 256  # of encoding=bytes


def prepare_c4_command(*args, **env):
    command = [sys.executable, os.path.join(HERE, "prepare_c4.py"), "--encoding=bytes", *args]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children are born deaf to it
    return subprocess.Popen(command, env={**os.environ, **env}, preexec_fn=listen, **streams)


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def as_tokens(texts):
    return [token for text in texts for token in [*text.encode(), EOT]]


def contents(path):
    with open(path, "rb") as f:
        return f.read()


def test_c4_comes_from_the_hub_and_its_shards_have_exactly_these_bytes(tmp_path):
    train, val, asked = ["One café.\n", "Two."], ["Three <|endoftext|>"], []
    served = {"train.00000-of-01024": train, "validation.00000-of-00008": val}
    served = {name: gzip.compress(lines_of(texts)) for name, texts in served.items()}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            name = self.path.split("/en/c4-")[-1].removesuffix(".json.gz")
            body = served.get(name)
            self.send_response(200 if body else 404)
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

        do_HEAD = do_GET
        log_message = lambda *_: None

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1")
    env.update(HF_TOKEN="", NO_PROXY="127.0.0.1")
    first = prepare_c4_command(f"--out_dir={tmp_path}/c4", "--workers=2", **env)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert [path for command, path in asked if command == "GET" and "resolve" in path] == [
        "/datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz",
        "/datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz",
    ]
    for name, texts in (("c4_train_00000.bin", train), ("c4_val_00000.bin", val)):
        tokens = as_tokens(texts)
        header = np.zeros(256, "<i4")
        header[:6] = 20240520, 1, len(tokens), 257, 0, prepare_c4.fingerprint(get_encoding("bytes"))
        assert contents(tmp_path / "c4" / name) == header.tobytes() + np.array(tokens, "<u2").tobytes()

    asked.clear()
    again = prepare_c4_command(f"--out_dir={tmp_path}/c4", "--shards=2", **env)  # the hub has no second file
    out, err = again.communicate(timeout=60)
    hub.shutdown()
    assert again.returncode == 1 and out.count("kept") == 2
    assert "error: could not fetch allenai/c4 en/c4-train.00001-of-01024.json.gz" in err.splitlines()[-1]
    assert not any("00000-of" in path for _, path in asked)
    assert sorted(glob.glob("*.bin*", root_dir=tmp_path / "c4")) == ["c4_train_00000.bin", "c4_val_00000.bin"]


@pytest.fixture
def large(tmp_path):
    """A small input and a large one (40 MB, so that a pool works on it), whose shards come in this order."""
    (tmp_path / "a.jsonl").write_bytes(lines_of(["small"] * 10))
    (tmp_path / "b.jsonl").write_bytes(lines_of(f"{i} large " * 300 for i in range(13000)))
    return tmp_path


def start_and_wait_until_the_large_shard_is_half_made(folder):
    half = folder / "out/b_train_00000.bin.tmp"
    for _ in range(20):  # on a busy machine we may come too late
        run = prepare_c4_command(f"--input={folder}/?.jsonl", f"--out_dir={folder}/out", "--val_fraction=0",
                                 "--workers=2")
        while not (half.exists() and half.stat().st_size) and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGSTOP)
        if half.exists() and half.stat().st_size < 40e6:  # of 76 MB
            return run
        run.send_signal(signal.SIGCONT)
        assert run.wait(timeout=60) == 0, run.communicate()
        (folder / "out/b_train_00000.bin").unlink()
    raise AssertionError("the shard was always made before it could be stopped")


def processes_with(text):
    commands = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            commands.append(contents(path))
    return [command for command in commands if str(text).encode() in command]


def test_after_a_kill_the_same_command_keeps_the_finished_shard_and_makes_the_other(large):
    run = start_and_wait_until_the_large_shard_is_half_made(large)
    run.kill()
    run.communicate(timeout=30)
    assert sorted(glob.glob("*.bin", root_dir=large / "out")) == ["a_train_00000.bin"]
    made = os.stat(large / "out/a_train_00000.bin").st_mtime_ns
    if sys.platform == "linux":
        time.sleep(0.2)
        assert processes_with(large) == []  # the workers went with their parent

    prepare(f"{large}/?.jsonl", f"{large}/out", "bytes", val_fraction=0, workers=2)
    assert os.stat(large / "out/a_train_00000.bin").st_mtime_ns == made
    tokens, n_vocab = read_shard(large / "out/b_train_00000.bin")
    assert n_vocab == 257
    assert np.array_equal(tokens, as_tokens(f"{i} large " * 300 for i in range(13000)))
    assert glob.glob("*.tmp", root_dir=large / "out") == []


def test_an_interrupt_leaves_no_half_shard_and_one_line(large):
    run = start_and_wait_until_the_large_shard_is_half_made(large)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers too
    run.send_signal(signal.SIGCONT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 1 and err.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in err, err
    assert glob.glob("*.bin*", root_dir=large / "out") == ["a_train_00000.bin"]


def test_a_line_without_text_is_skipped_and_counted(tmp_path, capsys):
    bad = b'not JSON\n[1]\n{"txt": ""}\n{"text": 3}\n\xff\n' + b"[" * 100_000 + b"\n"
    blank, unended = b"\n \r\n", lines_of(["b"]).rstrip()
    (tmp_path / "x.json").write_bytes(lines_of(["a"]) + bad + blank + unended)
    prepare(f"{tmp_path}/x.json", f"{tmp_path}/out", "bytes", val_fraction=0)
    assert read_shard(tmp_path / "out/x_train_00000.bin")[0].tolist() == as_tokens("ab")
    assert "skipped 6 lines" in capsys.readouterr().out
    (tmp_path / "y.jsonl").write_bytes(bad)
    with pytest.raises(SystemExit, match=r"y\.jsonl: no text.*6 lines"):
        prepare(f"{tmp_path}/y.jsonl", f"{tmp_path}/out", "bytes")


def test_text_that_looks_like_a_special_token_or_is_half_a_character_is_still_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "<|endoftext|>"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    prepare(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", "bytes", val_fraction=0)
    assert read_shard(tmp_path / "out/x_train_00000.bin")[0].tolist() == as_tokens(["<|endoftext|>", "?", "🙂"])


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b[:20] + b"\xff" * 3 + b[23:], lambda b: b"no" + b])
def test_a_damaged_gz_is_named_and_leaves_no_shard(tmp_path, damage):
    (tmp_path / "x.json.gz").write_bytes(damage(gzip.compress(lines_of(map(str, range(1000))))))
    with pytest.raises(SystemExit, match=r"error: .*x\.json\.gz: incomplete or damaged"):
        prepare(f"{tmp_path}/x.json.gz", f"{tmp_path}/out", "bytes")
    assert glob.glob("*", root_dir=tmp_path / "out") == []


def test_the_last_part_of_each_file_is_for_validation(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789 abcdefgh")
    prepare(f"{tmp_path}/book.txt", f"{tmp_path}/out", "bytes", val_fraction=0.25)
    assert bytes(read_shard(tmp_path / "out/book_train_00000.bin")[0].tolist()) == b"0123456789 abcd"
    assert read_shard(tmp_path / "out/book_val_00000.bin")[0].tolist() == [*b"efgh", EOT]


def test_no_file_name_makes_a_training_shard_that_counts_as_validation(tmp_path):
    for name in ("a_val_b.txt", "a_train_b.txt", "c/a_val_b.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt") as f:
            f.write("x" * 99)
    prepare(f"{tmp_path}/**/*.txt*", f"{tmp_path}/out", "bytes")
    train, val = (set(glob.glob(f"*_{split}_*.bin", root_dir=tmp_path / "out")) for split in ("train", "val"))
    assert len(train) == len(val) == 3 and not train & val


def test_a_shard_that_is_not_whole_is_refused_by_name(tmp_path):
    path = str(tmp_path / "x.bin")
    with pytest.raises(SystemExit, match=r"x\.bin: No such file"):
        read_shard(path)
    write_shard(path, np.arange(100), 257)
    whole = contents(path)
    for content, message in [
        (whole[:1000], "1000 bytes"),
        (whole[:-2], r"truncated.* 1222 bytes, but 1224 for the 100 tokens"),
        (whole + b"..", r"1226 bytes, but 1224"),
        (whole[:8] + bytes(4) + whole[12:], r"1224 bytes, but 1024 for the 0 tokens"),
        (bytes(4) + whole[4:], r"magic 0 version 1, expected 20240520 version 1 or 20240801 version 7"),
        (whole[:4] + b"\7" + whole[5:], r"magic 20240520 version 7"),
    ]:
        with open(path, "wb") as f:
            f.write(content)
        with pytest.raises(SystemExit, match=r"error: .*x\.bin: .*" + message):
            read_shard(path)


@pytest.mark.parametrize("n_vocab, magic, version, dtype", [(65535, 20240520, 1, "<u2"), (65536, 20240801, 7, "<u4")])
def test_a_vocabulary_above_65535_makes_uint32_shards(tmp_path, n_vocab, magic, version, dtype):
    write_shard(str(tmp_path / "x.bin"), [n_vocab - 1, 0, 1], n_vocab)
    content = contents(tmp_path / "x.bin")
    assert np.frombuffer(content[:1024], "<i4").tolist() == [magic, version, 3, n_vocab] + [0] * 252
    assert np.frombuffer(content[1024:], dtype).tolist() == [n_vocab - 1, 0, 1]
    tokens, found = read_shard(str(tmp_path / "x.bin"))
    assert tokens.tolist() == [n_vocab - 1, 0, 1] and found == n_vocab


@pytest.fixture
def rank_file(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"\n\n", b"he", b"th", b"the", b" the", b"\n\n\n", b".\n", b"\xe3\x80"]
    (tmp_path / "ranks").write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return str(tmp_path / "ranks")


def test_a_rank_file_gets_llama_3s_special_tokens_after_its_ranks(rank_file):
    enc = get_encoding(rank_file)
    assert enc.n_vocab == 264 + 256 and enc.eot_token == 265
    assert enc.encode_ordinary("the.\n") == [259, 262] and enc.decode([259, 262]) == "the.\n"
    assert enc.decode_single_token_bytes(264) == b"<|begin_of_text|>"


def test_a_rank_file_that_leaves_out_a_rank_is_refused(rank_file):
    content = contents(rank_file)
    for bad in (content.replace(b" 258\n", b" 300\n"), content.split(b"\n", 1)[1], b"\x0a\x0e\x0a\x05<unk>", b""):
        with open(rank_file + "_bad", "wb") as f:
            f.write(bad)
        with pytest.raises(SystemExit, match="error: encoding .*ranks_bad: expected lines"):
            get_encoding(rank_file + "_bad")


def test_bytes_are_the_utf8_bytes_with_and_without_tiktoken():
    enc, text = get_encoding("bytes"), "a\x00\r\n\u3000café 🙂 <|endoftext|>"
    assert enc.n_vocab == 257 and enc.eot_token == EOT
    assert enc.encode_ordinary(text) == list(text.encode())
    assert prepare_c4.tokenize("bytes", True, text.encode())[0].tolist() == list(text.encode())
    assert enc.decode(list(text.encode())) == text and enc.decode_single_token_bytes(0xC3) == b"\xc3"


def test_where_a_long_text_is_cut_does_not_change_its_tokens(rank_file, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pieces = ["the", " ", "  ", "\n", "\n\n", ".\n", " the", "he", "1234", "é", "。\n", "'ll", "\r\n", "--"]
    text = "".join(pieces[i] for i in rng.integers(len(pieces), size=5000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    monkeypatch.setattr(prepare_c4, "_block", 50)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", rank_file, val_fraction=0)
    enc = get_encoding(rank_file)
    assert read_shard(tmp_path / "out/x_train_00000.bin")[0].tolist() == [*enc.encode_ordinary(text), enc.eot_token]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(input="{}/nothing*"), r"error: input=.*nothing\*: no such file"),
        (dict(input="{}/x.pdf"), r"error: .*x\.pdf: expected \.json"),
        (dict(encoding="gpt5"), r"error: encoding gpt5: not one of bytes, gpt2.*No such file"),
        (dict(val_fraction=1.0), r"error: val_fraction=1\.0"),
        (dict(val_fraction=0.001), r"error: .*x\.txt: 31 tokens are too few"),
        (dict(out_dir="{}/x.pdf"), r"error: .*x\.pdf: File exists"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_line(tmp_path, settings, message):
    for name in ("x.pdf", "x.txt"):
        (tmp_path / name).write_text("thirty characters, to be exact")
    defaults = dict(input="{}/x.txt", out_dir="{}/out", encoding="bytes")
    settings = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in {**defaults, **settings}.items()}
    with pytest.raises(SystemExit, match=message) as e:
        prepare(**settings)
    assert "\n" not in str(e.value)


def test_a_shard_of_another_vocabulary_is_neither_kept_nor_replaced(tmp_path, rank_file):
    (tmp_path / "x.txt").write_text("the " * 100)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", "bytes")
    before = contents(tmp_path / "out/x_train_00000.bin")
    with pytest.raises(SystemExit, match="x_train_00000.bin: has n_vocab 257, not 520; delete it or set"):
        prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", rank_file)
    assert contents(tmp_path / "out/x_train_00000.bin") == before


def test_the_docs_corpus_depends_on_neither_hash_seed_nor_file_order(tmp_path):
    for i in range(20):
        (tmp_path / f"m{i}.py").write_text(f'def f():\n    """Text {i} “quoted”\n    {"and more " * 30}"""\n')
    (tmp_path / "copy.py").write_text((tmp_path / "m0.py").read_text())
    (tmp_path / "short.py").write_text('"""Short."""')
    (tmp_path / "broken.py").write_text("def")
    program = f"""
import importlib.util, os, sys, sysconfig
sysconfig.get_path, importlib.util.find_spec, walk = lambda _: {str(tmp_path)!r}, lambda _: None, os.walk
os.walk = lambda root: [(a, b, sorted(c, reverse=bool(int(sys.argv[1])))) for a, b, c in walk(root)]
import prepare_c4
sys.stdout.buffer.write(prepare_c4.docs_corpus())
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program, i], env=env, cwd=HERE, capture_output=True)
        for i, env in ((i, {**os.environ, "PYTHONHASHSEED": i}) for i in "01")
    )
    assert first.returncode == 0, first.stderr
    texts = [json.loads(line)["text"] for line in first.stdout.splitlines()]
    assert sum(text.startswith("Text ") for text in texts) == 20 and len(texts) > 50  # and Python's help topics
    assert not any("“" in text or "\n    and" in text for text in texts if text.startswith("Text "))
    assert first.stdout == second.stdout
