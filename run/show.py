"""
What is only shown: lines, texts, progress bars. None of it may end what a run is for.

A terminal may be closed, a pipe's reader gone, the disk under a terminal's log full. What is
printed then is lost, and the program goes on.

This module loads nothing but Python's own: what a script lacks is said in a line, too.
"""

import contextlib
import os
import sys
import time

EVERY = 30  # seconds between lines of progress where there is no terminal


class Shown:
    """A text stream that never fails: what cannot be shown is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as e:  # ValueError: it is closed
            self._lost(e)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError) as e:
            self._lost(e)

    def _lost(self, e):
        """A pipe whose reader is gone takes nothing ever again; a full disk may."""
        if isinstance(e, BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name):  # encoding, isatty, fileno ...
        return getattr(self.stream, name)


def protect_output():
    """Let nothing that is printed from here on end the program.

    Ctrl-C, or a package that is missing, ends it with one line."""
    sys.excepthook = last_words
    # a file that is opened later must not become standard output or error
    while True:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere > 2:
            os.close(nowhere)
            break
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if isinstance(stream, Shown):
            continue
        # a console's encoding may lack a character; a stream of another kind has no such errors
        with contextlib.suppress(AttributeError, OSError):
            # a file or a pipe, too, gets each line at once: kilobytes may be a day of training
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Shown(stream))


def last_words(kind, error, trace):
    """Show what ends the program: a traceback is for what its user cannot know."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and "." not in error.name:
        print(f"error: there is no package {error.name}: pip install -r requirements.txt, or "
              f"pip install {error.name}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class Typed:
    """Prints what tokens read as, each character as soon as it is whole."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.ids = []
        self.shown = 0  # characters

    def add(self, *ids):
        # vocab_size may be padded beyond the encoding's
        self.ids += [i for i in ids if i < self.encoding.n_vocab]
        # all ids anew, about 0.1 ms a thousand: what one token reads as depends on those before it;
        # a character may span tokens, and is \ufffd until it is whole
        self._show(self.text().rstrip("\ufffd"), end="")

    def end(self):
        self._show(self.text(), end="\n")

    def text(self):
        return self.encoding.decode(self.ids)

    def _show(self, text, end):
        print(text[self.shown :], end=end, flush=True)
        self.shown = max(self.shown, len(text))


class Progress:
    """How far a loop is: a bar on a terminal, elsewhere a line of standard error now and then.

    total: of its units, or None. shown: False on ranks that show nothing."""

    def __init__(self, name="", total=None, unit="", done=0, shown=True):
        self.name = name
        self.total = total
        self.unit = unit
        self.done = done
        self.figures = ""
        self.shown = shown
        self.bar = None
        self.last = time.monotonic()  # when a line was shown
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=name or None, total=total, initial=done, unit=f" {unit}",
                            dynamic_ncols=True)

    def advance(self, n=1, figures=None):
        """n more are done. figures: what to show beside it; None: as before."""
        self.done += n
        if figures is not None:
            self.figures = figures
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(self.figures, refresh=False)
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.last >= EVERY:
            self.line()

    def over(self, items):
        """The items, one after the other; each is done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.advance()

    def line(self):
        """Show a line at once."""
        self.last = time.monotonic()
        of_total = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.name}: " if self.name else "", f"{self.done:,}{of_total} {self.unit}"]
        if self.figures:
            parts.append(f", {self.figures}")
        print("".join(parts), file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def first_rank():
    """Whether this is the first of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text):
    """Print a line, above a bar where there is one; the first of several processes does."""
    if first_rank():
        from tqdm import tqdm

        tqdm.write(text)


def in_words(figures):
    """", reward margin 0.5031" of {"val_reward_margin": 0.50314}: what a line ends with."""
    words = []
    for name, number in figures.items():
        words.append(f", {name.removeprefix('val_').replace('_', ' ')} {number:.4f}")
    return "".join(words)
