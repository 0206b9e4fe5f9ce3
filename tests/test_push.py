"""
Tests of finetune/checkpoints/push.py, against a hub of our own on this machine.
    python -m pytest tests/test_push.py
"""

import base64
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants

from configurator import configure
from finetune import hf
from finetune.checkpoints import push
from tests.common import refused


class Hub(BaseHTTPRequestHandler):
    """The hub's API as an upload of small files uses it."""

    def do_GET(self):
        path = urlparse(self.path).path
        name = "/".join(path.split("/")[3:5])
        files = self.server.repositories.get(name)
        if files is None:
            return self.reply({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            found = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]
            return self.reply(found)
        self.reply({"id": name, "sha": "0" * 40, "siblings": [{"rfilename": f} for f in files]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlparse(self.path).path
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.server.made[name] = asked
            self.server.repositories[name] = {".gitattributes": b""}
            return self.reply({"url": f"{constants.ENDPOINT}/{name}", "name": name})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.reply({"files": [{"path": f["path"]} | how for f in files]})
        if self.server.full:
            return self.reply({"error": "no space"}, 403)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[name][entry["value"]["path"]] = content
        url = f"{constants.ENDPOINT}/{name}/commit/1"
        self.reply({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def reply(self, value, status=200, headers=()):
        self.send_response(status)
        for key, text in dict(headers).items():
            self.send_header(key, text)
        content = json.dumps(value).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    new = {".gitattributes": b""}
    server.repositories = {"me/full": {"a.txt": b"", "b.txt": b""}, "me/new": new}
    server.made = {}
    server.tokens = set()
    server.full = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)  # what HF_ENDPOINT sets
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    push.ready.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "tuned"
    (folder / "within").mkdir(parents=True)
    (folder / "within/no").write_text("not of an export")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def is_private(asked):
    """What a new repository was asked to be, by the library's older key or its newer one."""
    return asked.get("private") or asked.get("visibility") == "private"


def run(*args):
    hf.main(configure(hf, argv=[*args]))


def test_what_was_made_is_uploaded(hub, export, capsys):
    run(f"--export={export}", "--push=me/tuned")
    files = hub.repositories["me/tuned"]
    assert files == {".gitattributes": b"", "config.json": b"{}", "model.safetensors": b"weights"}
    assert is_private(hub.made["me/tuned"])
    assert hub.tokens == {"Bearer hf_secret"}
    out = capsys.readouterr().out
    assert "uploading config.json, model.safetensors of" in out and "/me/tuned, private" in out
    assert "hf_secret" not in out


def test_a_file_is_uploaded_alone(hub, export, capsys):
    for name in ("x.gguf", "other.gguf"):
        with open(os.path.join(export, name), "w") as f:
            f.write(name)
    run(f"--export={export}/x.gguf", "--push=me/new", "--private=False")
    assert hub.repositories["me/new"] == {".gitattributes": b"", "x.gguf": b"x.gguf"}
    assert not hub.made and "which is there already" in capsys.readouterr().out
    run(f"--export={export}/x.gguf", "--push=me/open", "--private=False")
    assert not is_private(hub.made["me/open"])


def test_a_repository_with_files_is_left_alone(hub, export):
    said = refused(run, f"--export={export}", "--push=me/full")
    assert "me/full has 2 files (a.txt, b.txt" in said and "--push_over=True" in said
    assert len(hub.repositories["me/full"]) == 2
    run(f"--export={export}", "--push=me/full", "--push_over=True")
    assert set(hub.repositories["me/full"]) == {
        "a.txt", "b.txt", "config.json", "model.safetensors"
    }


def test_what_cannot_be_pushed_is_one_line(hub, export, tmp_path, monkeypatch):
    """Before the run is read, where that can be."""
    assert "owner/name" in refused(run, f"--export={export}", "--push=tuned")
    assert "no config.json" in refused(run, f"--export={tmp_path}", "--push=me/x")
    here = f"--export={export}"  # which is there: a run to make it of is named
    assert "exists" in refused(run, here, "--push=me/x", "--out_dir=out")
    absent = refused(run, f"--export={tmp_path}/no", "--push=me/x", f"--out_dir={tmp_path}/none")
    assert f"{tmp_path}/none" in absent
    hub.full = True
    assert "me/x: not uploaded: " in refused(run, f"--export={export}", "--push=me/x")
    push.ready.cache_clear()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token" in refused(run, f"--export={export}", "--push=me/x")
