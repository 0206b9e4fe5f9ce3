"""
What is only shown: lines, progress bars. None of it may end what a run is for.

A terminal may be closed, a pipe's reader gone, the disk under a terminal's log full. What is
printed then is lost, and the program goes on.
"""

import contextlib
import os
import sys
import time

from tqdm import tqdm

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
    """Let nothing that is printed from here on end the program."""
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
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Shown(stream))


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


def counted(items, name, unit, total=None):
    """Yield items, and show how many there were."""
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def first_rank():
    """Whether this is the first of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text):
    """Print a line, above a bar where there is one; the first of several processes does."""
    if first_rank():
        tqdm.write(text)
