"""
Draw runs from their log.jsonl:
    python -m run.plot --out_dir=out                        # loss.png; subspaces.png, if there are
    python -m run.plot --out_dir='out-*' --image=runs.png   # several runs in one picture

loss.png is the loss by tokens. subspaces.png shows which layers' subspaces converge early. Several
runs are drawn as loss by tokens and by time, and as peak memory.
"""

import glob
import json
import math
import os
import sys

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
            except ValueError:  # the line before it was whole, and is the last that counts
                break
    return entries


def hours_at(log):
    """[(tokens, hours)] of a log, in hours of training steps.

    What interruptions and evaluations took does not count."""
    points = [(0, 0.0)]
    for entry in log:
        if "tokens_per_s" in entry:  # a line of training, not of an evaluation
            tokens, hours = points[-1]
            hours += (entry["tokens"] - tokens) / entry["tokens_per_s"] / 3600
            points.append((entry["tokens"], hours))
    return points


def subspaces(log):
    """What a log says of weights' subspaces: (names of weights, similarity, gap).

    names: by kind and depth. similarity, gap: their values after each step, a list a weight; NaN
    before the first refresh that has them."""
    refreshes = {}  # {weight: [[step, similarity, gap], ...]}
    for entry in log:
        for name, found in entry.get("subspaces", {}).items():
            refreshes.setdefault(name, []).extend(found)
    names = sorted(refreshes, key=_kind_and_depth)
    steps = 1 + max(entry["iter"] for entry in log)  # as far as the log goes

    similarities = []  # (weights, steps)
    gaps = []  # (weights, steps)
    for name in names:
        similarity = [math.nan] * steps
        gap = [math.nan] * steps
        for step, found, left in refreshes[name]:
            # until the next refresh, which overwrites them
            similarity[step:] = [found] * (steps - step)
            gap[step:] = [left] * (steps - step)
        similarities.append(similarity)
        gaps.append(gap)
    return names, similarities, gaps


def _kind_and_depth(name):
    """What weights are sorted by: blocks.7.attn.q_proj is an attn.q_proj, the one of block 7."""
    parts = name.split(".")
    kind = [part for part in parts if not part.isdigit()]
    depth = [int(part) for part in parts if part.isdigit()]
    return kind, depth


def pyplot():
    """matplotlib.pyplot, which takes a second to import, for files and not for a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_loss(out_dir):
    """Draw a run's loss.png; and subspaces.png, where its log has subspaces."""
    log = read_log(os.path.join(out_dir, "log.jsonl"))
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")  # inches
    # the loss of single steps is noisy: a pale line; evaluations are few: dots
    styles = {"loss": {"lw": 1, "alpha": 0.5}, "val_loss": {"marker": "o", "ms": 3}}
    for key, style in styles.items():
        entries = [entry for entry in log if key in entry]
        tokens = [entry["tokens"] for entry in entries]
        losses = [entry[key] for entry in entries]
        axes.plot(tokens, losses, label=key, **style)
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=out_dir)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(os.path.join(out_dir, "loss.png"), dpi=120)
    plt.close(figure)  # else pyplot keeps it
    if any("subspaces" in entry for entry in log):
        plot_subspaces(log, os.path.join(out_dir, "subspaces.png"))


def plot_subspaces(log, path):
    """Draw the similarity that each refresh found and the gap that it left: a row a weight."""
    plt = pyplot()
    names, similarity, gap = subspaces(log)
    size = (9, 2 + 0.3 * len(names))  # inches: rows stay legible, however many there are
    figure, (above, below) = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")

    # a gap doubles five times at most: that is the range of its colours
    shortest = min(value for row in gap for value in row if not math.isnan(value))
    gap_colours = {"norm": "log", "vmin": shortest, "vmax": 32 * shortest}
    panels = (  # (axes, values, their name, their colours)
        (above, similarity, "similarity", {"vmin": 0, "vmax": 1}),
        (below, gap, "gap, steps", gap_colours),
    )
    for axes, values, label, colours in panels:
        picture = axes.imshow(
            values, aspect="auto", interpolation="nearest", cmap="viridis", **colours
        )
        axes.set_yticks(range(len(names)), names, fontsize=6)
        figure.colorbar(picture, ax=axes, label=label)
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_runs(out_dirs, path):
    """Draw several runs as one image.

    Validation loss by tokens, and by hours of training; peak memory as bars."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    by_tokens, by_time, memory = panels
    names = [os.path.basename(os.path.normpath(folder)) for folder in out_dirs]
    for place, folder in enumerate(out_dirs):
        log = read_log(os.path.join(folder, "log.jsonl"))

        # validation loss by tokens
        evaluations = [entry for entry in log if "val_loss" in entry]
        tokens = [entry["tokens"] for entry in evaluations]
        losses = [entry["val_loss"] for entry in evaluations]
        by_tokens.plot(tokens, losses, marker="o", ms=3, label=names[place])

        # validation loss by time: an evaluation is as late as the last line of training before it
        times = hours_at(log)
        hours = [max(hour for seen, hour in times if seen <= count) for count in tokens]
        by_time.plot(hours, losses, marker="o", ms=3)

        # memory: the highest peak that was logged
        peaks = [entry["peak_memory_gb"] for entry in log if "peak_memory_gb" in entry]
        memory.barh(place, max(peaks, default=0))
    by_tokens.set(xlabel="tokens", ylabel="validation loss, nats a token")
    by_time.set(xlabel="hours of training")
    memory.set(xlabel="peak memory, GiB")
    memory.set_yticks(range(len(names)), names)
    memory.invert_yaxis()  # the first run on top
    by_tokens.legend(fontsize=7)
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    s = configure(sys.modules[__name__], ignore_unknown=True)
    folders = []
    for part in s.out_dir.split(","):
        # a name that is no pattern stays, so that the error names it
        folders.extend(sorted(glob.glob(part)) or [part])
    try:
        if len(folders) == 1:
            plot_loss(folders[0])
        else:
            plot_runs(folders, s.image)
            print(s.image)
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")


if __name__ == "__main__":
    main()
