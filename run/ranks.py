"""
One model on several GPUs: torchrun starts the same script once a GPU, and the ranks, as these processes are called, sum
what they find.

    torchrun --standalone --nproc_per_node=2 train.py config/llama_7b.py

Every rank holds all weights, bases and moments, reads its own sequences, and makes the same step. It can, because all
that the step depends on is the same everywhere: the summed low-rank gradient, and random numbers that are hashed from
seed, weight and step. Of a QLinear no rank sends the weight, nor (but with proj_svd) the gradient: at r = d/4 a quarter
of it, and at a refresh the sketch that the next basis is made of. Sums travel while backward goes on to the next layer.

torch.distributed does the sending: NCCL between GPUs, gloo between CPUs, and for the few numbers that hosts exchange.
"""

import glob
import hashlib
import json
import os
import sys
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from quant import CHUNK, random_key

IN_FLIGHT = 2**26  # bytes of sums on their way at once: 64 MiB, two of a 7B's largest in bfloat16
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The processes of one job. Ranks() is a job of this process alone, where every sum is what it was.

    device: "cuda" or "cpu". facts: {what: value} that must be the same on every rank, else each leaves with one line;
    None: do not look for others. timeout: seconds that any rank is waited for, at the start and later. micro_batches:
    those of a step, which must divide among the ranks.
    """

    def __init__(self, device="cpu", facts=None, timeout=600.0, micro_batches=0):
        self.rank, self.size, self.sent, self.device = 0, 1, 0, device
        self.flying, self.agreements = deque(), 0
        missing = [name for name in TORCHRUN if name not in os.environ]
        if facts is None or len(missing) == len(TORCHRUN):
            return
        if missing:
            raise SystemExit(f"error: {', '.join(missing)} not set, {TORCHRUN[0]} or others are: start with torchrun")
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, seconds = int(os.environ["LOCAL_RANK"]), timedelta(seconds=timeout)
        if micro_batches % self.size:
            raise SystemExit(f"error: gradient_accumulation_steps = {micro_batches} micro-batches do not divide among "
                             f"{self.size} ranks: set a multiple of {self.size}")
        if self.size == 1:
            return
        self.host = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            self.store = next(dist.rendezvous("env://", timeout=seconds))[0]
            self.store.set_timeout(seconds)
        except (RuntimeError, ValueError) as e:
            raise SystemExit(f"error: rank {self.rank}: no rendezvous at {self.host}: {_line(e)}")
        self.agree(facts | {"torch": torch.__version__} | _code())
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise SystemExit(f"error: rank {self.rank} has no GPU: it is the machine's process {local}, counted "
                                 f"from 0, and the machine has {torch.cuda.device_count()}; lower --nproc_per_node")
            torch.cuda.set_device(local)
            self.agree({"GPU": torch.cuda.get_device_name()})  # others would round otherwise, and drift apart
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = dist.PrefixStore("sums", self.store)
        self._waiting(dist.init_process_group, backend, store=store, rank=self.rank, world_size=self.size,
                      timeout=seconds)

    def agree(self, facts):
        """Leave with one line unless all ranks have these facts, {what: value}, in common. Asks no GPU."""
        if self.size == 1:
            return
        self.agreements += 1
        store = dist.PrefixStore(f"facts {self.agreements}", self.store)
        for other in range(self.size):
            try:
                if other == 0:
                    store.set(str(self.rank), json.dumps(facts))
                theirs = json.loads(store.get(str(other)))
            except RuntimeError:
                raise SystemExit(f"error: rank {self.rank}: rank {other} of {self.size} did not come to {self.host}")
            if other == 0:
                first = theirs
            different = next((key for key in first | theirs if first.get(key) != theirs.get(key)), None)
            if different is not None:
                self._all_have_seen(store)
                raise SystemExit(f"error: rank {self.rank}: rank {other} has {different} = {theirs.get(different)!r}, "
                                 f"rank 0 has {first.get(different)!r}: start all ranks alike")
        self._all_have_seen(store)

    def _all_have_seen(self, store):
        """So that the one who keeps the store does not leave with it."""
        try:
            store.set(f"{self.rank} has seen", "")
            store.wait([f"{other} has seen" for other in range(self.size)])
        except RuntimeError:
            pass

    def sum_(self, tensor, then):
        """Sum a tensor over all ranks in place, and call then(tensor) when it is there, in the order of these calls;
        land() waits for the last ones."""
        if self.size == 1:
            then(tensor)
            return
        self.sent += tensor.nbytes
        self.flying.append((self._waiting(dist.all_reduce, tensor, async_op=True), tensor, then))
        while sum(tensor.nbytes for _, tensor, _ in self.flying) > IN_FLIGHT:
            self._land_one()

    def land(self):
        while self.flying:
            self._land_one()

    def _land_one(self):
        work, tensor, then = self.flying.popleft()
        self._waiting(work.wait)  # on a GPU the stream waits, not the host
        then(tensor)

    def any(self, flag):
        """Whether any rank's flag is true."""
        if self.size > 1:
            flag = torch.tensor(float(bool(flag)))
            self._waiting(dist.all_reduce, flag, dist.ReduceOp.MAX)
        return bool(flag)

    def total(self, number):
        """The sum of a number over all ranks."""
        if self.size > 1:
            number = torch.tensor(float(number), dtype=torch.float64)
            self._waiting(dist.all_reduce, number)
        return float(number)

    def check_identical(self, state, when):
        """Leave with one line that names the first of state's entries, {name: tensors and numbers, nested}, that is not
        the same on all ranks, bit for bit."""
        if self.size == 1:
            return
        hashes = torch.stack([_hash(value, self.device) for value in state.values()])  # (entries,) int64
        low, high = hashes.clone(), hashes
        self._waiting(dist.all_reduce, low, dist.ReduceOp.MIN)
        self._waiting(dist.all_reduce, high, dist.ReduceOp.MAX)
        different = (low != high).nonzero().flatten().tolist()
        if different:
            raise SystemExit(f"error: rank {self.rank}: ranks differ {when}, in {len(different)} of {len(state)} "
                             f"entries, first in {list(state)[different[0]]}: go on from the last checkpoint")

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    def _waiting(self, function, *args, **kwargs):
        """function(...), where a rank that died or is late is one line."""
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:  # gloo's, NCCL's and the store's errors are of this kind
            line = (f"error: rank {self.rank} of {self.size} has lost another rank, or it is late: the last checkpoint "
                    f"resumes the run ({_line(e)})")
        if self.device == "cuda":  # where a sum that never ends would keep the process from leaving
            print(line, file=sys.stderr, flush=True)
            os._exit(1)
        raise SystemExit(line)


def _hash(value, device):
    """() int64: of a tensor's bytes and their places, or of what is in a container, or of a number."""
    if isinstance(value, torch.Tensor):
        total = torch.zeros((), dtype=torch.int64, device=device)
        for part in value.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            odd = torch.arange(1, 2 * len(part), 2, device=part.device)
            total = total * 0x9E3779B1 + (part * odd).sum()
        return total
    if isinstance(value, (dict, list, tuple)):
        values = value.items() if isinstance(value, dict) else value
        parts = [torch.full((), len(value), dtype=torch.int64, device=device), *(_hash(v, device) for v in values)]
        return sum(part * (2 * i + 1) for i, part in enumerate(parts))
    return torch.full((), random_key(value), dtype=torch.int64, device=device)


def _code():
    """{file: its hash} of what runs here."""
    files = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(os.path.abspath(__file__))), "*.py"))):
        with open(path, "rb") as f:
            files[os.path.basename(path)] = hashlib.blake2b(f.read(), digest_size=8).hexdigest()
    return files


def _line(e):
    """The first and the last line of an error: NCCL gives its reason at the end."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return " ... ".join(dict.fromkeys([lines[0].partition(". ")[0], lines[-1].partition(". ")[0]]))
