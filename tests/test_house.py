"""
The house's own rules: who may import whom, how long things are, and that the documents are true.
    python -m pytest tests/test_house.py
"""

import ast
import glob
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import train
from configurator import configure, declarations
from methods.registry import METHODS, find
from tests.common import HERE, TINY_RUN, read_log, run

CORE = ("train", "model", "qgalore", "quant", "prepare_c4", "configurator", "sample")
ROOMS = ("kernels", "run", "methods", "finetune", "finetune/checkpoints", "finetune/data", "bench")

find("qgalore")  # lets all methods register


def paths(pattern):
    """Files of the repository, from its root, with "/"."""
    return sorted(path.replace(os.sep, "/") for path in glob.glob(pattern, root_dir=HERE))


def is_test(path):
    return path.startswith(("tests/", "test_", "conftest"))


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parse(path):
    with open(f"{HERE}/{path}", encoding="utf-8") as f:
        return ast.parse(f.read())


FILES = [path for folder in ("", *ROOMS, "tests") for path in paths(f"{folder}/*.py".lstrip("/"))]
TREES = {path: parse(path) for path in FILES}
SOURCE = [path for path in FILES if not is_test(path)]
MODULES = {module_name(path): path for path in FILES}


def imported(path):
    """The modules of this repository that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    return names & set(MODULES)


def in_room(name, room):
    return name == room or name.startswith(f"{room}.")


def functions(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def fail_if_any(faults):
    assert not faults, "\n" + "\n".join(faults)


# -----------------------------------------------------------------------------
# imports


def test_the_core_imports_neither_finetune_nor_a_method():
    faults = []
    for name in CORE:
        for other in imported(MODULES[name]):
            of_methods = in_room(other, "methods") and other not in ("methods", "methods.registry")
            if in_room(other, "finetune") or of_methods:
                faults.append(f"{name} imports {other}")
    fail_if_any(faults)


def test_kernels_and_run_reach_finetune_by_foreign_alone():
    faults = []
    for path in SOURCE:
        if path.startswith(("kernels/", "run/")) and path != "run/foreign.py":
            for other in imported(path):
                if in_room(other, "finetune"):
                    faults.append(f"{path} imports {other}")
    fail_if_any(faults)


def test_only_tests_and_bench_import_train():
    faults = []
    for path in SOURCE:
        if not path.startswith("bench/") and "train" in imported(path):
            faults.append(path)
    fail_if_any(faults)


def circle(graph):
    """The names along a circle in {name: names that it leads to}, or None."""
    finished = set()
    way = []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in finished:
            return None
        way.append(name)
        for other in sorted(graph[name]):
            found = visit(other)
            if found:
                return found
        way.pop()
        finished.add(name)
        return None

    for name in sorted(graph):
        found = visit(name)
        if found:
            return found
    return None


def test_there_is_no_circle_of_imports():
    """Those inside functions count, and those by name in run/foreign.py."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    graph = {module_name(path): imported(path) for path in SOURCE}
    assert "finetune.checkpoints.hf_load" in graph["run.foreign"]
    found = circle(graph)
    assert found is None, " -> ".join(found)


# -----------------------------------------------------------------------------
# sizes and names


def test_the_core_has_at_most_1600_lines():
    lines = {}
    for name in ("train", "model", "qgalore", "quant"):
        with open(f"{HERE}/{name}.py", encoding="utf-8") as f:
            lines[name] = len(f.readlines())
    assert sum(lines.values()) <= 1600, lines


def test_no_function_is_longer_than_90_lines():
    faults = []
    for path in SOURCE:
        for node in functions(path):
            lines = node.end_lineno - node.lineno + 1
            if lines > 90:
                faults.append(f"{path}: {node.name} has {lines} lines")
    fail_if_any(faults)


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_a_room_says_what_lives_in_it(room):
    words = ast.get_docstring(TREES[f"{room}/__init__.py"])
    assert words and 3 <= len(words.splitlines()) <= 15


def test_names_of_tests_have_at_most_60_characters():
    faults = []
    for path in FILES:
        if is_test(path):
            for node in functions(path):
                if node.name.startswith("test_") and len(node.name) > 60:
                    faults.append(f"{path}: {node.name} has {len(node.name)} characters")
    fail_if_any(faults)


NAMES_A_METHOD = {  # file: names that may stand for a method's name, or None: a format's mark
    "train.py": ("method", "project"),
    "prepare_c4.py": ("protocol",),  # of GaLore's data, whichever method trains on it
    "run/protocol.py": ("GALORE",),
    "finetune/hf.py": None,
    "finetune/checkpoints/hf_config.py": None,
}


def test_only_methods_know_methods_by_name():
    """No file outside of methods/ and bench/ has one as a text, to compare with or to look up."""
    faults = []
    for path in SOURCE:
        if path.startswith(("methods/", "bench/")):
            continue
        tree = parse(path)
        allowed = NAMES_A_METHOD.get(path, ())
        for node in tree.body:
            if allowed and isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target) in allowed:
                    node.value = ast.Constant(None)
                    node.annotation = ast.Constant(None)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if node.value in METHODS and not (allowed is None and node.value == "qgalore"):
                faults.append(f"{path}:{node.lineno}: {node.value!r}")
    fail_if_any(faults)


# -----------------------------------------------------------------------------
# the commands that documents show


def code_lines(text):
    """The lines of a document's code blocks, but for Python's; continued lines are one."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.S)
    fenced = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    text = re.sub(r"\\\n\s*", " ", text)
    indented = re.findall(r"^    +(.*)", text, flags=re.M)
    return [*"\n".join(fenced).replace("\\\n", " ").splitlines(), *indented]


def shell_variables(text):
    """{"$T": what the document puts into T}."""
    found = re.findall(r'^ +([A-Z]+)="([^"]*)"', text, flags=re.M)
    return {f"${name}": value.replace("\n", " ") for name, value in found}


def documents():
    """(where, text) of all documents, of modules' docstrings and of config files' comments."""
    for path in ["README.md", *paths("docs/*.md")]:
        with open(f"{HERE}/{path}", encoding="utf-8") as f:
            yield path, f.read()
    for path in SOURCE:
        words = ast.get_docstring(TREES[path], clean=False) or ""
        if words:
            yield path, words
    for path in paths("config/*.py"):
        with open(f"{HERE}/{path}", encoding="utf-8") as f:
            comments = re.findall(r"^#( .*)", f.read(), flags=re.M)
        yield path, "\n".join(f"   {line}" for line in comments)


def shown_commands():
    """(where, words of a command that begins with python or torchrun)."""
    for path, text in documents():
        variables = shell_variables(text)
        inline = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
        for line in [*code_lines(text), *inline]:
            for name, value in variables.items():
                line = re.sub(re.escape(name) + r"\b", lambda _: value, line)
            for command in commands_of(line):
                yield path, command


def commands_of(line):
    """The python and torchrun commands of a line of shell, each a list of words."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that began or ends on another line
        words = shlex.split(re.sub(r"['\"]", " ", line), comments=True)
    found = []
    command = []
    for word in [*words, "&&"]:
        if word not in ("&&", "||", ";", "|", "&"):
            command.append(word)
            continue
        while command and re.match(r"[A-Z_]+=", command[0]):  # a variable set for it
            command.pop(0)
        if command and command[0] in ("python", "torchrun"):
            found.append(command)
        command = []
    return found


def configured(path):
    """(modules, whether unknown names are ignored) of a script's own call of configure()."""
    module = importlib.import_module(module_name(path))
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "configure":
            of_train = ("train", "train_settings()")
            modules = [train if ast.unparse(arg) in of_train else module for arg in node.args]
            return modules, any(keyword.arg == "ignore_unknown" for keyword in node.keywords)
    raise AssertionError(f"{path} has no settings")


def program(command):
    """(path of what a command runs, or None if it is none of ours; its arguments)."""
    if command[0] == "torchrun":
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        return command[at], command[at + 1 :]
    if command[1] == "-c":
        return None, []
    if command[1] != "-m":
        return command[1], command[2:]
    name = command[2]
    path = MODULES.get(name, f"{name.replace('.', '/')}.py")
    if path.endswith("/__init__.py"):
        path = path.replace("__init__", "__main__")
    return path, command[3:]


def fault_of(command):
    """What is wrong with a command that a document shows, or None."""
    if command[1:3] == ["-m", "pytest"]:
        missing = [word for word in command if word.endswith(".py") and not exists(word)]
        return f"there is no {missing[0]}" if missing else None
    path, args = program(command)
    if path is None:
        return None
    if path not in FILES:
        return f"there is no {path}"
    modules, ignore_unknown = configured(path)
    known = {}
    for module in modules:
        known |= declarations(module)

    argv = []
    open_choice = False  # a method that the reader fills in
    for word in args:
        word = word.strip("[]")
        if word in ("...", "--help"):
            continue
        if not word.startswith("--"):
            if not exists(word):
                return f"there is no config file {word}"
            argv.append(word)
            continue
        name, _, value = word[2:].partition("=")
        if name not in known:
            return f"{path} has no setting {name}"
        if re.fullmatch(r"[A-Z_]+", value):  # for the reader to fill in
            open_choice |= name == "method"
        else:
            argv.append(word)
    try:
        s = configure(*modules, argv=argv, ignore_unknown=ignore_unknown)
        if modules == [train] and not open_choice and s.method != example()[0]:
            s.pretrained = "" if s.init_from in ("scratch", "resume") else s.init_from
            find(s.method).settle(s)
    except SystemExit as e:
        return str(e)
    return None


def exists(path):
    return os.path.exists(f"{HERE}/{path}")


def test_commands_in_documents_name_what_there_is(monkeypatch):
    """Scripts, config files, settings and their values, and settings that the method reads."""
    monkeypatch.chdir(HERE)
    commands = list(shown_commands())
    assert len(commands) > 80
    faults = []
    for where, command in commands:
        fault = fault_of(command)
        if fault:
            faults.append(f"{where}: {shlex.join(command)}\n    {fault}")
    fail_if_any(faults)


def programs(text):
    """The Python that a document shows, in blocks and in commands."""
    yield from re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for program in re.findall(r'(?:python -c |CAP=)"([^"$]+)"', text):
        yield program.replace("\n    ", "\n")


def test_programs_in_documents_use_names_that_exist():
    """Those of our modules that they import, and of their attributes."""
    faults = []
    for path, text in documents():
        for program in programs(text):
            ours = {}  # {name: module}
            used = []  # (module, name)
            for node in ast.walk(ast.parse(program)):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name in MODULES:
                            ours[alias.name] = alias.name
                elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                    for alias in node.names:
                        if f"{node.module}.{alias.name}" in MODULES:
                            ours[alias.name] = f"{node.module}.{alias.name}"
                        else:
                            used.append((node.module, alias.name))
            for node in ast.walk(ast.parse(program)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ours:
                    used.append((ours[ast.unparse(node.value)], node.attr))
            for module, name in used:
                if not hasattr(importlib.import_module(module), name):
                    faults.append(f"{path}: {module} has no {name}")
    fail_if_any(faults)


@pytest.mark.parametrize("line,words", [
    ("python nothing.py", "no nothing.py"),
    ("python -m finetune.nothing --out=x", "no finetune/nothing.py"),
    ("python -m bench config/nothing.py", "no config file config/nothing.py"),
    ("python train.py --nothing=1", "no setting nothing"),
    ("python train.py --method=adamw --rank=RANK", None),
    ("python train.py --method=adamw --rank=8", "does not read rank"),
    ("python train.py --method=METHOD --rank=8", None),
    ("python -m bench config/demo.py --steps=0", "at least 1"),
    ("torchrun --standalone --nproc_per_node=2 train.py config/demo.py --x=1", "no setting x"),
    ("python -m pytest tests/test_nothing.py", "no tests/test_nothing.py"),
])
def test_a_command_that_is_wrong_is_found(monkeypatch, line, words):
    monkeypatch.chdir(HERE)
    fault = fault_of(shlex.split(line))
    assert fault is None if words is None else words in fault


# -----------------------------------------------------------------------------
# methods


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_reads_and_fixes(name):
    method = METHODS[name]
    known = declarations(train)
    assert method.about and "\n" not in method.about
    assert method.weight_bits
    assert set(method.reads) | set(method.fixes) <= set(known)
    assert not set(method.reads) & set(method.fixes)
    for setting, value in method.fixes.items():
        allowed = known[setting].allowed
        assert type(value) is type(known[setting].default)
        assert allowed is None or allowed.holds(value)


def test_the_documents_name_every_method():
    for path in ("README.md", "docs/methods.md"):
        with open(f"{HERE}/{path}", encoding="utf-8") as f:
            words = f.read()
        missing = [name for name in METHODS if f"`{name}`" not in words]
        assert not missing, f"{path} leaves out {missing}"


def example():
    """(name, code) of the method that docs/methods.md adds."""
    with open(f"{HERE}/docs/methods.md", encoding="utf-8") as f:
        section = f.read().partition("\n## Add a method\n")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, flags=re.S)[1]
    return re.search(r'@register\(\s*"(\w+)"', code)[1], code


def test_the_documents_method_has_ten_lines():
    name, code = example()
    assert name not in METHODS
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_the_documents_method_trains(shards, tmp_path):
    """One more file in a copy of the repository is all that it takes."""
    name, code = example()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in paths("*.py"):
        if not is_test(path):
            shutil.copy(f"{HERE}/{path}", copy)
    for room in ("config", "kernels", "run", "methods", "finetune"):
        shutil.copytree(f"{HERE}/{room}", copy / room,
                        ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "methods" / f"{name}.py").write_text(code)

    args = [f"--data_dir={shards}", *TINY_RUN, "--max_iters=10", "--eval_interval=10"]
    command = [sys.executable, "train.py", *args, f"--method={name}", f"--out_dir={tmp_path}/new"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    code, _, err = run("train.py", *args, "--method=qgalore", f"--out_dir={tmp_path}/old")
    assert code == 0, err
    new = read_log(tmp_path / "new")
    old = read_log(tmp_path / "old")
    assert new[0, "val_loss"] == old[0, "val_loss"]  # one seed, one model
    assert new[10, "val_loss"] < new[0, "val_loss"] - 0.1
    assert abs(new[10, "val_loss"] - old[10, "val_loss"]) > 1e-4
