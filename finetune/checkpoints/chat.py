"""
Chat templates, which are strangers' programs: they run in a process of their own.

jinja2's sandbox keeps a template from the machine, but lets it loop for ever, or multiply a text
until the memory is full, in a single operation that nothing in this process could stop. So a
template has a process, SECONDS for each text and MEMORY for all; a process that takes more is
ended. It is started with the first text, and renders the others, too: main() takes requests and
gives answers, a line of JSON each.
"""

import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import threading

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from run.text import first_line

try:
    import resource
except ImportError:  # Windows: the memory has no limit, the time has
    resource = None

# where a process finds this package
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SECONDS = 10.0  # real templates take less than a thousandth
MEMORY = 2**30  # bytes of address space
LENGTH = 2**24  # characters of a text


class Damaged(ValueError):
    """A template that cannot be used at all: it is not jinja2, or takes more than it may."""


def render(template, variables):
    """The text that a template's source makes of variables, which JSON can spell.

    Raises ValueError with the template's reason if it refuses them, and Damaged."""
    return _ask("render", template, variables)


def names(template):
    """The variables that a template's source asks for, a list. Raises Damaged."""
    return _ask("names", template)


def _ask(*request):
    found = _renderer(os.getpid()).ask(json.dumps(request))  # a fork starts its own
    if found is None:
        _renderer.cache_clear()
        raise Damaged(f"takes more than {SECONDS:.0f} s, or {MEMORY // 2**20} MiB")
    kind, value = json.loads(found)
    if kind == "damaged":
        raise Damaged(value)
    if kind == "refused":
        raise ValueError(value)
    return value


@functools.cache
def _renderer(pid):
    return Renderer()


class Renderer:
    """The process that renders."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune.checkpoints.chat"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us; it ends when we do
        )
        self.process.stdout.readline()  # it has started: from here on its time counts

    def ask(self, request):
        """The answer to a request, or None if the process has ended, or had to be."""
        with self.lock, contextlib.suppress(OSError):  # of a pipe whose other end is closed
            limit = threading.Timer(SECONDS, self.process.kill)
            limit.start()
            try:
                self.process.stdin.write(request + "\n")
                self.process.stdin.flush()
                return self.process.stdout.readline() or None
            finally:
                limit.cancel()


# -----------------------------------------------------------------------------
# in that process


def main():
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):  # a system may know none, or a lower one
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)


def answer(what, template, variables=None):
    """("done", "refused" or "damaged"; what was asked for, or the reason)."""
    try:
        compiled = compiled_template(template)
    except Exception as e:  # the compiler computes constants, too
        return "damaged", first_line(e)
    environment = compiled.environment
    if what == "names":
        found = jinja2.meta.find_undeclared_variables(environment.parse(template))
        return "done", sorted(found - environment.globals.keys())
    try:
        text = compiled.render(**variables)
    except MemoryError:
        return "damaged", f"takes more than {MEMORY // 2**20} MiB"
    except Exception as e:  # a stranger's program raises what it likes
        return "refused", first_line(e)
    if len(text) > LENGTH:
        return "damaged", f"writes more than {LENGTH} characters"
    return "done", text


@functools.lru_cache
def compiled_template(source):
    """A template in the environment that transformers gives it, in jinja2's sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which only marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without HTML's escapes, which jinja2's own filter makes."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern):
    return datetime.datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
