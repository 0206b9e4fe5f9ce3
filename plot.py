"""
Draw a run's loss.png again from its log.jsonl:
    python plot.py --out_dir=out
"""

import json
import os

from configurator import configure

out_dir = "out"


def read_log(path):
    """The objects of log.jsonl, up to a line that a power cut tore."""
    entries = []
    with open(path) as f:
        for line in f:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def plot_loss(out_dir):
    """Draw loss.png from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_log(os.path.join(out_dir, "log.jsonl"))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, style in (("loss", {"lw": 1, "alpha": 0.5}), ("val_loss", {"marker": "o", "ms": 3})):
        lines = [entry for entry in log if key in entry]
        axes.plot([e["tokens"] for e in lines], [e[key] for e in lines], label=key, **style)
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=out_dir)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(os.path.join(out_dir, "loss.png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    configure(globals(), skip_unknown_in_files=True)
    try:
        plot_loss(out_dir)
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
