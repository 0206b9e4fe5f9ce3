"""
prepare_c4.py, from a hub on this machine and from files, and the shard format:
    python -m pytest tests/test_prepare.py
"""

import base64
import contextlib
import functools
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

import numpy as np
import pytest

import prepare_c4
from prepare_c4 import prepare
from run.encodings import fingerprint, get_encoding
from run.shards import open_shard, write_shard
from tests.common import HERE

EOT = 256  # of encoding=bytes


def prepare_c4_command(*args, **env):
    """prepare_c4.py as a process of its own group, with encoding=bytes."""
    # a background job's children are born deaf to Ctrl-C
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, os.path.join(HERE, "prepare_c4.py"), "--encoding=bytes", *args],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen,
    )


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def as_tokens(texts):
    """What a shard of these documents holds with encoding=bytes."""
    tokens = []
    for text in texts:
        tokens += [*text.encode(), EOT]
    return tokens


def contents(path):
    with open(path, "rb") as f:
        return f.read()


def tokens_of(path):
    return open_shard(path).tokens.tolist()


# -----------------------------------------------------------------------------
# C4


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hugging Face hub with the files `served` {name: bytes}; notes what it is `asked`."""

    served = {}
    asked = []

    def do_GET(self):
        self.asked.append((self.command, self.path))
        name = self.path.split("/en/c4-")[-1].removesuffix(".json.gz")
        body = self.served.get(name)
        self.send_response(200 if body else 404)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment in which the hub is one on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()


def test_c4_comes_from_the_hub_as_exactly_these_bytes(hub, tmp_path):
    train = ["One café.\n", "Two."]
    val = ["Three <|endoftext|>"]
    Hub.served = {
        "train.00000-of-01024": gzip.compress(lines_of(train)),
        "validation.00000-of-00008": gzip.compress(lines_of(val)),
    }
    first = prepare_c4_command(f"--out_dir={tmp_path}/c4", "--workers=2", **hub)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert [path for command, path in Hub.asked if command == "GET" and "resolve" in path] == [
        "/datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz",
        "/datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz",
    ]
    for name, texts in (("c4_train_00000.bin", train), ("c4_val_00000.bin", val)):
        tokens = as_tokens(texts)
        header = np.zeros(256, "<i4")
        header[:6] = 20240520, 1, len(tokens), 257, 0, fingerprint(get_encoding("bytes"))
        expected = header.tobytes() + np.array(tokens, "<u2").tobytes()
        assert contents(tmp_path / "c4" / name) == expected

    # the same folder, and one file more, which the hub does not have
    Hub.asked.clear()
    again = prepare_c4_command(f"--out_dir={tmp_path}/c4", "--shards=2", **hub)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 1 and out.count("kept") == 2
    error = "error: could not fetch allenai/c4 en/c4-train.00001-of-01024.json.gz"
    assert error in err.splitlines()[-1]
    assert not any("00000-of" in path for _, path in Hub.asked)
    made = sorted(glob.glob("*.bin*", root_dir=tmp_path / "c4"))
    assert made == ["c4_train_00000.bin", "c4_val_00000.bin"]


# -----------------------------------------------------------------------------
# stopped half way


@pytest.fixture
def large(tmp_path):
    """A small input and a large one (40 MB, so that a pool works on it), made in this order."""
    (tmp_path / "a.jsonl").write_bytes(lines_of(["small"] * 10))
    (tmp_path / "b.jsonl").write_bytes(lines_of(f"{i} large " * 300 for i in range(13000)))
    return tmp_path


def start_and_wait_until_half_made(folder):
    """The command on `large`, stopped (SIGSTOP) while it writes the large shard."""
    shard = folder / "out/b_train_00000.bin"
    for _ in range(20):  # on a busy machine we may come too late
        run = prepare_c4_command(
            f"--input={folder}/?.jsonl", f"--out_dir={folder}/out", "--val_fraction=0",
            "--workers=2",
        )
        half = f"{shard}.qgalore-{run.pid}-0.tmp"
        while not (os.path.exists(half) and os.path.getsize(half)) and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGSTOP)
        if os.path.exists(half) and os.path.getsize(half) < 40e6:  # of 76 MB
            return run
        run.send_signal(signal.SIGCONT)
        assert run.wait(timeout=60) == 0, run.communicate()
        shard.unlink()
    raise AssertionError("the shard was always made before it could be stopped")


def processes_with(text):
    """The command lines on this machine in which `text` occurs."""
    commands = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            commands.append(contents(path))
    return [command for command in commands if str(text).encode() in command]


def test_after_a_kill_the_same_command_makes_what_is_missing(large):
    run = start_and_wait_until_half_made(large)
    run.kill()
    run.communicate(timeout=30)
    assert sorted(glob.glob("*.bin", root_dir=large / "out")) == ["a_train_00000.bin"]
    made = os.stat(large / "out/a_train_00000.bin").st_mtime_ns
    if sys.platform == "linux":
        time.sleep(0.2)
        assert processes_with(large) == []  # the workers went with their parent

    prepare(f"{large}/?.jsonl", f"{large}/out", "bytes", val_fraction=0, workers=2)
    assert os.stat(large / "out/a_train_00000.bin").st_mtime_ns == made
    shard = open_shard(large / "out/b_train_00000.bin")
    assert shard.n_vocab == 257
    assert np.array_equal(shard.tokens, as_tokens(f"{i} large " * 300 for i in range(13000)))
    assert glob.glob("*.tmp", root_dir=large / "out") == []


def test_an_interrupt_leaves_no_half_shard_and_one_line(large):
    run = start_and_wait_until_half_made(large)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers too
    run.send_signal(signal.SIGCONT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 1
    assert err.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in err, err
    assert glob.glob("*.bin*", root_dir=large / "out") == ["a_train_00000.bin"]


# -----------------------------------------------------------------------------
# what is in the files


def test_a_line_without_text_is_skipped_and_counted(tmp_path, capsys):
    bad = b'not JSON\n[1]\n{"txt": ""}\n{"text": 3}\n\xff\n' + b"[" * 100_000 + b"\n"
    blank = b"\n \r\n"
    unended = lines_of(["b"]).rstrip()
    (tmp_path / "x.json").write_bytes(lines_of(["a"]) + bad + blank + unended)
    prepare(f"{tmp_path}/x.json", f"{tmp_path}/out", "bytes", val_fraction=0)
    assert tokens_of(tmp_path / "out/x_train_00000.bin") == as_tokens("ab")
    assert "skipped 6 lines" in capsys.readouterr().out

    (tmp_path / "y.jsonl").write_bytes(bad)
    with pytest.raises(SystemExit, match=r"y\.jsonl: no text.*6 lines"):
        prepare(f"{tmp_path}/y.jsonl", f"{tmp_path}/out", "bytes")


def test_special_tokens_and_half_characters_are_text(tmp_path):
    special = b'{"text": "<|endoftext|>"}\n'
    half = b'{"text": "\\ud83d"}\n'
    whole = b'{"text": "\\ud83d\\ude42"}\n'
    (tmp_path / "x.jsonl").write_bytes(special + half + whole)
    prepare(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", "bytes", val_fraction=0)
    expected = as_tokens(["<|endoftext|>", "?", "🙂"])
    assert tokens_of(tmp_path / "out/x_train_00000.bin") == expected


def cut_short(file):
    return file[:-12]


def overwritten(file):
    return file[:20] + b"\xff" * 3 + file[23:]


def prefixed(file):
    return b"no" + file


@pytest.mark.parametrize("damage", [cut_short, overwritten, prefixed])
def test_a_damaged_gz_is_named_and_leaves_no_shard(tmp_path, damage):
    file = gzip.compress(lines_of(map(str, range(1000))))
    (tmp_path / "x.json.gz").write_bytes(damage(file))
    with pytest.raises(SystemExit, match=r"error: .*x\.json\.gz: incomplete or damaged"):
        prepare(f"{tmp_path}/x.json.gz", f"{tmp_path}/out", "bytes")
    assert glob.glob("*", root_dir=tmp_path / "out") == []


def test_the_last_part_of_each_file_is_for_validation(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789 abcdefgh")
    prepare(f"{tmp_path}/book.txt", f"{tmp_path}/out", "bytes", val_fraction=0.25)
    assert tokens_of(tmp_path / "out/book_train_00000.bin") == [*b"0123456789 abcd"]
    assert tokens_of(tmp_path / "out/book_val_00000.bin") == [*b"efgh", EOT]


def test_no_file_name_makes_training_text_count_as_validation(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "a_val_b.txt").write_text("x" * 99)
    (tmp_path / "a_train_b.txt").write_text("x" * 99)
    with gzip.open(tmp_path / "c/a_val_b.txt.gz", "wt") as f:
        f.write("x" * 99)
    prepare(f"{tmp_path}/**/*.txt*", f"{tmp_path}/out", "bytes")
    train = set(glob.glob("*_train_*.bin", root_dir=tmp_path / "out"))
    val = set(glob.glob("*_val_*.bin", root_dir=tmp_path / "out"))
    assert len(train) == len(val) == 3 and not train & val


# -----------------------------------------------------------------------------
# the shard format


def test_a_shard_that_is_not_whole_is_refused_by_name(tmp_path):
    path = str(tmp_path / "x.bin")
    with pytest.raises(SystemExit, match=r"x\.bin: No such file"):
        open_shard(path)
    write_shard(path, np.arange(100), 257)
    whole = contents(path)
    known = "20240520 version 1 or 20240801 version 7"
    for content, message in [
        (whole[:1000], "1000 bytes"),
        (whole[:-2], r"truncated.* 1222 bytes, but 1224 for the 100 tokens"),
        (whole + b"..", r"1226 bytes, but 1224"),
        (whole[:8] + bytes(4) + whole[12:], r"1224 bytes, but 1024 for the 0 tokens"),
        (bytes(4) + whole[4:], rf"magic 0 version 1, expected {known}"),
        (whole[:4] + b"\7" + whole[5:], r"magic 20240520 version 7"),
    ]:
        with open(path, "wb") as f:
            f.write(content)
        with pytest.raises(SystemExit, match=r"error: .*x\.bin: .*" + message):
            open_shard(path)


@pytest.mark.parametrize(
    "n_vocab, magic, version, dtype", [(65535, 20240520, 1, "<u2"), (65536, 20240801, 7, "<u4")]
)
def test_a_vocabulary_above_65535_makes_uint32_shards(tmp_path, n_vocab, magic, version, dtype):
    tokens = [n_vocab - 1, 0, 1]
    write_shard(str(tmp_path / "x.bin"), tokens, n_vocab)
    content = contents(tmp_path / "x.bin")
    assert np.frombuffer(content[:1024], "<i4").tolist() == [magic, version, 3, n_vocab] + [0] * 252
    assert np.frombuffer(content[1024:], dtype).tolist() == tokens
    shard = open_shard(str(tmp_path / "x.bin"))
    assert shard.tokens.tolist() == tokens and shard.n_vocab == n_vocab


# -----------------------------------------------------------------------------
# encodings


@pytest.fixture
def rank_file(tmp_path):
    """A vocabulary in tiktoken's format: the bytes and a few tokens more."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"\n\n", b"he", b"th", b"the", b" the", b"\n\n\n", b".\n", b"\xe3\x80"]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (tmp_path / "ranks").write_bytes(b"".join(lines))
    return str(tmp_path / "ranks")


def test_a_rank_file_gets_llama_3s_special_tokens(rank_file):
    enc = get_encoding(rank_file)
    assert enc.n_vocab == 264 + 256 and enc.eot_token == 265  # after its ranks
    assert enc.encode_ordinary("the.\n") == [259, 262] and enc.decode([259, 262]) == "the.\n"
    assert enc.decode_single_token_bytes(264) == b"<|begin_of_text|>"


def test_a_rank_file_that_leaves_out_a_rank_is_refused(rank_file):
    content = contents(rank_file)
    for bad in (
        content.replace(b" 258\n", b" 300\n"),
        content.split(b"\n", 1)[1],
        b"\x0a\x0e\x0a\x05<unk>",  # the start of a sentencepiece model
        b"",
    ):
        with open(rank_file + "_bad", "wb") as f:
            f.write(bad)
        with pytest.raises(SystemExit, match="error: encoding .*ranks_bad: expected lines"):
            get_encoding(rank_file + "_bad")


def test_bytes_are_the_utf8_bytes_with_and_without_tiktoken():
    enc = get_encoding("bytes")
    text = "a\x00\r\n\u3000café 🙂 <|endoftext|>"
    utf8 = list(text.encode())
    assert enc.n_vocab == 257 and enc.eot_token == EOT
    assert enc.encode_ordinary(text) == utf8
    assert prepare_c4.encode(enc, text).tolist() == utf8
    assert prepare_c4.tokenize_text("bytes", text.encode())[0].tolist() == utf8
    assert enc.decode(utf8) == text and enc.decode_single_token_bytes(0xC3) == b"\xc3"


def test_where_a_text_is_cut_does_not_change_its_tokens(rank_file, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pieces = ["the", " ", "  ", "\n", "\n\n", ".\n", " the"]
    pieces += ["he", "1234", "é", "。\n", "'ll", "\r\n", "--"]
    text = "".join(pieces[i] for i in rng.integers(len(pieces), size=5000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    monkeypatch.setattr(prepare_c4, "BLOCK", 50)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", rank_file, val_fraction=0)
    enc = get_encoding(rank_file)
    expected = [*enc.encode_ordinary(text), enc.eot_token]
    assert tokens_of(tmp_path / "out/x_train_00000.bin") == expected


# -----------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(input="{}/nothing*"), r"error: input=.*nothing\*: no such file"),
        (dict(input="{}/x.pdf"), r"error: .*x\.pdf: expected \.json"),
        (dict(encoding="gpt5"), r"error: encoding gpt5: not one of bytes, gpt2.*No such file"),
        (dict(val_fraction=1.0), r"error: val_fraction=1\.0"),
        (dict(val_fraction=-0.1), r"error: val_fraction=-0\.1"),
        (dict(val_fraction=0.001), r"error: .*x\.txt: 31 tokens are too few"),
        (dict(out_dir="{}/x.pdf"), r"error: .*x\.pdf: File exists"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_line(tmp_path, settings, message):
    for name in ("x.pdf", "x.txt"):
        (tmp_path / name).write_text("thirty characters, to be exact")
    given = dict(input="{}/x.txt", out_dir="{}/out", encoding="bytes") | settings
    for name, value in given.items():
        if isinstance(value, str):
            given[name] = value.format(tmp_path)
    with pytest.raises(SystemExit, match=message) as e:
        prepare(**given)
    assert "\n" not in str(e.value)


def test_a_number_out_of_range_is_refused_before_any_work(tmp_path):
    for flag in ("--shards=1025", "--shards=-1", "--workers=-1"):
        command = prepare_c4_command(f"--out_dir={tmp_path}/out", flag)
        out, err = command.communicate(timeout=60)
        name = flag[2:].partition("=")[0]
        assert command.returncode == 1 and len(err.splitlines()) == 1
        assert err.startswith(f"error: {flag}: {name} must be "), err
    assert not (tmp_path / "out").exists()


def test_a_shard_of_another_vocabulary_is_left_alone(tmp_path, rank_file):
    (tmp_path / "x.txt").write_text("the " * 100)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", "bytes")
    before = contents(tmp_path / "out/x_train_00000.bin")
    message = "x_train_00000.bin: has n_vocab 257, not 520; delete it or set"
    with pytest.raises(SystemExit, match=message):
        prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", rank_file)
    assert contents(tmp_path / "out/x_train_00000.bin") == before


def test_a_shard_that_something_else_made_is_left_alone(tmp_path):
    (tmp_path / "x.txt").write_text("the " * 100)
    path = str(tmp_path / "x_train_00000.bin")
    for shard, maker in (
        (dict(fingerprint=7), "with another tokenizer"),
        (dict(flags=np.ones(12), row=4), "as rows of 4 tokens"),
    ):
        write_shard(path, np.arange(12), 257, **shard)
        before = contents(path)
        with pytest.raises(SystemExit, match=f"x_train_00000.bin: was made {maker}; delete it"):
            prepare(f"{tmp_path}/x.txt", f"{tmp_path}", "bytes")
        assert contents(path) == before


# -----------------------------------------------------------------------------
# the documentation


# prints the corpus of the folder in argv[1], its files in the order or, with "1", against it
DOCS_OF_A_FOLDER = """
import importlib.util, os, sys, sysconfig

sysconfig.get_path = lambda _: sys.argv[1]
importlib.util.find_spec = lambda _: None
walk = os.walk
backwards = sys.argv[2] == "1"
os.walk = lambda root: [(a, b, sorted(c, reverse=backwards)) for a, b, c in walk(root)]

from run import docs
sys.stdout.buffer.write(docs.docs_corpus())
"""


def test_the_docs_corpus_depends_on_the_libraries_alone(tmp_path):
    words = "and more " * 30  # the corpus leaves out what is short
    for i in range(20):
        source = f'def f():\n    """Text {i} “quoted”\n    {words}"""\n'
        (tmp_path / f"m{i}.py").write_text(source)
    (tmp_path / "copy.py").write_text((tmp_path / "m0.py").read_text())
    (tmp_path / "short.py").write_text('"""Short."""')
    (tmp_path / "broken.py").write_text("def")
    results = []
    for number in "01":  # of the hash seed, and of the order of files
        result = subprocess.run(
            [sys.executable, "-c", DOCS_OF_A_FOLDER, str(tmp_path), number],
            env={**os.environ, "PYTHONHASHSEED": number},
            cwd=HERE,
            capture_output=True,
        )
        results.append(result)
    first, second = results
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout

    texts = [json.loads(line)["text"] for line in first.stdout.splitlines()]
    ours = [text for text in texts if text.startswith("Text ")]
    assert len(ours) == 20 and len(texts) > 50  # and Python's help topics
    assert not any("“" in text or "\n    and" in text for text in ours)
