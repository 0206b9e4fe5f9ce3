"""
Settings: a script's defaults, config files, flags; and train.py's own, by method:
    python -m pytest tests/test_configurator.py
"""

import glob
import importlib.util
import math
import os
import sys

import pytest

import sample
import train
from configurator import configure, declarations
from methods.registry import METHODS, find
from tests.common import HERE, one_line_error, run, script, settings

NAMES = ("demo_methods", "llama_60m_methods", "c4_60m", "c4_130m")
FOR_ANY_METHOD = [f"{HERE}/config/{name}.py" for name in NAMES]
RECIPES = sorted(set(glob.glob(f"{HERE}/config/*.py")) - set(FOR_ANY_METHOD))

SCRIPT = '''"""What this script does:
    python script.py config.py
"""

import math
from math import pi
from configurator import above, at_least, between, one_of

TABLE = {}
LIMIT = 5
# -----------------------------------------------------------------------------
# output
out_dir = "out"  # where results go
color: one_of("red", "green") = "red"
# numbers
rate: at_least(0) = 0.5  # the first rate
steps: at_least(1) = 10  # how many
share: between(0, 1) = 0.25
scale: above(0) = 1.0
flag = False  # a truth
_hidden = 3
a, b = 1, 2
nothing = None
# -----------------------------------------------------------------------------


def main():
    pass


later = 7
'''


def load(path):
    """A script's module."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def module(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return load(str(tmp_path / "script.py"))


@pytest.fixture
def write(tmp_path):
    """write(name, text) makes a config file; returns its path."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def refusal(module, *argv):
    """The one line with which these arguments are refused."""
    with pytest.raises(SystemExit) as e:
        configure(module, argv=[*argv])
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


# -----------------------------------------------------------------------------
# what a setting is


def test_settings_are_what_a_script_assigns_before_main(module):
    found = declarations(module)
    assert list(found) == ["out_dir", "color", "rate", "steps", "share", "scale", "flag"]
    assert found["steps"].default == 10 and found["steps"].help == "how many"
    assert [s.section for s in found.values()] == ["output"] * 2 + ["numbers"] * 5


@pytest.mark.parametrize("name", ["TABLE", "LIMIT", "pi", "math", "above", "_hidden", "a", "later",
                                  "nothing", "main", "given", "TABL"])
def test_constants_and_imports_are_no_settings(module, write, name):
    assert f"no setting {name!r}" in refusal(module, f"--{name}=5")
    if not name.startswith("_"):  # in a file such a name is the file's own
        assert f"no setting {name!r}" in refusal(module, write("config.py", f"{name} = 5\n"))


def test_train_has_settings_and_no_constants():
    names = declarations(train)
    assert {"out_dir", "learning_rate", "seed", "rank_timeout", "proj_side"} <= names.keys()
    assert all(setting.section for setting in names.values())
    for constant in ("GIB", "IN_FLIGHT", "FORMAT", "SKETCH", "os", "torch"):
        assert constant not in names
        assert "no setting" in refusal(train, f"--{constant}=5")


def test_settings_are_read_by_name_and_as_a_dictionary(module):
    s = configure(module, argv=["--steps=3"])
    assert s.steps == 3 and s.out_dir == "out"
    assert s.as_dict() == {"out_dir": "out", "color": "red", "rate": 0.5, "steps": 3,
                           "share": 0.25, "scale": 1.0, "flag": False}
    other = s.changed(steps=4)
    assert (other.steps, s.steps) == (4, 3) and other.given == s.given == {"steps": "--steps=3"}


def test_a_later_script_s_defaults_win(module, tmp_path):
    (tmp_path / "other.py").write_text('steps = 20  # its own\nmore = "x"\n')
    other = load(str(tmp_path / "other.py"))
    s = configure(module, other, argv=[])
    assert (s.steps, s.more, s.out_dir) == (20, "x", "out")


# -----------------------------------------------------------------------------
# values


@pytest.mark.parametrize("flag,value", [
    ("--steps=3", 3), ("--steps=1e3", 1000), ("--steps=2.0", 2), ("--rate=1", 1.0),
    ("--rate=1e-4", 1e-4), ("--flag=True", True), ("--out_dir=7", "7"), ("--out_dir=", ""),
    ("--out_dir=True", "True"), ("--out_dir=a=b", "a=b"), ("--out_dir='x'", "'x'"),
    ("--color=green", "green"), ("--share=1", 1.0), ("--share=0", 0.0),
])
def test_values_have_the_type_of_the_default(module, write, flag, value):
    name = flag[2:].partition("=")[0]
    found = getattr(configure(module, argv=[flag]), name)
    assert found == value and type(found) is type(value)
    found = getattr(configure(module, argv=[write("c.py", f"{name} = {value!r}\n")]), name)
    assert found == value and type(found) is type(value)


KIND = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text"}


@pytest.mark.parametrize("name,text,kind", [
    ("steps", "many", "int"), ("steps", "1.5", "int"), ("steps", "True", "int"),
    ("steps", "", "int"), ("steps", "1e999", "int"), ("steps", "[1]", "int"),
    ("steps", "None", "int"), ("steps", "{[]: 1}", "int"), ("steps", "1\0", "int"),
    ("flag", "1", "bool"), ("flag", "true", "bool"), ("flag", "yes", "bool"),
    ("rate", "nan", "float"), ("rate", "inf", "float"), ("rate", "-inf", "float"),
    ("rate", "1e999", "float"), ("rate", "False", "float"), ("rate", "0.1.2", "float"),
])
def test_a_value_of_a_wrong_type_is_one_line(module, name, text, kind):
    line = refusal(module, f"--{name}={text}")
    assert line.startswith(f"error: --{name}={text}: ") and f"{name} must be {KIND[kind]}" in line


@pytest.mark.parametrize("assigned,kind", [
    ("steps = 'many'", "int"), ("steps = 1.5", "int"), ("steps = [1]", "int"), ("flag = 1", "bool"),
    ("flag = None", "bool"), ("rate = float('nan')", "float"), ("rate = float('inf')", "float"),
    ("rate = -1e999", "float"), ("rate = '0.1'", "float"), ("out_dir = 7", "str"),
])
def test_a_config_files_wrong_value_is_one_line(module, write, assigned, kind):
    path = write("config.py", assigned + "\n")
    line = refusal(module, path)
    name = assigned.partition(" ")[0]
    assert path in line and f"{name} must be {KIND[kind]}" in line


@pytest.mark.parametrize("assigned,words", [
    ("steps = 0", "at least 1"), ("rate = -0.1", "at least 0"), ("share = 1.1", "between 0 and 1"),
    ("share = -0.1", "between 0 and 1"), ("scale = 0", "above 0"),
    ("color = 'blue'", "one of red, green"),
])
def test_annotations_say_which_values_are_allowed(module, write, assigned, words):
    name, _, value = assigned.partition(" = ")
    for argument in ("--" + assigned.replace(" = ", "=").replace("'", ""),
                     write("config.py", assigned + "\n"),
                     write("soft.py", f"if_read({name}={value})\n")):
        line = refusal(module, argument)
        assert f"{name} must be {words}, not {value}" in line
        if "soft" not in argument:
            assert line.startswith(f"error: {argument}")


@pytest.mark.parametrize("wrong,near", [("rat", "rate"), ("step", "steps"), ("colour", "color"),
                                        ("out_dri", "out_dir"), ("out-dir", "out_dir")])
def test_an_unknown_name_is_refused_with_the_nearest(module, write, wrong, near):
    assert f"did you mean {near!r}?" in refusal(module, f"--{wrong}=1")
    if wrong.isidentifier():
        path = write("config.py", f"{wrong} = 1\n")
        line = refusal(module, path)
        assert path in line and f"did you mean {near!r}?" in line
        line = refusal(module, write("soft.py", f"if_read({wrong}=1)\n"))
        assert f"did you mean {near!r}?" in line


def test_an_unknown_name_with_nothing_near_has_no_suggestion(module):
    assert refusal(module, "--zzzz=1") == "error: --zzzz=1: there is no setting 'zzzz'"


@pytest.mark.parametrize("argument,words", [
    ("--steps", "write it as --steps=value"), ("--", "no setting"),
    ("steps=4", "written as --steps=4"), ("-steps=4", "written as --steps=4"),
    ("--help=1", "no setting 'help'"),
    ("none.py", "config file none.py: No such file"), ("steps=3", "config file steps=3: No such"),
    ("-steps", "config file -steps: No such file"), (".", "config file .: is a folder"),
])
def test_arguments_that_are_none_are_one_line(module, tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(module, argument)


@pytest.mark.parametrize("text,words", [
    ("steps = = 3\n", "line 1: "), ("steps = 3\n  rate = 1\n", "line 2: "),
    ("steps = 3\nrate = stps\n", "line 2: NameError: name 'stps'"),
    ("def f():\n    return 1 / 0\nsteps = f()\n", "line 2: ZeroDivisionError"),
    ("include('none.py')\n", "none.py: No such file"), ("if_read(3)\n", "TypeError"),
    ("steps = int('a')\n", "ValueError"), ("include('config.py')\n", "RecursionError"),
])
def test_errors_in_a_config_file_are_one_line(module, write, text, words):
    path = write("config.py", text)
    line = refusal(module, path)
    assert words in line
    if "none" not in text:
        assert f"config file {path}" in line


def test_a_config_file_that_is_no_text_is_one_line(module, tmp_path):
    for content in (b"\xff\xfe\x00", b"\x00\x01"):
        (tmp_path / "config.py").write_bytes(content)
        assert "config.py" in refusal(module, f"{tmp_path}/config.py")


def test_the_process_ends_with_that_line_and_without_traceback():
    for argument in ("--learning_rat=1", "--batch_size=0", "none.py", "--compile"):
        one_line_error(run("train.py", argument), argument.partition("=")[0])
    one_line_error(run("sample.py", "--num_samples=0"), "--num_samples=0", "at least 1")


# -----------------------------------------------------------------------------
# files and flags


def test_flags_win_over_files_whatever_the_order(module, write):
    path = write("config.py", "steps = 20\nrate = 0.1\nsteps = 30\n")
    for argv in (["--steps=5", path], [path, "--steps=5"], [path, path, "--steps=5"]):
        s = configure(module, argv=argv)
        assert (s.steps, s.rate) == (5, 0.1)
        assert s.given == {"steps": "--steps=5", "rate": path}


def test_the_last_flag_and_the_last_file_win(module, write):
    first = write("first.py", "steps = 20\n")
    second = write("second.py", "steps = 30\n")
    assert configure(module, argv=["--steps=5", "--steps=6"]).steps == 6
    assert configure(module, argv=[first, second]).steps == 30
    s = configure(module, argv=[second, first])
    assert s.steps == 20 and s.given == {"steps": first}


def test_a_config_file_sees_flags_and_what_files_set_before(module, write):
    path = write("config.py", "rate = steps / 100\nout_dir = 'out-' + color\n")
    for argv in (["--steps=50", "--color=green", path], [path, "--color=green", "--steps=50"]):
        s = configure(module, argv=argv)
        assert (s.rate, s.out_dir) == (0.5, "out-green")
    assert configure(module, argv=[path]).rate == 0.1
    earlier = write("earlier.py", "steps = 70\n")
    assert configure(module, argv=[earlier, path]).rate == 0.7
    # a name that a flag sets keeps its value within the file
    path = write("config.py", "steps = 20\nrate = steps / 100\nsteps += 1\n")
    s = configure(module, argv=[path, "--steps=50"])
    assert (s.steps, s.rate) == (50, 0.5)
    assert configure(module, argv=[path]).steps == 21


def test_a_config_files_own_names_functions_and_imports_are_its(module, write):
    text = """
import math
from os.path import join
_third = 3
_half = [n for n in range(3)][1]
def root(x):
    return math.sqrt(x)
rate = root(16) + _third
out_dir = join("a", "b")
"""
    s = configure(module, argv=[write("config.py", text)])
    assert s.rate == 7.0 and s.out_dir == os.path.join("a", "b")
    assert not hasattr(s, "root") and not hasattr(s, "_third")


def test_include_reads_from_the_config_files_own_folder(module, write, tmp_path, monkeypatch):
    write("base.py", "steps = 20\nrate = 0.1\nout_dir = 'base-' + color\n")
    write("deep/base.py", "share = 0.5\ninclude('../base.py')\ninclude('more.py')\nrate = 0.2\n")
    write("deep/more.py", "scale = 3.0\n")
    path = write("top.py", "include('deep/base.py')\nsteps = 30\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        monkeypatch.chdir(folder)
        s = configure(module, argv=[os.path.relpath(path), "--color=green"])
        assert (s.steps, s.rate, s.share, s.scale, s.out_dir) == (30, 0.2, 0.5, 3.0, "base-green")
        s = configure(module, argv=[path, "--steps=1"])
        assert (s.steps, s.out_dir) == (1, "base-red")
    # an error names the file that it is in
    write("deep/more.py", "scale = big\n")
    assert f"deep{os.sep}more.py, line 1: NameError" in refusal(module, path)
    write("deep/more.py", "scale = 'big'\n")
    assert f"deep{os.sep}more.py: scale must be a number" in refusal(module, path)


def test_after_an_include_the_file_goes_on_in_its_own_folder(module, write):
    write("deep/a.py", "steps = 20\n")
    write("a.py", "rate = 0.1\n")
    write("deep/b.py", "include('a.py')\n")
    s = configure(module, argv=[write("top.py", "include('deep/b.py')\ninclude('a.py')\n")])
    assert (s.steps, s.rate) == (20, 0.1)


def test_what_if_read_gives_does_not_count_as_given(module, write):
    path = write("config.py", "if_read(steps=20, rate=0.1)\nscale = 2.0\n")
    s = configure(module, argv=[path])
    assert (s.steps, s.rate, s.scale) == (20, 0.1, 2.0) and s.given == {"scale": path}
    # a flag counts, and wins
    s = configure(module, argv=[path, "--steps=5"])
    assert s.steps == 5 and s.given == {"scale": path, "steps": "--steps=5"}
    # so does a file that says it plainly afterwards
    path = write("plain.py", "include('config.py')\nsteps = 30\n")
    s = configure(module, argv=[path])
    assert s.steps == 30 and s.given["steps"] == path and "rate" not in s.given
    # values of if_read are seen by the rest of the file
    path = write("config.py", "if_read(steps=20)\nrate = steps / 100\n")
    assert configure(module, argv=[path]).rate == 0.2


def test_a_script_may_read_another_ones_config_file(module, write):
    path = write("config.py", "steps = 20\nother = 'x'\nif_read(more=3)\n")
    assert "no setting 'other'" in refusal(module, path)
    s = configure(module, argv=[path], ignore_unknown=True)
    assert s.steps == 20 and not hasattr(s, "other") and not hasattr(s, "more")
    with pytest.raises(SystemExit, match="no setting 'other'"):  # a flag is meant for this script
        configure(module, argv=["--other=x"], ignore_unknown=True)


@pytest.mark.parametrize("path", RECIPES + FOR_ANY_METHOD)
def test_sample_reads_the_recipe_of_a_run(path):
    s = configure(sample, argv=[path, "--num_samples=2"], ignore_unknown=True)
    assert s.out_dir.startswith("out") and s.num_samples == 2


# -----------------------------------------------------------------------------
# --help


def test_help_shows_sections_defaults_and_comments(module, capsys):
    for argv in (["--help"], ["-h"], ["--steps=3", "none.py", "--help"]):
        with pytest.raises(SystemExit) as e:
            configure(module, argv=argv)
        assert e.value.code == 0
    out = capsys.readouterr().out
    lines = [line.rstrip() for line in out[out.rindex("What this script does") :].splitlines()]
    assert lines[:4] == ["What this script does:", "    python script.py config.py", "", "output:"]
    shown = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert shown == [
        ["--out_dir=out", "where results go"],
        ["--color=red", "one of red, green"],
        ["--rate=0.5", "the first rate (at least 0)"],
        ["--steps=10", "how many (at least 1)"],
        ["--share=0.25", "between 0 and 1"],
        ["--scale=1.0", "above 0"],
        ["--flag=False", "a truth"],
    ]
    assert lines.index("numbers:") == lines.index("output:") + 4


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_c4.py"])
def test_scripts_show_every_setting_with_a_word_about_it(name):
    process = script(name, "--help")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for setting, found in declarations(load(f"{HERE}/{name}")).items():
        assert f"  --{setting}={found.default}" in out
    assert f"python {name}" in out


# -----------------------------------------------------------------------------
# train.py's settings, by method

find("qgalore")  # now METHODS holds all
SHARED = [f"{HERE}/config/demo.py", f"{HERE}/config/llama_60m.py", *FOR_ANY_METHOD]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", SHARED)
def test_every_method_takes_the_shared_recipes(path, method):
    found = []
    for argv in ([path, f"--method={method}"], [f"--method={method}", path]):
        s = settings(*argv)
        assert s.method == method and s.weight_bits in METHODS[method].weight_bits
        for setting, value in METHODS[method].fixes.items():
            assert getattr(s, setting) == value
        if path in FOR_ANY_METHOD:
            assert s.out_dir.endswith("-" + method)
        found.append(s.as_dict())
    assert found[0] == found[1]


@pytest.mark.parametrize("path", RECIPES + FOR_ANY_METHOD)
def test_every_recipe_is_for_qgalore(path):
    s = settings(path)
    assert s.method == "qgalore" and s.weight_bits == 8


@pytest.mark.parametrize("path", [path for path in RECIPES if "/llama_" in path])
@pytest.mark.parametrize("more", [["--method=qmuon"], ["config/paper.py"], ["--method=adamw"]])
def test_the_papers_recipes_take_other_methods(path, more, monkeypatch):
    monkeypatch.chdir(HERE)
    s = settings(path, *more)
    assert s.learning_rate <= 0.015 and s.block_size == 256
    if more == ["config/paper.py"]:
        assert (s.method, s.moments, s.proj_svd) == ("qgalore", "8bit", True)


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_name_their_method(path):
    """What train.py takes by default may change; a recipe may not."""
    s = configure(train, argv=[path])
    assert s.method == "qgalore" and "method" in s.given


@pytest.mark.parametrize("path", [path for path in RECIPES if "finetune" in path])
@pytest.mark.parametrize("method", ["qgalore", "lora", "qlora", "adamw"])
def test_fine_tuning_recipes_take_other_methods(path, method):
    before = set(sys.modules)
    s = settings(path, f"--method={method}")
    assert s.method == method and s.freeze_embedding and s.init_from != "scratch"
    if "rank" in METHODS[method].reads:
        assert s.rank == 64
    assert "transformers" not in set(sys.modules) - before  # nothing is loaded


def test_a_shared_recipe_computes_the_rate_whatever_the_order():
    path = f"{HERE}/config/demo_methods.py"
    for method, rate in (("adamw", 0.001), ("qmuon", 0.032), ("galore", 0.002), ("lora", 0.004)):
        for argv in ([path, f"--method={method}"], [f"--method={method}", path]):
            s = settings(*argv)
            assert s.learning_rate == rate
            assert s.out_dir == f"out-demo-{method}"
        s = settings(path, f"--method={method}", "--learning_rate=0.5")
        assert s.learning_rate == 0.5


REFUSED = [  # method, setting, a value, whether the method fixes it (or does not read it)
    ("adamw", "rank", 64, False), ("adamw", "proj_gap", 100, False),
    ("adamw", "moments", "8bit", False), ("adamw", "galore_scale", 1.0, False),
    ("adamw", "lora_alpha", 16.0, False), ("adamw", "stochastic_rounding", False, False),
    ("adam8bit", "moments", "float32", True), ("adam8bit", "proj_bits", 8, False),
    ("adam8bit", "accumulation", "float32", False), ("galore", "moments", "8bit", True),
    ("galore", "proj_bits", 4, True), ("galore", "proj_threshold", 0.4, True),
    ("galore", "lora_alpha", 2, False), ("galore8bit", "moments", "float32", True),
    ("qmuon", "rank", 2, False), ("qgalore", "lora_alpha", 16.0, False),
    ("galore", "proj_k", 3, False), ("loqt", "proj_k", 3, False),
    ("apollo", "galore_scale", 0.25, True),
    ("apollo", "proj_k", 3, False), ("apollo", "gap_growth", 1.2, False),
    ("apollo_mini", "rank", 64, True), ("loqt", "gap_growth", 1.1, True),
    ("loqt", "proj_side", "right", True), ("lora", "proj_gap", 100, False),
    ("lora", "galore_scale", 1.0, False), ("qlora", "matmul", "int8", False),
    ("relora", "proj_bits", 8, False), ("relora", "accumulation", "float32", False),
    ("welore", "rank", 64, False), ("welore", "proj_svd", True, False),
    ("muon", "proj_threshold", 0.4, False), ("qmuon", "lora_alpha", 16.0, False),
]


@pytest.mark.parametrize("method,setting,value,fixed", REFUSED)
def test_a_setting_that_a_method_ignores_is_refused(write, method, setting, value, fixed):
    """Set by flag or config file, in one line; but a recipe may give it to those that read it."""
    path = write("config.py", f"{setting} = {value!r}\n")
    for argument in (f"--{setting}={value}", path):
        with pytest.raises(SystemExit) as e:
            settings(f"--method={method}", argument)
        line = str(e.value)
        assert line.startswith(f"error: {argument}: method {method} ") and "\n" not in line
        assert setting in line and ("always" in line) == fixed
        readers = [other for other in METHODS if setting in METHODS[other].reads]
        assert all(reader in line for reader in readers)
    soft = write("soft.py", f"if_read({setting}={value!r})\n")
    s = settings(f"--method={method}", soft)
    if fixed:
        assert getattr(s, setting) == METHODS[method].fixes[setting]


def test_a_fixed_setting_may_be_given_as_it_is():
    assert settings("--method=galore", "--moments=float32", "--proj_bits=16").moments == "float32"
    assert settings("--method=adam8bit", "--moments=8bit").moments == "8bit"


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_read_fixed_or_refused(method):
    """Each setting that some methods read, for each method: never without a word."""
    of_methods = {name for m in METHODS.values() for name in m.reads}
    assert of_methods <= declarations(train).keys()
    m = METHODS[method]
    defaults = declarations(train)
    for name in sorted(of_methods):
        flag = f"--{name}={defaults[name].default}"
        if name in m.reads or m.fixes.get(name) == defaults[name].default:
            settings(f"--method={method}", flag)
            continue
        with pytest.raises(SystemExit, match=f"method {method} ") as e:
            settings(f"--method={method}", flag)
        assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("argv,words", [
    (["--method=sgd"], ["'sgd'", "qgalore", "adamw"]),
    (["--method=qgalore", "--weight_bits=4"], ["weight_bits=4", "8 or 16"]),
    (["--method=adamw", "--weight_bits=8"], ["weight_bits=8", "32 or 16"]),
    (["--embed_bits=8"], ["embed_bits=8", "freeze_embedding"]),
])
def test_what_a_method_cannot_do_is_one_line(argv, words):
    with pytest.raises(SystemExit, match="error: ") as e:
        settings(*argv)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words)


@pytest.mark.parametrize("flag", ["--rank=64", "--moments=8bit"])
def test_train_refuses_what_its_method_does_not_read(tmp_path, flag):
    result = run("train.py", "--method=adamw", flag, f"--out_dir={tmp_path}/x")
    one_line_error(result, flag, "adamw")
    assert not os.path.exists(tmp_path / "x")


def test_numbers_stay_finite_in_every_recipe():
    for path in glob.glob(f"{HERE}/config/*.py"):
        for value in settings(path).as_dict().values():
            assert not isinstance(value, float) or math.isfinite(value)
