"""
bench/, on a tiny model:
    python -m pytest tests/test_bench.py
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import torch

from bench.refresh import study
from tests.common import HERE

TINY_BENCH = (
    "--n_layer=1 --n_embd=64 --n_head=2 --ffn_dim=128 --vocab_size=128 --batch_size=2"
    " --block_size=32 --rank=16 --steps=2 --warmup=1 --phase_steps=1 --threads=1 --device=cpu"
).split()


def bench(*args, **env):
    command = [sys.executable, "-m", "bench", *TINY_BENCH, *args]
    return subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, env={**os.environ, **env}
    )


def test_bench_measures_each_contender_or_says_why_not(tmp_path):
    # a package that is not installed, whether it is or not
    (tmp_path / "apollo_torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'apollo_torch'\", name='apollo_torch')"
    )
    contenders = "--contenders=qgalore,adam8bit,adamw,apollo"
    done = bench(contenders, f"--out_dir={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "bench.json") as f:
        rows = {row["contender"]: row for row in json.load(f)["rows"]}
    assert rows.pop("apollo")["error"] == "not installed: pip install apollo-torch"
    assert "did not run: not installed" in done.stdout
    assert (tmp_path / "out" / "bench.png").stat().st_size > 0
    assert list(rows) == ["qgalore", "adam8bit", "adamw"]

    for name, row in rows.items():
        assert "error" not in row, row
        for key in ("peak_gib", "tokens_per_s", "median_ms"):
            assert row[key] > 0, (name, key)
        ms = row["phase_ms"]
        for phase in ("forward", "backward", "update"):
            assert ms[phase] > 0, (name, phase)
        assert len(row["steps_ms"]) == 2
        assert row["slowest_ms"] >= row["median_ms"]
        has_bases = name == "qgalore"
        assert row["bases"] == (7 if has_bases else 0)  # seven matrices a block
        assert (ms["projection"] > 0) == has_bases
        assert (ms["refresh"] is not None) == has_bases
    assert rows["qgalore"]["phase_ms"]["refresh"] > 0
    assert 0 < rows["qgalore"]["refresh_share"] < 1
    assert rows["adam8bit"]["losses"][0] == rows["adamw"]["losses"][0]  # one model, one batch


def test_the_refresh_study_finds_what_svd_keeps():
    s = SimpleNamespace(n_embd=64, ffn_dim=128, rank=16, batch_size=2, block_size=32, seed=1)
    rows = study(s, "cpu", torch.float32)
    assert {(row["out"], row["in"]) for row in rows} == {(64, 64), (128, 64), (64, 128)}
    for row in rows:
        assert row["refresh_ms"] > 0
        assert row["svd_ms"] > 0
        assert 0.5 < row["energy_of_svd"] < 1 + 1e-5
        if row["decay"] >= 1:  # of a gradient that falls fast next to nothing is lost
            assert row["energy_of_svd"] > 0.98


def test_an_unknown_contender_is_one_line(tmp_path):
    done = bench("--contenders=qgalor", f"--out_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "qgalore" in done.stderr
