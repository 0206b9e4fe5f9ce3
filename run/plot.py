"""
Draw runs from their log.jsonl:
    python -m run.plot --out_dir=out                        # loss.png; subspaces.png, if there are
    python -m run.plot --out_dir='out-*' --image=runs.png   # several runs in one picture

loss.png is the loss by tokens. subspaces.png shows which layers' subspaces converge early. Several
runs are drawn as loss by tokens and by time, and as peak memory. history.py reads their logs.
"""

import errno
import glob
import math
import os
import sys
import warnings

from configurator import configure

out_dir = "out"  # one, or several: a pattern, or names with commas between them
image = "runs.png"  # of several

if __name__ == "__main__":
    s = configure(sys.modules[__name__], ignore_unknown=True)

import numpy as np

from run.files import replacing
from run.history import Summary, kind_and_depth

NAMED = 40  # rows with a name each; more are named by kind
COLOURS = [f"C{i}" for i in range(10)]  # matplotlib's
FORMATS = [".png", ".svg", ".pdf", ".jpg"]
STYLES = ["-", "--", ":", "-."]


# -----------------------------------------------------------------------------
# drawing


def new_figure(width, height):
    """An empty figure, sizes in inches, for a file and not for a screen.

    matplotlib takes a second to import. A user's own settings of it count for nothing here."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Write a figure in the format that the path's ending names, whole or not at all.

    Raises OSError, or ValueError for a format that there is not."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to draw to", folder)
    with replacing(path) as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes
        figure.savefig(f, format=ending[1:], dpi=120)


def plain(text, most=60):
    """A name as matplotlib shows it unchanged: $ begins no formula. A long one loses its middle."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) > most:
        text = text[: most // 2] + "..." + text[-most // 2 :]
    return text.replace("$", r"\$")


def short(number, _place=None):
    """1500000 as 1.5M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def show_settled(axes, curves):
    """Choose the axis of losses by what comes after the first tenth: the fall before it is cut off.

    Above the picture it says so. Curves with few points, or that hardly fall, are shown whole."""
    settled, last, all_of_them = [], [], []
    for curve in curves:
        x, mean, _, _ = curve.columns()
        if len(x):
            settled.extend(mean[x > x[0] + (x[-1] - x[0]) / 10])
            last.append(mean[-1])
            all_of_them.extend(mean)
    if len(settled) < 4:
        return
    # a few spikes are no reason to squeeze the rest; where it ends is always seen
    high = max(np.quantile(settled, 0.9), *last)
    low = min(settled)
    first = max(all_of_them)
    margin = 0.08 * (high - low) or 0.1
    if first - low > 1.5 * (high - low + margin):
        axes.set_ylim(low - margin, high + margin)
        words = f"the fall from {first:.2f} is beyond the picture"
        axes.set_title(words, loc="left", fontsize=8, color="gray")


def plot_loss(out_dir):
    """Draw a run's loss.png; and subspaces.png, where its log has subspaces. Returns their paths.

    Raises OSError, or ValueError if the log has no loss."""
    run = Summary(out_dir)
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    x, mean, low, high = run.training.columns()
    if len(x):
        dot = "o" if len(x) == 1 else ""  # a line of one point is none
        axes.plot(x, mean, lw=1, marker=dot, alpha=0.6, label="training: single steps, as logged")
    if run.training.width > 1:
        axes.lines[0].set_label(f"training: means of {run.training.width} logged steps")
        axes.fill_between(x, low, high, alpha=0.15, lw=0, label="their range")
    x_val, validation, _, _ = run.validation.columns()
    if len(x_val):
        axes.plot(x_val, validation, "C1", marker=marker_of(x_val), ms=3, label="validation")
    show_settled(axes, [run.training, run.validation])
    if len(x_val):
        at_end = f"validation loss {validation[-1]:.4f} after {short(x_val[-1])} tokens"
    else:
        at_end = f"training loss {mean[-1]:.4f} after {short(x[-1])} tokens"
    figure.suptitle(f"{plain(run.name)}: {at_end}")
    axes.set(xlabel="tokens", ylabel="loss, nats a token")
    axes.xaxis.set_major_formatter(short)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    drawn = [os.path.join(out_dir, "loss.png")]
    save(figure, drawn[0])
    if run.subspaces.rows:
        drawn.append(os.path.join(out_dir, "subspaces.png"))
        plot_subspaces(run, drawn[1])
    return drawn


def marker_of(x):
    """Few points are dots on their line."""
    return "o" if len(x) <= 60 else ""


def plot_subspaces(run, path):
    """Draw the similarity that each refresh found and the gap that it left: a row a weight."""
    names, similarity, gap = run.subspaces.values()
    rows = max(12, len(names)) if len(names) <= NAMED else 28  # those of many are thin
    height = 0.16 * rows  # inches, of a panel
    figure = new_figure(10, 1.6 + 2 * height)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{plain(run.name)}: the subspaces that gradients are projected to")
    above.set_title("New subspace against the one before it, at each refresh\n"
                    "(high: the layer's subspace has settled, and may be refreshed less often)",
                    fontsize=9)
    below.set_title("Steps from a refresh to the next: the gap, which doubles while similarity "
                    "stays high", fontsize=9)

    # colours of gaps: the first gap, and its doubles
    shortest, longest = np.nanmin(gap), np.nanmax(gap)
    doubles = math.ceil(math.log2(longest / shortest) - 1e-6)
    ticks = [shortest * 2**i for i in range(doubles + 1)]
    most = 1.001 * max(ticks[-1], 2 * shortest)  # a tick at the very end is not drawn
    gap_colours = {"norm": "log", "vmin": shortest, "vmax": most}
    panels = (  # (axes, values, their name, their colours)
        (above, similarity, "similarity, 1: the same", {"vmin": 0, "vmax": 1}),
        (below, gap, "gap, steps", gap_colours),
    )
    for axes, values, label, colours in panels:
        extent = (0, values.shape[1] * run.subspaces.width, len(names), 0)
        picture = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis",
                              extent=extent, **colours)
        name_rows(axes, names)
        bar = figure.colorbar(picture, ax=axes, label=label)
        axes.xaxis.set_major_formatter(short)
    bar.set_ticks(ticks, labels=[short(tick) for tick in ticks])
    bar.minorticks_off()
    below.set_xlabel("step")
    save(figure, path)


def name_rows(axes, names):
    """Name each row of a picture, or if they are many each kind of weight, with lines between."""
    weights = [kind_and_depth(name) for name in names]
    if len(names) <= NAMED:
        labels = [plain(f"{kind} {'.'.join(map(str, depth))}") for kind, depth in weights]
        axes.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=7)
        return
    starts = [i for i in range(len(weights)) if i == 0 or weights[i][0] != weights[i - 1][0]]
    ends = [*starts[1:], len(weights)]
    places, labels = [], []
    for start, end in zip(starts, ends):
        axes.axhline(start, color="white", lw=0.8)
        places.append((start + end) / 2)
        first, last = weights[start][1], weights[end - 1][1]
        blocks = f"\nblocks {first[0]} to {last[0]}, downwards" if first and last else ""
        labels.append(plain(weights[start][0]) + blocks)
    step = -(-len(places) // NAMED)  # of very many kinds some
    axes.set_yticks(places[::step], labels[::step], fontsize=7)


def plot_runs(out_dirs, path):
    """Draw several runs as one image.

    Validation loss by tokens, and by time of training; peak memory as bars."""
    runs = [Summary(folder) for folder in out_dirs]
    names = [plain(name, 36) for name in distinct_names(out_dirs)]
    columns = min(4, len(runs))  # of the legend
    below = 0.25 * -(-len(runs) // columns)
    figure = new_figure(15, 4.5 + below + 0.15 * max(0, len(runs) - 12))
    by_tokens, by_time, memory = figure.subplots(1, 3)
    unit, hours = unit_of_time(max(run.hours for run in runs))
    for place, (run, name) in enumerate(zip(runs, names)):
        look = {"color": COLOURS[place % len(COLOURS)],
                "ls": STYLES[place // len(COLOURS) % len(STYLES)]}
        x, losses, _, _ = run.validation.columns()
        if not len(x):
            name += " (no evaluation yet)"
        by_tokens.plot(x, losses, marker=marker_of(x), ms=3, label=name, **look)
        time, losses, _, _ = run.by_hours.columns()
        by_time.plot(time / hours, losses, marker=marker_of(time), ms=3, **look)
        bar = memory.barh(place, run.peak, color=look["color"])
        memory.bar_label(bar, [f"{run.peak:.2f}" if run.peak else "not known"], padding=3)
    by_tokens.set(xlabel="tokens", ylabel="validation loss, nats a token")
    by_tokens.xaxis.set_major_formatter(short)
    by_time.set(xlabel=f"{unit} of training", ylabel="validation loss, nats a token")
    for axes, curves in ((by_tokens, [run.validation for run in runs]),
                         (by_time, [run.by_hours for run in runs])):
        show_settled(axes, curves)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    memory.set(xlabel="peak memory, GiB")
    memory.set_yticks(range(len(names)), names, fontsize=7)
    memory.margins(x=0.2)  # room for the figures
    memory.invert_yaxis()  # the first run on top
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    save(figure, path)


def unit_of_time(hours):
    """(unit, its hours) that a time is told in."""
    if hours < 2:
        return "minutes", 1 / 60
    if hours > 72:
        return "days", 24
    return "hours", 1


def distinct_names(folders):
    """A name for each folder: its last part, or if others share that what tells them apart."""
    paths = [os.path.abspath(folder) for folder in folders]
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(set(paths)):
        return names
    above = os.path.commonpath(paths)
    return [os.path.relpath(path, above) for path in paths]


# -----------------------------------------------------------------------------
# the script


def folders_of(names):
    """The folders of runs that a setting names. Raises ValueError, or OSError, if there is none."""
    folders = []
    for part in [names] if os.path.isdir(names) else names.split(","):
        part = os.path.expanduser(part.strip())
        if os.path.exists(part) or not glob.has_magic(part):
            folders.append(part)
            continue
        found = sorted(glob.glob(part))
        runs = [folder for folder in found if os.path.exists(os.path.join(folder, "log.jsonl"))]
        if not runs:
            raise ValueError(f"{part}: no folder of this pattern holds a log.jsonl")
        folders.extend(runs)
    for folder in folders:
        if not os.path.isdir(folder):
            found = "is a file" if os.path.exists(folder) else "does not exist"
            raise ValueError(f"{folder}: {found}; out_dir names the folder of a run")
        if not os.path.exists(os.path.join(folder, "log.jsonl")):
            raise ValueError(f"{folder}: holds no log.jsonl, as the folder of a run does")
    return list({os.path.abspath(folder): folder for folder in folders}.values())


def main(s):
    try:
        folders = folders_of(s.out_dir)
        if len(folders) > 1 or "image" in s.given:
            plot_runs(folders, os.path.expanduser(s.image))
            print(s.image)
        else:
            print("\n".join(plot_loss(folders[0])))
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}")
    except (ValueError, ImportError) as e:
        raise SystemExit(f"error: {e}")


if __name__ == "__main__":
    main(s)
