"""
A user's file as UTF-8 bytes: unpacked, without its byte order mark, and refused in one line if it
cannot be read. Nothing is guessed, and nothing replaced.
"""

import codecs
import contextlib
import gzip
import importlib
import io
import os
import zlib

from run.files import check_file
from run.text import first_line

ENDINGS = ".json, .jsonl, .csv, .tsv or .txt, or one of these with .gz or .zst"
NOT_UTF8 = "not UTF-8: convert it, as by iconv -f WINDOWS-1252 -t UTF-8"
NULS = "has NUL bytes: if it is UTF-16, convert it by iconv -f UTF-16LE -t UTF-8"

BOMS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # how such data starts


class Source(io.RawIOBase):
    """A file's text as UTF-8 bytes: decompressed, and without its byte order mark.

    file: as it lies on the disk, `size` bytes; file.tell() says how much of it was read. Whatever
    keeps it from being read ends with one line."""

    def __init__(self, path):
        self.path = path
        self.pending = b""  # read, and not given yet
        self.decoder = None
        with self._refusing():
            check_file(path)
            self.file = open(path, "rb")
            self.size = os.fstat(self.file.fileno()).st_size
            self.stream = decompressed(self.file, path)
            start = self._read(4)
        for mark, kind in COMPRESSED.items():
            if start.startswith(mark):
                raise SystemExit(
                    f"error: {path}: holds data of {kind}, which its name does not tell: "
                    f"unpack it, or name it as it is ({ENDINGS})"
                )
        for mark, encoding in BOMS.items():
            if start.startswith(mark):
                start = start[len(mark) :]
                if encoding != "utf-8":
                    self.decoder = codecs.getincrementaldecoder(encoding)()
                break
        with self._refusing():
            self.pending = self._as_utf8(start, final=False)

    def readable(self):
        return True

    def readinto(self, buffer):
        count = 0
        while count < len(buffer) and (self.pending or self._more()):
            some = self.pending[: len(buffer) - count]
            buffer[count : count + len(some)] = some
            self.pending = self.pending[len(some) :]
            count += len(some)
        return count

    def _more(self):
        """Read on; False at the end."""
        with self._refusing():
            data = self.stream.read(1 << 16)
            self.pending = memoryview(self._as_utf8(data, final=not data))
        return bool(data)

    def close(self):
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()

    def _read(self, count):
        """`count` bytes, or less at the end."""
        data = b""
        while len(data) < count:
            more = self.stream.read(count - len(data))
            if not more:
                break
            data += more
        return data

    def _as_utf8(self, data, final):
        if self.decoder is None:
            return data
        return self.decoder.decode(data, final).encode()

    @contextlib.contextmanager
    def _refusing(self):
        try:
            yield
        except UnicodeError as e:
            raise SystemExit(f"error: {self.path}: not as its byte order mark says: {e.reason}")
        except (EOFError, zlib.error, gzip.BadGzipFile, Damaged) as e:
            raise SystemExit(
                f"error: {self.path}: incomplete or damaged ({first_line(e)}); get it again"
            )
        except OSError as e:
            raise SystemExit(f"error: {self.path}: {e.strerror or first_line(e)}")


def open_source(path):
    """A buffered Source, to read and to close; its attribute `raw` is the Source."""
    return io.BufferedReader(Source(path), 1 << 16)


class Damaged(Exception):
    """Compressed data that is not whole."""


def decompressed(file, path):
    """What a file, open for reading, holds by its name's ending. It has read(n) alone."""
    _, _, ending = path.lower().rpartition(".")
    if ending == "gz":
        return gzip.GzipFile(fileobj=file)
    if ending == "zst":
        return Zstandard(file, path)
    return file


class Zstandard:
    """Read a .zst by Python's own compression.zstd (3.14), or by the zstandard package.

    From a piece of input this small come at most 32 MiB, even of a bomb: 128 KiB for 4 bytes."""

    PIECE = 1 << 10

    def __init__(self, file, path):
        self.file = file
        self.pending = memoryview(b"")
        for name in ("compression.zstd", "zstandard"):
            with contextlib.suppress(ImportError):
                self.library = importlib.import_module(name)
                break
        else:
            raise SystemExit(
                f"error: {path}: reading .zst takes the zstandard library: pip install zstandard"
            )
        self.frame = None  # that is not at its end

    def read(self, count):
        while not self.pending:
            data = self.file.read(self.PIECE)
            if not data and self.frame:
                raise Damaged("it ends within a frame")
            if not data:
                break
            self.pending = memoryview(self._decompress(data))
        data = self.pending[:count].tobytes()
        self.pending = self.pending[count:]
        return data

    def _decompress(self, data):
        parts = []
        while data:
            self.frame = self.frame or self._new_frame()
            try:
                parts.append(self.frame.decompress(data))
            except self.library.ZstdError as e:
                raise Damaged(first_line(e))
            data = self.frame.unused_data
            if self.frame.eof:
                self.frame = None  # another may follow
        return b"".join(parts)

    def _new_frame(self):
        decompressor = self.library.ZstdDecompressor()
        if self.library.__name__ == "zstandard":
            return decompressor.decompressobj()
        return decompressor  # Python's own is such an object itself


class NotText(ValueError):
    """Bytes that are no text; `at`: the place of the first one."""

    def __init__(self, why, at):
        super().__init__(why)
        self.at = at


def decode(data):
    """The text of UTF-8 bytes. Raises NotText if they are anything else, or have NULs."""
    if b"\0" in data:
        raise NotText(NULS, data.index(b"\0"))
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise NotText(NOT_UTF8, e.start)
