"""
bench/tuned.py, and the peers of bench/by_peft.py, on a tiny checkpoint:
    python -m pytest tests/test_tuned.py
"""

import json
import math
import subprocess
import sys

import pytest
import torch

import train
from bench import by_peft, tuned
from configurator import configure
from finetune import hf
from methods.registry import shape
from run.checkpoint import starting_model
from tests.common import HERE, read_log, refused, run, settings, tokens
from tests.test_finetune import checkpoint  # noqa: a fixture


def test_the_best_rate_has_a_worse_one_on_either_side():
    losses = {0.5: 3.0, 1: 2.0, 2: 1.0, 4: 1.5, 8: math.inf}
    assert tuned.best_rate(1, losses.get) == (2, {0.5: 3.0, 1: 2.0, 2: 1.0, 4: 1.5})
    assert tuned.best_rate(4, losses.get)[0] == 2
    diverges = tuned.best_rate(1, lambda rate: math.inf)
    assert diverges == (1, {0.5: math.inf, 1: math.inf, 2: math.inf})
    assert tuned.best_rate(1, lambda rate: 1.0)[0] == 1  # all alike


def test_a_row_has_the_mean_of_what_was_found():
    runs = [
        {"val_loss": 0.25, "accuracy": 0.9, "tokens_per_s": 90, "peak_memory_gb": 1.5},
        {"val_loss": 0.75, "accuracy": None, "tokens_per_s": 110, "peak_memory_gb": 1.25},
        {"error": "error: it diverged"},
    ]
    row = tuned.row("lora", 0.5, {1: math.inf, 0.25: 0.5, 0.5: 0.25}, runs)
    assert row == ("| `lora` | 0.25: 0.5000; 0.5: **0.2500**; 1: - | 0.5000 (0.2500, 0.7500) | "
                   "0.900 (0.900) | 1.50 | 100 |")
    assert tuned.row("lora", 1, {1: math.inf}, runs[2:]) == "| `lora` | 1: **-** |  |  |  |  |"


def test_a_run_that_diverged_is_not_run_again(tmp_path):
    line = "error: step 7: weight blocks.0.q_proj.scale is not finite: training stopped; nothing"
    assert tuned.diverged(tmp_path / "lora") is None
    (tmp_path / "lora.txt").write_text(f"step 0: val loss 5\n{line}\n")
    assert tuned.diverged(tmp_path / "lora") == {"error": line}
    (tmp_path / "lora.txt").write_text("error: stopped, nothing was saved\n")
    assert tuned.diverged(tmp_path / "lora") is None


@pytest.mark.parametrize("flags,words", [
    ("--contenders=qlora,peft_qlor", "peft_qlora"),
    ("--contenders=qlora --seed=x", "seed"),
])
def test_a_mistake_is_one_line(flags, words):
    command = [sys.executable, "-m", "bench.tuned", *flags.split()]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and words in done.stderr


def test_a_peer_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr(tuned.importlib.util, "find_spec", lambda name: None)
    tuned.check(["lora"])
    with pytest.raises(SystemExit, match="peft_lora needs peft: pip install"):
        tuned.check(["lora", "peft_lora"])


# -----------------------------------------------------------------------------
# peft, transformers and bitsandbytes themselves


def packed(checkpoint, bits):
    """(their model with a tiny LLaMA's weights in so many bits, settings, rows of several examples)."""
    pytest.importorskip("peft", reason="peft is not installed")
    s = settings("--method=lora", f"--weight_bits={bits}", "--rank=4", "--device=cpu",
                 f"--init_from={checkpoint}", f"--data_dir={checkpoint}/data", "--block_size=32")
    starting_model(s)
    model = by_peft.build(s, torch.float32, torch.float32)
    x, y = tokens(batch=3, length=24)
    documents = torch.tensor([[1] * 10 + [2] * 8 + [3] * 6, [1] * 24, [5] + [6] * 23])
    y[:, :4] = -1
    return by_peft.Theirs(model, shape(s)), s, (x, y, documents)


@torch.no_grad()
def loss_of(path, bits, batch):
    x, y, documents = batch
    return hf.load(path, bits, torch.float32)(x, y, documents=documents).item()


def test_positions_start_anew_with_each_example():
    documents = torch.tensor([[1, 1, 1, 2, 3, 3], [4, 5, 5, 5, 5, 5]])
    assert by_peft.positions_in(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("bits,error", [(16, 1e-5), (4, 1e-5), (8, 0.003)])
def test_a_peer_starts_at_our_loss(checkpoint, bits, error):  # noqa: F811
    """On packed rows; theirs in 8 bits also rounds what goes into a product."""
    theirs, _, batch = packed(checkpoint, bits)
    with torch.no_grad():
        found = theirs(*batch).item()
    assert abs(found - loss_of(checkpoint, bits, batch)) < error


@pytest.mark.parametrize("bits,error", [(16, 1e-5), (4, 1e-5), (8, 0.003)])
def test_what_is_merged_computes_what_was_tuned(checkpoint, tmp_path, bits, error):  # noqa: F811
    theirs, s, batch = packed(checkpoint, bits)
    torch.manual_seed(0)
    with torch.no_grad():
        at_start = theirs(*batch).item()
        trained = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name, _ in trained)
        assert len(trained) == 2 * 7 * 2  # two factors of seven matrices in two blocks
        for _, p in trained:
            p.add_(torch.randn_like(p))
        found = theirs(*batch).item()
    assert abs(found - at_start) > 10 * error
    by_peft.merge(theirs.model, s.pretrained, tmp_path / "merged")
    assert abs(found - loss_of(tmp_path / "merged", 16, batch)) < error


def write_run(folder, loss):
    """What a run of four steps leaves."""
    folder.mkdir()
    (folder / "ckpt.pt").write_text("weights")
    entries = [{"iter": 3, "tokens_per_s": 9, "peak_memory_gb": 1}, {"iter": 4, "val_loss": loss}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))


def test_a_peer_is_tuned_between_runs_that_are_done(checkpoint, tmp_path):  # noqa: F811
    """Its accuracy is found, and weights go that no figure needs."""
    pytest.importorskip("peft", reason="peft is not installed")
    for rate in ("0.0005", "0.002"):
        write_run(tmp_path / f"peft_qlora-{rate}-7", 99.0)
    ask = (f"--task=choice --data={checkpoint}/reviews.tsv --columns=sentence,label --limit=8"
           " --labels=bad,good --prompt='{sentence} is'")
    code, out, err = run(
        "bench.tuned", "--contenders=peft_qlora", "--seeds=7", f"--evaluate={ask}",
        f"--init_from={checkpoint}", f"--data_dir={checkpoint}/data", f"--out_dir={tmp_path}",
        "--max_iters=4", "--eval_interval=4", "--warmup_iters=1", "--log_interval=1",
        "--block_size=32", "--batch_size=8", "--eval_iters=4", "--device=cpu",
    )
    assert code == 0, out + err
    log = read_log(tmp_path / "peft_qlora-0.001-7")
    assert log[4, "val_loss"] < log[0, "val_loss"]
    with open(tmp_path / "peft_qlora-0.001-7-accuracy.json") as f:
        accuracy = json.load(f)["accuracy"]
    loss = f"{log[4, 'val_loss']:.4f}"
    rates = f"0.0005: 99.0000; 0.001: **{loss}**; 0.002: 99.0000"
    start = f"| `peft_qlora` | {rates} | {loss} ({loss}) | {accuracy:.3f} ({accuracy:.3f}) | "
    assert start in out
    assert not list(tmp_path.glob("*/ckpt.pt")) and not list(tmp_path.glob("*/merged"))


@pytest.mark.parametrize("flags,words", [
    ("--method=qgalore", "'qgalore': peft's are lora and qlora"),
    ("--method=lora", "init_from=scratch: peft tunes a Hugging Face checkpoint"),
    ("--method=lora --init_from=x --matmul=int8", "--matmul=int8: matmul is ours alone"),
])
def test_what_peft_does_not_do_is_refused(flags, words):
    assert words in refused(by_peft.check, configure(train, argv=flags.split()))
