"""
Draw runs from their log.jsonl:
    python plot.py --out_dir=out                          # loss.png, and subspaces.png: which layers converge early
    python plot.py --out_dir='out-*' --image=runs.png     # several in one: loss by tokens and by time, peak memory
"""

import glob
import json
import os

from configurator import configure

out_dir = "out"  # one, or several: a pattern, or names with commas between them
image = "runs.png"  # of several


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


def hours_at(log):
    """[(tokens, hours)] of a log: the time in training steps, whatever interruptions and evaluations took."""
    points, tokens, hours = [(0, 0.0)], 0, 0.0
    for entry in log:
        if "tokens_per_s" in entry:
            hours += (entry["tokens"] - tokens) / entry["tokens_per_s"] / 3600
            tokens = entry["tokens"]
            points.append((tokens, hours))
    return points


def subspaces(log):
    """(names of weights, by kind and depth; similarity, gap: their values after each step, lists of lists)."""
    turns = {}
    for entry in log:
        for name, of in entry.get("subspaces", {}).items():
            turns.setdefault(name, []).extend(of)
    order = lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]
    names = sorted(turns, key=lambda name: ([part for part in name.split(".") if not part.isdigit()], order(name)))
    steps = 1 + max(entry["iter"] for entry in log)
    values = [[[float("nan")] * steps for _ in names] for _ in range(2)]
    for row, name in enumerate(names):
        for step, *found in turns[name]:
            for of, value in zip(values, found):
                of[row][step:] = [value] * (steps - step)
    return names, *values


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(out_dir):
    """Draw loss.png from log.jsonl; and where weights have subspaces, subspaces.png: a row a weight, by kind and depth,
    the similarity that each refresh found and the gap that it left."""
    plt, log = _pyplot(), read_log(os.path.join(out_dir, "log.jsonl"))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, style in (("loss", {"lw": 1, "alpha": 0.5}), ("val_loss", {"marker": "o", "ms": 3})):
        lines = [entry for entry in log if key in entry]
        axes.plot([e["tokens"] for e in lines], [e[key] for e in lines], label=key, **style)
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=out_dir)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(os.path.join(out_dir, "loss.png"), dpi=120)
    plt.close(figure)
    if not any("subspaces" in entry for entry in log):
        return
    names, similarity, gap = subspaces(log)
    figure, panels = plt.subplots(2, 1, figsize=(9, 2 + 0.3 * len(names)), sharex=True, layout="constrained")
    low = min(value for row in gap for value in row if value == value)
    scale = {"norm": "log", "vmin": low, "vmax": 32 * low}
    for axes, values, label, how in zip(panels, (similarity, gap), ("similarity", "gap, steps"),
                                        ({"vmin": 0, "vmax": 1}, scale)):
        picture = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", **how)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        figure.colorbar(picture, ax=axes, label=label)
    panels[1].set_xlabel("step")
    figure.savefig(os.path.join(out_dir, "subspaces.png"), dpi=120)
    plt.close(figure)


def plot_runs(out_dirs, path):
    """Draw several runs as one image: validation loss by tokens, and by hours of training; peak memory as bars."""
    plt = _pyplot()
    figure, (by_tokens, by_time, memory) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    names = [os.path.basename(os.path.normpath(folder)) for folder in out_dirs]
    for place, folder in enumerate(out_dirs):
        log = read_log(os.path.join(folder, "log.jsonl"))
        lines, times = [entry for entry in log if "val_loss" in entry], hours_at(log)
        losses = [entry["val_loss"] for entry in lines]
        by_tokens.plot([entry["tokens"] for entry in lines], losses, marker="o", ms=3, label=names[place])
        hours = [max(hours for tokens, hours in times if tokens <= entry["tokens"]) for entry in lines]
        by_time.plot(hours, losses, marker="o", ms=3)
        memory.barh(place, max((entry["peak_memory_gb"] for entry in log if "peak_memory_gb" in entry), default=0))
    by_tokens.set(xlabel="tokens", ylabel="validation loss, nats a token")
    by_time.set(xlabel="hours of training")
    memory.set(xlabel="peak memory, GiB")
    memory.set_yticks(range(len(names)), names)
    memory.invert_yaxis()
    by_tokens.legend(fontsize=7)
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    configure(globals(), skip_unknown_in_files=True)
    found = [folder for part in out_dir.split(",") for folder in sorted(glob.glob(part)) or [part]]
    try:
        if len(found) == 1:
            plot_loss(found[0])
        else:
            plot_runs(found, image)
            print(image)
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")


if __name__ == "__main__":
    main()
