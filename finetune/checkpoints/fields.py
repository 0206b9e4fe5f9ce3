"""
The JSON files of a checkpoint, which a stranger wrote: each field is taken with its kind.

What is wrong with a file is a ValueError in one line, which names the file and the field.
"""

import os

from run.files import check_file, parse_json
from run.text import first_line

REQUIRED = object()  # no default: the field must be there


def read_json(path, name, needed=True):
    """The object in file `name` of a checkpoint directory.

    needed: False: {} if there is no such file. Raises ValueError for all that is no JSON object."""
    file = os.path.join(path, name)
    try:
        check_file(file)  # a pipe would never end
        with open(file, "rb") as f:
            found = parse_json(f.read())
    except FileNotFoundError as e:
        if not needed:
            return {}
        raise ValueError(f"{file}: {e.strerror}; a Hugging Face checkpoint has one")
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror}")
    except ValueError as e:
        raise ValueError(f"{file}: damaged, not JSON: {first_line(e)}")
    if not isinstance(found, dict):
        raise ValueError(f"{file}: damaged, not a JSON object")
    return found


def shown(value):
    """A stranger's value in a message: in one line, and not too long."""
    text = ascii(value)
    if isinstance(value, str) and value.isidentifier():
        text = value  # plain names need no quotes
    return text if len(text) <= 80 else text[:80] + "..."


class Fields:
    """A JSON object, whose fields are taken with their kinds.

    found: the object. where: its file, for messages. A field that is null counts as missing. Each
    method returns the field `key`, or `default` where it is missing, and raises ValueError for a
    field of another kind, and for one that is missing and has no default."""

    def __init__(self, found, where):
        self.found = found
        self.where = where

    def refuse(self, key, expected):
        value = shown(self.found.get(key))
        raise ValueError(f"{self.where}: {shown(key)} is {value}, expected {expected}")

    def take(self, key, kinds, expected, default):
        value = self.found.get(key)
        if value is None and default is REQUIRED:
            raise ValueError(f"{self.where}: has no {shown(key)}")
        if value is None:
            return default
        if type(value) not in kinds:  # true is no number
            self.refuse(key, expected)
        return value

    def whole(self, key, default=REQUIRED, least=1, most=2**31 - 1):
        """A whole number from `least` to `most`."""
        expected = f"a whole number from {least} to {most}"
        value = self.take(key, (int,), expected, default)
        if value is not default and not least <= value <= most:
            self.refuse(key, expected)
        return value

    def number(self, key, default=REQUIRED):
        """A number above 0."""
        expected = "a number above 0"
        value = self.take(key, (int, float), expected, default)
        # 1e999 is read as infinity, and a long integer is no float
        if value is not default and not 0 < value < 1e300:
            self.refuse(key, expected)
        return value

    def text(self, key, default=REQUIRED):
        return self.take(key, (str,), "a text", default)

    def truth(self, key, default=REQUIRED):
        return self.take(key, (bool,), "true or false", default)

    def list(self, key, default=REQUIRED):
        return self.take(key, (list,), "a list", default)

    def object(self, key):
        """The Fields of an object; empty where it is missing."""
        value = self.take(key, (dict,), "an object", {})
        return Fields(value, f"{self.where}: {shown(key)}")
