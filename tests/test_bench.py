"""
bench.py, on a tiny model:
    python -m pytest test_bench.py
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import torch

from bench.__main__ import study
from tests.common import HERE

TINY_BENCH = """--n_layer=1 --n_embd=64 --n_head=2 --ffn_dim=128 --vocab_size=128 --batch_size=2 --block_size=32
                --rank=16 --steps=2 --warmup=1 --phase_steps=1 --threads=1 --device=cpu""".split()


def bench(*args, **env):
    command = [sys.executable, f"{HERE}/bench.py", *TINY_BENCH, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_bench_measures_every_contender_and_gives_the_reason_of_one_that_is_not_installed(tmp_path):
    (tmp_path / "apollo_torch.py").write_text("raise ModuleNotFoundError(\"No module named 'apollo_torch'\", "
                                              "name='apollo_torch')")
    done = bench("--contenders=qgalore,adam8bit,adamw,apollo", f"--out_dir={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "bench.json") as f:
        rows = {row["contender"]: row for row in json.load(f)["rows"]}
    assert rows.pop("apollo")["error"] == "not installed: pip install apollo-torch"
    assert "did not run: not installed" in done.stdout and (tmp_path / "out" / "bench.png").stat().st_size > 0
    assert list(rows) == ["qgalore", "adam8bit", "adamw"]
    for name, row in rows.items():
        assert "error" not in row, row
        ms = row["phase_ms"]
        assert all(row[key] > 0 for key in ("peak_gib", "tokens_per_s", "median_ms"))
        assert all(ms[phase] > 0 for phase in ("forward", "backward", "update"))
        assert len(row["steps_ms"]) == 2 and row["slowest_ms"] >= row["median_ms"]
        has_bases = name == "qgalore"  # seven matrices a block
        assert (row["bases"], ms["projection"] > 0, ms["refresh"] is not None) == (7 * has_bases, has_bases, has_bases)
    assert rows["qgalore"]["phase_ms"]["refresh"] > 0 and 0 < rows["qgalore"]["refresh_share"] < 1
    assert rows["adam8bit"]["losses"][0] == rows["adamw"]["losses"][0]  # one model, one batch


def test_the_refresh_study_finds_what_svd_keeps_and_a_contender_that_is_not_known_is_one_line(tmp_path):
    settings = SimpleNamespace(n_embd=64, ffn_dim=128, rank=16, batch_size=2, block_size=32, seed=1)
    rows = study(settings, "cpu", torch.float32)
    assert {(row["out"], row["in"]) for row in rows} == {(64, 64), (128, 64), (64, 128)}
    for row in rows:
        assert row["refresh_ms"] > 0 and row["svd_ms"] > 0 and 0.5 < row["energy_of_svd"] < 1 + 1e-5
        assert row["decay"] < 1 or row["energy_of_svd"] > 0.98  # a gradient that decays loses next to nothing
    done = bench("--contenders=qgalor", f"--out_dir={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "qgalore" in done.stderr
