"""
Overrides a script's settings, its module-level names, from config files and flags, in the order given:
    python train.py config/llama_60m.py --batch_size=32 --learning_rate=0.01
A config file is Python: it assigns names that the script already has, and may read the values set so far.
"""

import ast
import difflib
import sys


def configure(settings, argv=None, skip_unknown_in_files=False):
    """Apply argv (default sys.argv[1:]) to `settings`, a script's globals(), in place.

    A setting is any public module-level int, float, bool or str; its default's type is the type it keeps.
    skip_unknown_in_files: let a script read another script's recipe for the names they share.
    Returns {name: value} of all settings. Exits with one line on an unknown name, a wrong type or a missing file.
    """
    config = {k: v for k, v in settings.items() if not k.startswith("_") and isinstance(v, (int, float, str))}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if not equals:
                raise SystemExit(f"error: {arg}: write it as --key=value")
            default = config[_known(key, config, arg)]
            config[key] = _typed(key, _literal(text, default), default, arg)
        else:
            names = dict(config)
            try:
                with open(arg) as f:
                    exec(compile(f.read(), arg, "exec"), names)
            except OSError as e:
                raise SystemExit(f"error: config file {arg}: {e.strerror}")
            except SyntaxError as e:
                raise SystemExit(f"error: config file {arg}, line {e.lineno}: {e.msg}")
            for key, value in names.items():
                if key.startswith("_") or not isinstance(value, (int, float, str, type(None), list, tuple, dict)):
                    continue  # imports and functions that the file uses
                if key not in config and skip_unknown_in_files:
                    continue
                default = config[_known(key, config, arg)]
                config[key] = _typed(key, value, default, arg)
    settings.update(config)
    return config


def _known(key, config, where):
    if key in config:
        return key
    near = difflib.get_close_matches(key, config, n=1)
    raise SystemExit(f"error: {where}: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _literal(text, default):
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _typed(key, value, default, where):
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e6
        return int(value)
    if type(value) is not kind:
        raise SystemExit(f"error: {where}: {key} must be {kind.__name__}, like {default!r}; found {value!r}")
    return value
