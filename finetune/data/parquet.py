"""
Records out of .parquet files, by pyarrow.

A file streams through, some rows at a time. Each value becomes what JSON can spell, so that chat
templates take it. All rows of such a file have all its fields, also within lists and objects: a
field without a value is one that the record does not have.
"""

import contextlib
import importlib
import math

from run.files import check_file
from run.text import first_line

ROWS = 256  # that are in memory at a time


def is_parquet(path):
    return path.lower().endswith(".parquet")


def columns(path):
    """The names of a file's columns. Exits with one line if it cannot be read."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def records(path):
    """Yield (where, record) for each row, a dict. Exits with one line if it cannot be read."""
    number = 1
    with _opened(path) as file:
        batches = file.iter_batches(ROWS)
        while True:
            with _refusing(path):
                batch = next(batches, None)
                if batch is None:
                    return
                rows = batch.to_pylist(maps_as_pydicts="lossy")
            for row in rows:
                yield f"row {number}", _plain(row)
                number += 1


def library(path):
    """pyarrow.parquet. Exits with one line if it is not there."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise SystemExit(f"error: {path}: reading .parquet takes pyarrow: pip install pyarrow")


def _opened(path):
    parquet = library(path)
    with _refusing(path):
        check_file(path)
        with open(path, "rb") as f:
            start = f.read(4)
        if start != b"PAR1":
            raise SystemExit(f"error: {path}: is no parquet file: it does not start with PAR1")
        return parquet.ParquetFile(path)


@contextlib.contextmanager
def _refusing(path):
    """Whatever keeps a file from being read ends with one line."""
    try:
        yield
    except Exception as e:  # pyarrow's own kinds, the file system's
        why = getattr(e, "strerror", None)
        why = why or f"incomplete or damaged ({first_line(e)}); get it again"
        raise SystemExit(f"error: {path}: {why}")


def _plain(value):
    """A value of a row as JSON spells it; in objects, without the fields that have none."""
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items() if not _is_nothing(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, int, float)):  # and bool, which is an int
        return value
    if isinstance(value, bytes):
        return {"bytes": len(value)}  # an image, a sound: no template writes an object
    if hasattr(value, "isoformat"):  # times
        return value.isoformat()
    return str(value)  # a decimal, a span of time


def _is_nothing(value):
    return value is None or isinstance(value, float) and math.isnan(value)
