"""
Files that are written whole or not at all, and files that are what they should be.

A file that is being written lies beside its place, as NAME.qgalore-PROCESS-N.tmp, and takes its
name once it is on the disk. Its process alone has that name, and locks it: the system opens the
lock when the process ends, however it ends, so that what it left behind is known.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import stat

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is taken for left behind
    fcntl = None

TEMPORARY = re.compile(r".+\.qgalore-\d+-\d+\.tmp")
# what a file system answers that cannot sync: some network and user-space ones
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write to, which takes the name `path` once the block has ended well.

    Raises OSError, with a file's name in it."""
    f = temporary_file(path)
    try:
        with f:
            yield f
            # on the disk before it has the name: a power cut leaves the old file or the new one
            sync(f)
        try:
            os.replace(f.name, path)
        except OSError as e:  # it names the temporary file
            raise OSError(e.errno, e.strerror, path)
        sync_folder(os.path.dirname(path))
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            os.unlink(f.name)
        raise


def temporary_file(path):
    """A new file beside `path`, open for writing; no other process has its name."""
    for name in _temporary_names(path):
        with contextlib.suppress(FileExistsError):
            f = open(name, "xb")
            lock(f)
            return f


def temporary_folder(path):
    """The path of a new folder beside `path`; no other process has its name."""
    for name in _temporary_names(path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name)
            if fcntl is not None:
                lock(os.open(name, os.O_RDONLY))  # until this process ends
            return name


def _temporary_names(path):
    return (f"{path}.qgalore-{os.getpid()}-{i}.tmp" for i in itertools.count())


def sync(f):
    """Bring what was written to a file to the disk. Raises OSError, with its name."""
    f.flush()
    try:
        os.fsync(f.fileno())
    except OSError as e:
        if e.errno not in CANNOT_SYNC:
            raise OSError(e.errno, e.strerror, f.name)


def sync_folder(path):
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        folder = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock(f):
    """Lock an open file: True, or False if another process has it, or None if none can be had."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def sweep(folder, start=""):
    """Delete the files that killed processes were writing in a folder, and say so.

    Their folders are said alone, as a user may have put things there. start: of the names."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if not TEMPORARY.fullmatch(name) or not name.startswith(start) or os.path.islink(path):
            continue
        with contextlib.suppress(OSError):
            f = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                if not lock(f):
                    continue
                what = "delete it"
                if not os.path.isdir(path):
                    os.unlink(path)
                    what = "deleted"
                print(f"note: {path}: a process that was killed left it half written; {what}")
            finally:
                os.close(f)


def unused(path):
    """`path`, or with a number after it, so that there is nothing of that name yet."""
    names = itertools.chain([path], (f"{path}-{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def check_file(path):
    """Raise OSError, with the path in it, unless there is an ordinary file: a pipe would hang."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, where a file was expected", path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, "is no ordinary file", path)


def parse_json(text):
    """What JSON says, in str or bytes of UTF-8, 16 or 32. Raises ValueError for all that is none.

    NaN and infinities, which Python writes, are none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply")


def _refuse(name):
    raise ValueError(f"{name} is no number in JSON")
