"""
The settings of a script: its defaults, then config files, then flags.
    python train.py config/llama_60m.py --batch_size=32 --learning_rate=0.01
    python train.py --help

A setting is a name that a script assigns at its top:

    batch_size: at_least(1) = 16  # sequences a micro-batch

The default gives its type, the annotation the values that it may take, the comment its help. A
comment line of its own above a setting begins a section of --help.
A config file is Python that assigns such names. It sees the values of flags, wherever these stand
in the command line, so that it may compute one setting from another. Two functions are at hand:

    include("demo.py")   # read that file here; its path counts from this file's folder
    if_read(rank=128)    # only for methods that read this setting, where rank = 128 is for all

A flag wins over a file, a later file over an earlier one.
"""

import ast
import difflib
import math
import os
import sys
import traceback
from types import SimpleNamespace

from run.files import check_file
from run.show import protect_output
from run.text import first_line


# the script whose settings config files assign: others that read one know its defaults, too
RECIPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


class Settings(SimpleNamespace):
    """Settings by name. `given` {name: where} holds those that the user set, and in what."""

    def as_dict(self):
        return {name: value for name, value in vars(self).items() if name != "given"}

    def changed(self, **values):
        """A copy with other values."""
        return Settings(**(vars(self) | values))


class Allowed:
    """The values that a setting may take, as an annotation."""

    def __init__(self, words, holds):
        self.words, self.holds = words, holds

    def __str__(self):
        return self.words


def one_of(*choices):
    return Allowed("one of " + ", ".join(map(str, choices)), lambda value: value in choices)


def at_least(low):
    return Allowed(f"at least {low}", lambda value: value >= low)


def above(low):
    return Allowed(f"above {low}", lambda value: value > low)


def from_below(low, high):
    return Allowed(f"at least {low} and below {high}", lambda value: low <= value < high)


def between(low, high):
    return Allowed(f"between {low} and {high}", lambda value: low <= value <= high)


zero_or_power_of_two = Allowed(
    "0 or a power of two", lambda value: value >= 0 and value & (value - 1) == 0
)


def configure(*modules, argv=None, ignore_unknown=False):
    """The Settings of the scripts `modules`; of two defaults the later module's counts.

    argv: default sys.argv[1:]. ignore_unknown: a config file may also assign names that these
    scripts do not have, as when sample.py reads a recipe of train.py. Exits with one line on a name
    that is unknown, a value of a wrong type or range, or a file that cannot be read.
    """
    if argv is None:  # a script of its own
        protect_output()
    declared = {}
    for module in modules:
        for name, setting in declarations(module).items():
            declared.pop(name, None)  # in the section of the module that has it last
            declared[name] = setting
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(modules[-1], declared)
        raise SystemExit(0)

    defaults = {name: setting.default for name, setting in declared.items()}
    # flags first: config files see their values
    flags, given = _flags(argv, declared, defaults)
    # then config files, in their order
    recipe = literal_settings(RECIPES) if ignore_unknown else {}
    names = _Names(recipe | defaults | flags, pinned=flags)
    for path in argv:
        if not path.startswith("--"):
            _read(path, names)
    values = dict(flags)
    for name, (value, where) in names.assigned.items():
        if ignore_unknown and name not in declared:
            continue
        _check_name(name, declared, where)
        values[name] = _typed(name, value, defaults[name], where)
        if name not in names.soft:
            given[name] = where
    for name, value in values.items():
        if name.endswith("_dir"):
            values[name] = os.path.expanduser(value)
        allowed = declared[name].allowed
        if allowed is not None and not allowed.holds(value):
            where = given.get(name, "config file")
            raise SystemExit(f"error: {where}: {name} must be {allowed}, not {_short(value)}")
    return Settings(**(defaults | values), given=given)


def _flags(argv, declared, defaults):
    """({name: value}, {name: flag}) of the command line's --name=value."""
    values = {}
    given = {}
    for place, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        name, equals, text = arg[2:].partition("=")
        _check_name(name, declared, arg)
        if not equals:
            value = "".join(argv[place + 1 : place + 2])
            if value.startswith("--") or not value:
                value = "value"
            raise SystemExit(f"error: {arg}: write it as {arg}={value}")
        values[name] = _typed(name, _literal(text, defaults[name]), defaults[name], arg)
        given[name] = arg
    return values, given


def declarations(module):
    """{name: its default, allowed values, help and section} of a script's settings.

    A setting is a plain lower-case name that the script's own source assigns a number, a truth
    value or a text, before its first function or `if`."""
    with open(module.__file__, encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines()  # comments are not in the syntax tree
    annotations = getattr(module, "__annotations__", {})
    found = {}
    last_line = 0  # of the setting before
    section = ""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
            break  # settings stand above all code
        name = _assigned_name(node)
        # imports are no assignments, so that an imported constant is no setting
        if name is None or not isinstance(getattr(module, name), (int, float, str)):
            continue
        for line in lines[last_line : node.lineno - 1]:
            if line.startswith("# ") and not line.startswith("# ---"):
                section = line[2:]  # the last comment line of its own
        last_line = node.end_lineno
        comment = lines[last_line - 1][node.end_col_offset :].partition("#")[2].strip()
        found[name] = SimpleNamespace(
            default=getattr(module, name),
            allowed=annotations.get(name),
            help=comment,
            section=section,
        )
    return found


def literal_settings(path):
    """{name: value} of the numbers, truth values and texts that a script assigns at its top."""
    with open(path, encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    return {_assigned_name(node): ast.literal_eval(node.value) for node in body
            if _assigned_name(node) and isinstance(node.value, ast.Constant)}


def _assigned_name(node):
    """The name of a setting that a statement assigns, or None."""
    if isinstance(node, ast.AnnAssign):
        target = node.target
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    else:
        return None
    if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
        return target.id
    return None


def print_help(module, declared):
    """The script's own words, then its settings with their defaults, by section."""
    print((module.__doc__ or "").strip())
    section = None
    for name, setting in declared.items():
        if setting.section != section:
            section = setting.section
            print(f"\n{section}:")
        words = setting.help
        if setting.allowed is not None:
            words += f" ({setting.allowed})" if words else str(setting.allowed)
        default = f"--{name}={setting.default}"
        print(f"  {default:38s} {words}".rstrip())


class _Names(dict):
    """What a config file sees, and what it assigns; a name that a flag sets keeps its value.

    assigned: {name: (value, path of the file)}. soft: names that if_read set, and no plain
    assignment after it."""

    def __init__(self, names, pinned):
        super().__init__(names, include=self.include, if_read=self.if_read)
        self.settings = set(names)
        self.pinned = pinned
        self.assigned = {}
        self.soft = set()
        self.path = ""  # of the file that runs

    def __setitem__(self, name, value):
        if name in self.pinned:
            return
        super().__setitem__(name, value)
        simple = isinstance(value, (int, float, str, type(None), list, tuple, dict))
        # others are imports and functions that a file uses
        if name in self.settings or simple and not name.startswith("_"):
            self.assigned[name] = (value, self.path)
            self.soft.discard(name)  # a plain assignment is meant for every method

    def include(self, name):
        _read(os.path.join(os.path.dirname(self.path), name), self)

    def if_read(self, **values):
        for name, value in values.items():
            self[name] = value
            self.soft.add(name)  # no mistake where the method does not read it


def _read(path, names):
    """Execute a config file, and those that it includes, on `names`."""
    outside = names.path  # of the file that includes this one, or ""
    names.path = path
    try:
        check_file(path)
        with open(path, encoding="utf-8-sig") as f:
            exec(compile(f.read(), path, "exec"), names)
    except IsADirectoryError:
        raise SystemExit(f"error: config file {path}: is a folder; name a file in it")
    except OSError as e:
        flag = f"; a setting is written as --{path.lstrip('-')}" if "=" in path else ""
        raise SystemExit(f"error: config file {path}: {e.strerror}{flag}")
    except SystemExit as e:
        if str(e.code).startswith("error: "):  # of a file that it includes
            raise
        raise SystemExit(f"error: config file {path}: it exits ({e.code}), before it has set all")
    except SyntaxError as e:
        line = f", line {e.lineno}" if e.lineno else ""
        raise SystemExit(f"error: config file {path}{line}: {e.msg}")
    except UnicodeDecodeError as e:
        raise SystemExit(f"error: config file {path}: byte {e.start} is not UTF-8: save it as that")
    except RecursionError:
        raise SystemExit(f"error: config file {path}: RecursionError: it includes itself, or calls "
                         "itself without an end")
    except Exception as e:  # whatever a user's program may raise
        lines = [at.lineno for at in traceback.extract_tb(e.__traceback__) if at.filename == path]
        line = f", line {lines[-1]}" if lines else ""
        raise SystemExit(f"error: config file {path}{line}: {type(e).__name__}: {first_line(e)}")
    names.path = outside


def _check_name(name, known, where):
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SystemExit(f"error: {where}: there is no setting {name!r}{hint}")


def _literal(text, default):
    """A flag's text as Python reads it, or as it is where a text is wanted."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)  # numbers, True, False
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # of a wrong type, which _typed says


def _typed(name, value, default, where):
    """`value` as the type of `default`; 1e6 is a whole number, 1 a float."""
    kind = type(default)
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    # bool is no int here, and neither nan nor inf is of any use
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise SystemExit(
            f"error: {where}: {name} must be {KINDS[kind]}, like {default!r}; found {_short(value)}"
        )
    return value


def _short(value):
    """A value as a message shows it."""
    if isinstance(value, int) and abs(value) > 1e40:  # Python itself writes no very long ones
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
