"""
What this process may use of the machine: cores and memory.

A container has the machine's /proc, and limits of its own in cgroups. A group lies in a group, and
the least of all their limits holds. `root` is "/", or a folder that holds such a tree.
"""

import os

try:
    import resource
except ImportError:  # Windows
    resource = None

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096  # bytes


def usable_cores(root="/"):
    """How many cores the process may use: by its affinity, and by its groups' quota of time."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder, "cpu.max").partition(" ")  # version 2
        if not period:
            quota = _text(folder, "cpu.cfs_quota_us")  # version 1
            period = _text(folder, "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1: no limit
            cores = min(cores, int(quota) // max(1, int(period)))
    return max(1, cores)


def free_memory(root="/"):
    """Bytes that the process may still take; None where the system does not tell."""
    found = [kib * 1024 for kib in _table(root, "proc/meminfo", "MemAvailable:")]
    for folder in _groups(root, "memory"):
        used = _text(folder, "memory.current") or _text(folder, "memory.usage_in_bytes")
        if not used.isdigit():
            continue
        # files that the system keeps at hand give way; version 1 sums up inner groups as total_
        kept = [*_table(folder, "memory.stat", "total_active_file", "total_inactive_file")]
        kept = kept or _table(folder, "memory.stat", "active_file", "inactive_file")
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _text(folder, name)
            if limit.isdigit():  # "max": no limit
                found.append(int(limit) - int(used) + sum(kept))
    # of the process alone, as by ulimit -v and -d
    taken = _text(root, "proc/self/statm").split()  # pages: all, resident, ..., of data
    if resource is not None and len(taken) > 5:
        for kind, pages in ((resource.RLIMIT_AS, taken[0]), (resource.RLIMIT_DATA, taken[5])):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                found.append(limit - int(pages) * PAGE)
    return max(0, min(found)) if found else None


def _groups(root, controller):
    """The folders of the process's cgroups for "cpu" or "memory", from its own up to the top."""
    for line in _text(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all
            top = os.path.join(root, "sys/fs/cgroup")
        elif controller in controllers.split(","):
            top = os.path.join(root, "sys/fs/cgroup", controller)
        else:
            continue
        # a container sees its own group at the top, where a path may be the machine's
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield os.path.join(top, *parts[:depth])


def _text(folder, name):
    """What a file of the system says, "" where there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return ""


def _table(folder, name, *keys):
    """The numbers of these keys in a file with a key and a number a line."""
    found = []
    for line in _text(folder, name).splitlines():
        key, *rest = line.split()
        if key in keys and rest and rest[0].isdigit():
            found.append(int(rest[0]))
    return found
