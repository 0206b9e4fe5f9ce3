r"""
Records and text out of users' files: the one reader of all scripts.

    .json .jsonl   a record a line; or one list of all; or records over several lines
    .csv .tsv      a record a row, the first row names the columns; a .tsv has no quoting
    .txt           text

All of these also with .gz or .zst, and in UTF-8, or what the byte order mark says (sources.py). A
record that cannot be read is a ValueError in its place, which
whoever reads counts and says (Skipped). A file that cannot be read is refused in one line.

A file streams through: memory holds a block of it, and at most LONGEST bytes of a line.
"""

import codecs
import csv
import glob
import io
import json
import os
import re

from run.files import check_file, parse_json
from run.manifest import NAME as MANIFEST
from run.sources import ENDINGS, NOT_UTF8, NULS, decode, open_source
from run.text import first_line

BLOCK = 1 << 20  # bytes of lines that go to a worker at a time
LONGEST = 1 << 25  # bytes of a line: 32 MiB; a longer one is no record
BETWEEN = re.compile(r"[ \t\r\n,]*")  # values of JSON


def matching(pattern, name="input"):
    """The files that a setting's path or glob names, in order. Exits with one line without any.

    A path that is there is meant as it stands, whatever brackets it has."""
    pattern = os.path.expanduser(pattern)
    if not pattern:
        raise SystemExit(f"error: --{name} is missing: name a file, or several by a glob")
    found = [pattern]
    if not os.path.exists(pattern):
        escaped = pattern.replace("[", "[[]")
        found = glob.glob(pattern, recursive=True) or glob.glob(escaped, recursive=True)
    # shards.json lies beside shards, and tells of them
    found = [path for path in found if path == pattern or os.path.basename(path) != MANIFEST]
    files = sorted(path for path in found if not os.path.isdir(path))
    for path in files:
        try:
            check_file(path)
        except OSError as e:
            raise SystemExit(f"error: {path}: {e.strerror}")
    if files:
        return files
    why = "no such file"
    if found:
        why = "is a folder: name its files, as in folder/*.jsonl"
    raise SystemExit(f"error: {name}={pattern}: {why}")


def kind_of(path):
    """("json", "jsonl", "csv", "tsv" or "txt"; "gz", "zst" or None) by a file's name.

    Exits with one line if it has another ending."""
    match = re.fullmatch(r".+\.(jsonl?|csv|tsv|txt)(?:\.(gz|zst))?", path, re.S | re.I)
    if not match:
        raise SystemExit(f"error: {path}: expected {ENDINGS}")
    kind, compression = match.groups()
    return kind.lower(), compression and compression.lower()


def table_or_json(path):
    """The kind of a file of records. Exits with one line if it is of another."""
    kind, _ = kind_of(path)
    if kind == "txt":
        raise SystemExit(
            f"error: {path}: is text, where records were expected: .jsonl, .json, .csv or .tsv"
        )
    return kind


def stem_of(path):
    """What the shards of a file are called by: its name without endings.

    There is no "_" in it: the training shard of x_val.txt would match *_val_*.bin, too. Nor is it
    hidden, or too long for a file's name."""
    name = os.path.basename(path)
    stem = re.sub(r"\.(jsonl?|csv|tsv|txt|parquet)(\.(gz|zst))?$", "", name, flags=re.I)
    stem = stem.replace("_", "-").lstrip(".")
    return os.fsencode(stem)[:150].decode(errors="ignore") or "text"


class Skipped(dict):
    """What was left out: {reason: [how often, the first one's place]}."""

    def add(self, reason, where, count=1):
        self.setdefault(reason, [0, where])[0] += count

    def merge(self, other):
        """Add what a later block left out."""
        for reason, (count, where) in other.items():
            self.add(reason, where, count)

    def say(self, path, of=None, unit="records"):
        """Print a line for each reason, the most frequent first, of at most eight.

        of: how many there were in all, where that is known."""
        of_all = "" if of is None else f" of {of:,}"
        by_count = sorted(self.items(), key=lambda item: -item[1][0])
        for reason, (count, where) in by_count[:8]:
            print(f"{path}: {count:,}{of_all} {unit} left out: {reason} (the first: {where})")
        more = sum(count for _, (count, _) in by_count[8:])
        if more:
            print(f"{path}: {more:,}{of_all} {unit} left out for other reasons")

    @property
    def total(self):
        return sum(count for count, _ in self.values())


# -----------------------------------------------------------------------------
# records


def records(path, columns=""):
    """Yield (where, record) for each record of a file: a dict, or a ValueError that says why not.

    columns: the fields of a .csv or .tsv, comma separated; "": its first row names them. Exits with
    one line if the file cannot be read."""
    kind = table_or_json(path)
    with open_source(path) as stream:
        try:
            for block in record_blocks(stream, kind, columns):
                yield from records_in(block)
        except ValueError as e:
            raise SystemExit(f"error: {path}: {first_line(e)}")


def record_blocks(stream, kind, columns=""):
    """Cut a stream of records into blocks, which records_in reads, in any process.

    stream: an open_source, or another io.BufferedReader of UTF-8. kind: as kind_of gives it. Raises
    ValueError if a table or a list is damaged: what is after that place cannot be told."""
    if kind in ("csv", "tsv"):
        yield from _batches(_rows(stream, kind, columns))
    elif _has_a_value_a_line(stream.peek(), kind):
        yield from line_blocks(stream)
    else:
        yield from _batches(_values(stream))


def records_in(block):
    """Yield (where, record or ValueError) for each record of a block."""
    if isinstance(block, list):
        yield from block
        return
    first, lines = block
    for i, line in enumerate(io.BytesIO(lines)):
        if not line.isspace():
            yield f"line {first + i}", _record(line)


def texts_in(block, skipped):
    """Yield the "text" of each record of a block; `skipped`, a Skipped, gets what has none."""
    for where, record in records_in(block):
        if isinstance(record, ValueError):
            skipped.add(str(record), where)
        elif not isinstance(record.get("text"), str):
            skipped.add('no string "text"', where)
        else:
            yield record["text"]


def _record(line):
    """The object that a line of JSON is, or a ValueError."""
    try:
        return _object(parse_json(_text_of_line(line)))
    except json.JSONDecodeError:
        return ValueError("not JSON")
    except ValueError as e:
        return e


def _text_of_line(line):
    """The text of a line. Raises ValueError if it is none, or too long."""
    if len(line) > LONGEST + 2:  # with its end
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    return decode(line).removeprefix("\ufeff")  # a file that was appended to another


def _object(value):
    """A value if it is a record, or a ValueError that says why not."""
    if isinstance(value, (dict, ValueError)):
        return value
    return ValueError("not a JSON object")


def line_blocks(stream):
    """Cut a stream at ends of lines. Yields (number of the first line, bytes of whole lines).

    Of a line longer than LONGEST the rest is not kept: it is too long all the same."""
    first = 1
    while block := stream.read(BLOCK):
        if not block.endswith(b"\n"):
            block += stream.readline(LONGEST + 3)
        if not block.endswith(b"\n"):  # at the end, or too long
            while rest := stream.readline(BLOCK):
                if rest.endswith(b"\n"):
                    break
            block += b"\n"
        yield first, block
        first += block.count(b"\n")


def _batches(found):
    """Lists of `found`, (where, record or ValueError), of about BLOCK bytes."""
    batch = []
    size = 0
    for where, record in found:
        batch.append((where, record))
        size += len(str(record))
        if size >= BLOCK:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


# -----------------------------------------------------------------------------
# JSON that lines do not divide


def _has_a_value_a_line(start, kind):
    """Whether JSON that starts with these bytes has a value on each line."""
    line, newline, rest = start.lstrip().partition(b"\n")
    line = line.rstrip()
    if line.startswith(b"["):
        # a .jsonl may have lists of numbers by mistake; one of records is the whole file
        return kind == "jsonl" and not re.match(rb"\[\s*(\{|$)", line)
    if not newline or not line.startswith(b"{"):
        return True
    # a value goes on in the next line if what is no JSON, or no JSON yet, comes after its start
    text = (line + b"\n" + rest.lstrip()).decode(errors="replace")
    first = text.index("\n")
    try:
        _, end = json.JSONDecoder(parse_int=str).raw_decode(text)
    except json.JSONDecodeError as e:
        end = e.pos
    except RecursionError:
        end = 0
    return end <= first + 1


def _values(stream):
    """Yield (where, record or ValueError) for each value; those of a list one by one.

    Raises ValueError if it is no JSON."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    text = ""
    at = 0  # what is before was given
    in_list = False
    ended = False
    number = 1
    while True:
        at = BETWEEN.match(text, at).end()
        if text.startswith("]" if in_list else "[", at):
            in_list = not in_list
            at += 1
            continue
        try:
            found = _value(text, at, ended) if at < len(text) else None
            if found:
                value, at = found
                yield f"record {number}", _object(value)
                number += 1
            elif ended:
                break
            else:
                # more of it: twice as much each time, so that a long value is not read too often
                text = text[at:]
                at = 0
                data = stream.read(max(BLOCK, len(text)))
                ended = not data
                text += _more_text(data, utf8, len(text))
        except ValueError as e:
            raise ValueError(f"record {number}: {first_line(e)}")
    if in_list:
        raise ValueError(f"record {number}: incomplete or damaged (the list has no end)")


def _value(text, at, ended):
    """(the JSON value at a place in a text, where it ends), or None where the text may go on.

    ended: it does not. Raises ValueError if there is none."""
    not_numbers = []  # NaN and the like
    decoder = json.JSONDecoder(parse_constant=not_numbers.append)
    try:
        value, end = decoder.raw_decode(text, at)
    except json.JSONDecodeError as e:
        if ended:
            raise ValueError(f"incomplete or damaged ({e.msg})")
        return None
    except RecursionError:
        raise ValueError("nested too deeply")
    if end == len(text) and not ended:
        return None  # a number may have more digits
    if not_numbers:
        value = ValueError(f"{not_numbers[0]} is no number in JSON")
    return value, end


def _more_text(data, utf8, pending):
    """The text of more bytes, by an incremental decoder. Raises ValueError if it is none.

    pending: characters of the value that it goes on with."""
    if pending > LONGEST:
        raise ValueError(f"damaged, or longer than {LONGEST >> 20} MiB")
    if b"\0" in data:
        raise ValueError(f"here or soon after: {NULS}")
    try:
        return utf8.decode(data, final=not data)
    except UnicodeDecodeError:
        raise ValueError(f"here or soon after: {NOT_UTF8}")


# -----------------------------------------------------------------------------
# tables


def _rows(stream, kind, columns):
    """Yield (where, record or ValueError) for each row. Raises ValueError if it is no table."""
    csv.field_size_limit(LONGEST)
    if kind == "tsv":  # no quoting: in SST-2 a quotation mark is a word
        rows = csv.reader(_lines(stream), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(_lines(stream), strict=True)
    names = [name.strip() for name in columns.split(",")] if columns else None
    _check_names(names or [], "columns")
    while True:
        where = f"line {rows.line_num + 1}"  # where the row begins
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise ValueError(f"{where}: {e}; is a quotation mark open, or not doubled?")
        if row is None:
            return
        if not any(field.strip() for field in row):
            continue
        if names is None:
            names = [name.strip() for name in row]
            _check_names(names, where)
        elif len(row) != len(names):
            yield where, ValueError(f"{len(row)} fields instead of {len(names)}, {','.join(names)}")
        elif row != names:  # named by the user, and by the file, too
            yield where, dict(zip(names, row))


def _check_names(names, where):
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{where}: two columns are called {name!r}: name all by --columns")


def _lines(stream):
    """The text of each line; csv takes those apart that end with a lone carriage return, too."""
    for first, block in line_blocks(stream):
        for i, line in enumerate(io.BytesIO(block)):
            try:
                text = _text_of_line(line)
            except ValueError as e:
                raise ValueError(f"line {first + i}: {e}")
            yield from re.split(r"(?<=\r)(?!\n)", text)
