"""
bench/, on a tiny model:
    python -m pytest tests/test_bench.py
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import torch

from bench import report
from bench.refresh import study
from tests.common import HERE, TINY_MODEL, read_log, settings

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
    contenders = "--contenders=qgalore,qmuon,adam8bit,adamw,apollo"
    done = bench(contenders, f"--out_dir={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "bench.json") as f:
        rows = {row["contender"]: row for row in json.load(f)["rows"]}
    assert rows.pop("apollo")["error"] == "not installed: pip install apollo-torch"
    assert "did not run: not installed" in done.stdout
    assert (tmp_path / "out" / "bench.png").stat().st_size > 0
    assert list(rows) == ["qgalore", "qmuon", "adam8bit", "adamw"]

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
        assert (ms["projection"] > 0) == (name in ("qgalore", "qmuon"))  # what is gathered
        assert (ms["refresh"] is not None) == has_bases
    assert rows["qgalore"]["phase_ms"]["refresh"] > 0
    assert 0 < rows["qgalore"]["refresh_share"] < 1
    assert rows["adam8bit"]["losses"][0] == rows["adamw"]["losses"][0]  # one model, one batch


def test_a_contest_tables_its_runs_and_goes_on_where_it_was(shards, tmp_path):
    """With a run that cannot be, which stops no other."""
    command = [sys.executable, "-m", "bench.contest", *TINY_MODEL, f"--data_dir={shards}",
               "--methods=qmuon, adamw", "--matmul=float", "--max_iters=4", "--eval_interval=4",
               f"--out_dir={tmp_path}"]
    contest = partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    first = contest([*command, "--rates=0.01"])
    assert first.returncode == 1  # adamw does not read matmul
    assert "adamw-0.01: error: --matmul=float: method adamw does not read" in first.stdout
    assert "| `adamw` | 0.01 | - |" in first.stdout
    row = first.stdout.partition("| `qmuon` ")[2].splitlines()[0]
    loss = read_log(tmp_path / "qmuon-0.01")[4, "val_loss"]
    assert row.split(" | ")[:2] == ["| 0.01", f"{loss:.4f}"]

    log = (tmp_path / "qmuon-0.01" / "log.jsonl").stat()
    command.remove("--matmul=float")
    other = contest([*command, "--rates=0.01", "--n_layer=1"])  # what is there is of two layers
    assert other.returncode == 1 and "has n_layer = 2, not 1" in other.stderr
    second = contest([*command, "--rates=0.01,0.02"])
    assert second.returncode == 0, second.stdout
    assert second.stdout.count("\n| `") == 4
    assert (tmp_path / "qmuon-0.01" / "log.jsonl").stat() == log  # it was done


def test_the_refresh_study_finds_what_svd_keeps():
    flags = TINY_BENCH[:TINY_BENCH.index("--steps=2")]
    rows = study(settings("--method=qgalore", *flags, "--seed=1"), "cpu", torch.float32)
    assert {(row["out"], row["in"]) for row in rows} == {(64, 64), (128, 64), (64, 128)}
    assert len(rows) == 7 + 9
    for row in rows:
        assert row["refresh_ms"] > 0
        assert row["svd_ms"] > 0
        assert row["off_orthonormal"] < 1e-4
        assert 0.9 < row["energy_of_svd"] < 1 + 1e-5
        if row["gradient"][:6] != "random":  # real gradients fall fast
            assert row["energy_of_svd"] > 0.995


def test_an_unknown_contender_is_one_line(tmp_path):
    done = bench("--contenders=qgalor", f"--out_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "qgalore" in done.stderr


def test_a_report_measures_what_it_can_and_says_what_not(tmp_path):
    """Real processes: two that end, one that fails, one that is too slow, one without time."""
    # no limit that a busy machine would meet
    by_name = {job.name: replace(job, seconds=600) for job in report.JOBS}
    slow = by_name["7b-peers"]
    wrong = replace(by_name["60m-peers"], args="config/llama_60m.py --steps=0")
    jobs = [by_name["7b-12gib"], wrong, replace(slow, seconds=0.3)]
    machine = {"device": "A card (1)", "torch": torch.__version__}
    card = report.measure(jobs, 30, str(tmp_path), machine, report.TINY)
    trained, failed, late = card["jobs"]
    assert trained["rows"][0]["loss"] > 0 and "error" not in trained, trained
    assert trained["rows"][0]["allocated_gib"] > 0
    assert "at least 1" in failed["error"] and "rows" not in failed
    assert late["error"] == "not done after 0 s"
    with open(tmp_path / "A-card-1.json") as f:
        assert json.load(f) == card
    (left,) = report.measure(jobs[:1], 0.01, str(tmp_path / "2"), machine)["jobs"]
    assert left == {"name": "7b-12gib", "error": "no time was left"}

    text = report.tables(report.cards_in(tmp_path))
    assert "## A card (1)" in text and "**Training in capped memory**" in text
    assert f"`{trained['command']}`" in text and failed["error"] in text


def test_a_recipe_is_profiled_as_it_comes_compiled(tmp_path):
    (job,) = [job for job in report.JOBS if job.name == "60m-profile"]
    tiny = [flag for flag in report.TINY if not flag.startswith("--compile")]
    found = report.run(job, 600, str(tmp_path), tiny)
    assert "error" not in found, found
    (row,) = found["rows"]
    assert row["kernels"][0][2] > 0
    assert row["step_ms"] > 0 and row["launches"] > 0


def test_a_reports_tables_have_a_row_a_figure():
    rows = [{"contender": "qgalore", "peak_gib": 10.79, "tokens_per_s": 6074.2, "mfu": None},
            {"contender": "torchao", "error": "not installed"}]
    card = {"machine": {"device": "H100"}, "commit": "1", "date": "2026-01-01",
            "jobs": [{"name": "7b-peers", "command": "python -m bench", "rows": rows,
                      "note": "by hand"}]}
    text = report.tables([card, card])
    assert text.count("| 7b-peers | qgalore | 10.79 | - | 6,074 | - | - |") == 2
    assert text.count("| 7b-peers | torchao | - | - | - | - | - |") == 2
    assert text.count("- 7b-peers: `python -m bench`: by hand") == 2
