"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults.py

tests/torture.py kills, fills and damages at random, for as long as it is told.
"""

import os
import resource
from types import SimpleNamespace

import pytest
import torch

from run import memory
from run.device import choose_threads
from run.limits import free_memory, usable_cores
from tests.common import settings

# -----------------------------------------------------------------------------
# runs that are lost

# -----------------------------------------------------------------------------
# gradients and weights that are not finite

# -----------------------------------------------------------------------------
# data that is wrong

# -----------------------------------------------------------------------------
# records and texts

# -----------------------------------------------------------------------------
# arithmetic

# -----------------------------------------------------------------------------
# files that are not trusted

# -----------------------------------------------------------------------------
# the plan, threads and pictures

DEMO = SimpleNamespace(n_embd=192, ffn_dim=528)
SMALL = SimpleNamespace(n_embd=512, ffn_dim=1376)


def system(root, **files):
    """A tree of the system's files below `root`: {path: text}."""
    for path, text in files.items():
        path = os.path.join(root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
    return str(root)


@pytest.fixture
def torch_has(monkeypatch):
    """A function that lets torch begin with so many threads; returns what it is then set to."""

    def begin(threads, **environment):
        now = [threads]
        monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return now

    return begin


@pytest.mark.parametrize("shape,tokens,cores,expected", [
    (DEMO, 8 * 128, 16, 1),  # 0.2e9 operations
    (SMALL, 16 * 256, 2, 2),
    (SMALL, 16 * 256, 16, 5),  # 5.8e9
    (SMALL, 1, 16, 1),
])
def test_threads_are_by_the_models_size(torch_has, shape, tokens, cores, expected):
    now = torch_has(16)
    line = choose_threads(shape, tokens, cores=cores)
    assert now == [expected]
    assert line.startswith(f"threads: {expected} of {cores}")


def test_threads_that_a_user_sets_hold(torch_has):
    now = torch_has(4, OMP_NUM_THREADS="4")
    assert "OMP_NUM_THREADS" in choose_threads(DEMO, 1024, cores=8) and now == [4]
    assert "threads=3" in choose_threads(DEMO, 1024, threads=3, cores=8) and now == [3]
    now = torch_has(1)  # set before, by a caller: never more than that
    choose_threads(SMALL, 10**6, cores=8)
    assert now == [1]


@pytest.mark.parametrize("files,expected", [
    ({}, 8),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
      "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2),
    # a container's own group is at the top, whatever the machine calls it
    ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n2:memory:/\n",
      "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000",
      "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
    ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/x/cpu.max": "torn"}, 8),
])
def test_a_containers_quota_of_cores_is_seen(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(system(tmp_path, **files)) == expected


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"}


@pytest.mark.parametrize("files,expected", [
    ({}, None),
    (MEMINFO, 800 * 1024),
    # the least up the tree; what files take gives way
    (MEMINFO | {"proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "50000\n",
                "sys/fs/cgroup/a/memory.current": "30000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 7\nactive_file 1000\ninactive_file 2000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.high": "40000\n",
                "sys/fs/cgroup/a/b/memory.current": "10000\n"}, 23000),
    (MEMINFO | {"proc/self/cgroup": "3:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "50000\n",
                "sys/fs/cgroup/memory/memory.stat":
                    "active_file 1\ninactive_file 2\n"
                    "total_active_file 100\ntotal_inactive_file 200\n"}, 10300),
    (MEMINFO | {"proc/self/cgroup": "3:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n"}, 800 * 1024),
    # full to the brim
    (MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100",
                "sys/fs/cgroup/memory.current": "101"}, 0),
])
def test_a_containers_limit_of_memory_is_seen(tmp_path, files, expected):
    assert free_memory(system(tmp_path, **files)) == expected


def test_a_limit_of_the_process_is_seen(tmp_path, monkeypatch):
    limits = {resource.RLIMIT_AS: 10**9, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], 10**12))
    page = resource.getpagesize()
    root = system(tmp_path, **{"proc/self/statm": "1000 90 9 9 0 500 0\n"})
    assert free_memory(root) == 10**9 - 1000 * page
    limits[resource.RLIMIT_DATA] = 10**7
    assert free_memory(root) == 10**7 - 500 * page


ONE_RANK = SimpleNamespace(size=1)


@pytest.mark.parametrize("flags,words", [
    ("--n_layer=1000000000000", "weights"),
    ("--n_embd=1000000000 --n_head=1000", "weights"),
    ("--vocab_size=1000000000000", "weights"),
    ("--ffn_dim=1000000000000000000", "weights"),
    ("--batch_size=1000000000000", "batch_size"),
    ("--block_size=1000000000000000", "block_size"),
])
def test_sizes_beyond_any_machine_are_refused_at_once(flags, words, monkeypatch, capsys):
    """By arithmetic: a plan of them would never end. A dry run says what it knows."""
    monkeypatch.setattr(memory, "memory_plan", None)
    s = settings("--device=cpu", *flags.split())
    with pytest.raises(SystemExit, match=f"error: this run needs .*{words}"):
        memory.fits(s, ONE_RANK, torch.float32, torch.float32)
    memory.fits(s.changed(dry_run=True), ONE_RANK, torch.float32, torch.float32)
    assert "NOT enough" in capsys.readouterr().out


def test_the_least_a_run_takes_is_less_than_its_plan():
    for flags in ("--method=qgalore", "--method=adamw", "--method=lora", "--tie_embedding=True"):
        s = settings("--device=cpu", "--n_layer=2", "--vocab_size=512", *flags.split())
        least = memory.least(s, torch.float32, torch.float32)
        plan = memory.memory_plan(s, torch.float32, torch.float32)
        assert 0.3 * plan["weights"] < least["weights"] <= plan["weights"]
        assert least["gradients, activations"] < plan["gradients, activations"]


@pytest.mark.parametrize("length,share", [(128, 1.0), (8192, 0.0)])
def test_fragments_are_of_blocks_that_the_heap_keeps(length, share):
    s = settings("--n_layer=1", "--n_embd=1024", "--n_head=16", "--ffn_dim=1024", "--batch_size=1",
                 "--vocab_size=64", "--rank=8", f"--block_size={length}", "--proj_side=right")
    plan = memory.memory_plan(s, torch.float32, torch.float32, fragments=0.75)
    kept = (plan["fragments, workspaces"] - memory.WORKSPACES) / 0.75
    assert kept == pytest.approx(share * plan["gradients, activations"], rel=0.01,
                                 abs=0.1 * plan["gradients, activations"])

# -----------------------------------------------------------------------------
# what people type
