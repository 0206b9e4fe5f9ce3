"""
Work shared among processes, in order, with little of it in memory at a time.
"""

import collections
import contextlib
import ctypes
import functools
import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def map_in_processes(workers):
    """A map() whose calls run in so many processes; for one, map() itself."""
    if workers == 1:
        yield map
        return
    # Threads took 1.3 times as long on two cores: they share Python's lock. Forked: a spawned
    # process would run the script that imported us, and load the vocabulary, again. A fork is safe
    # here, as workers use neither torch nor CUDA.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        # workers inherit the mask: Ctrl-C is for the parent alone
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pool.submit(int).result()  # a first piece of work, any: it forks them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield functools.partial(map_ahead, pool, 2 * workers)


def map_ahead(pool, ahead, function, items):
    """map() in a pool, in order. It has at most `ahead` items in hand, so that memory stays small:
    pool.map would read all of them first."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def die_with_parent():
    """Have Linux kill this process when its parent ends, even if that is killed itself."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
