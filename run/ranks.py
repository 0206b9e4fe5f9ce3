"""
One model on several GPUs: torchrun starts the same script once a GPU.

    torchrun --standalone --nproc_per_node=2 train.py config/llama_7b.py

These processes are called ranks. Every rank holds all weights, bases and moments, reads its own
sequences, and makes the same step as the others. It can, because all that the step depends on is
the same everywhere: the summed low-rank gradient, and random numbers that are hashed from seed,
weight and step.

Of a QLinear no rank sends the weight. Q-GaLore does not send its gradient either (but with
proj_svd): at r = d/4 it sends a quarter of it, and all of it only for a refresh. Methods whose step
needs more of the gradient (Muon, Fira, APOLLO) send that, too. Sums travel while backward goes on
to the next layer.

torch.distributed does the sending: NCCL between GPUs; gloo between CPUs, and for the few numbers
that hosts exchange.
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
# what torchrun tells each of its processes
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = ("kernels", "run", "methods", "finetune/**")  # folders whose code a run may execute


class Ranks:
    """The processes of one job. Ranks() is a job of this process alone: every sum is what it was.

    device: "cuda" or "cpu".
    facts: {what: value} that must be the same on every rank, else each leaves with one line. None:
        do not look for other ranks.
    timeout: seconds that any rank is waited for, at the start and later.
    micro_batches: those of a step, which must divide among the ranks.
    """

    def __init__(self, device="cpu", facts=None, timeout=600.0, micro_batches=0):
        self.device = device
        self.rank = 0
        self.size = 1
        self.sent = 0  # bytes handed to torch.distributed; whoever logs them sets this back to 0
        self.flying = deque()  # sums on their way: (work, tensor, then)
        self.loss_scale = 1.0  # what the loss was multiplied by: sums of gradients are divided by it
        self.agreements = 0  # calls of agree(): each has its own names in the store
        if facts is None or not _started_by_torchrun():
            return  # an ordinary run

        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        if micro_batches % self.size:
            raise SystemExit(
                f"error: gradient_accumulation_steps = {micro_batches} micro-batches do not divide "
                f"among {self.size} ranks: set a multiple of {self.size}"
            )
        if self.size == 1:
            return  # torchrun with one process: nobody to meet

        timeout = timedelta(seconds=timeout)
        self._meet(timeout)
        # before any sum: ranks that differ would wait for each other, or drift apart unseen
        self.agree(facts | {"torch": torch.__version__} | _code())
        if device == "cuda":
            self._take_gpu(int(os.environ["LOCAL_RANK"]))
        # a tensor's own device decides which of the two sends it
        self._waiting(
            dist.init_process_group,
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("sums", self.store),  # apart from the names that agree() uses
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
        )

    def _meet(self, timeout):
        """Find rank 0, whose store of texts by name all ranks can read and write."""
        self.host = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            self.store = next(dist.rendezvous("env://", timeout=timeout))[0]
            self.store.set_timeout(timeout)  # of each later get and wait
        except (RuntimeError, ValueError) as e:
            raise SystemExit(
                f"error: rank {self.rank}: no rendezvous at {self.host}: {_line(e)}"
            )

    def _take_gpu(self, local):
        """Compute on this machine's GPU number `local`, the same kind of GPU as all ranks."""
        count = torch.cuda.device_count()
        if local >= count:
            raise SystemExit(
                f"error: rank {self.rank} has no GPU: it is the machine's process {local}, counted "
                f"from 0, and the machine has {count}; lower --nproc_per_node"
            )
        torch.cuda.set_device(local)
        # another kind would round otherwise, and drift apart
        self.agree({"GPU": torch.cuda.get_device_name()})

    def agree(self, facts):
        """Leave with one line unless all ranks have these facts, {what: value}, in common.

        Asks no GPU. With no facts, ranks wait for each other."""
        if self.size == 1:
            return
        self.agreements += 1
        # every rank puts its facts there, and compares all others' with rank 0's: so all ranks
        # leave, and with the same reason
        store = dist.PrefixStore(f"facts {self.agreements}", self.store)
        self._asking(0, store.set, str(self.rank), json.dumps(facts))
        first = None  # rank 0's facts
        for other in range(self.size):
            theirs = json.loads(self._asking(other, store.get, str(other)))  # waits for it
            if first is None:
                first = theirs
            for what in first | theirs:
                if first.get(what) != theirs.get(what):
                    self._all_have_seen(store)
                    raise SystemExit(
                        f"error: rank {self.rank}: rank {other} has {what} = "
                        f"{theirs.get(what)!r}, rank 0 has {first.get(what)!r}: start all ranks "
                        "alike"
                    )
        self._all_have_seen(store)

    def _asking(self, other, function, *args):
        """function(...) of a store, where it is one line that rank `other` did not come."""
        try:
            return function(*args)
        except RuntimeError:
            raise SystemExit(
                f"error: rank {self.rank}: rank {other} of {self.size} did not come to {self.host}"
            )

    def _all_have_seen(self, store):
        """So that rank 0, who keeps the store, does not leave with it."""
        try:
            store.set(f"{self.rank} has seen", "")
            store.wait([f"{other} has seen" for other in range(self.size)])
        except RuntimeError:  # one of them is gone: the others need not wait
            pass

    def sum_(self, tensor, then):
        """Sum a gradient over all ranks, and call then(tensor) when the sum is there.

        In place, and divided by loss_scale, in float32, if it is not 1. The calls of `then` come in
        the order of the calls of sum_. land() waits for the last."""
        if self.size == 1:
            then(self._unscaled(tensor))
            return
        self.sent += tensor.nbytes
        work = self._waiting(dist.all_reduce, tensor, async_op=True)  # returns at once
        self.flying.append((work, tensor, then))
        # each sum on its way holds its tensor: land the oldest rather than let memory grow
        while sum(tensor.nbytes for _, tensor, _ in self.flying) > IN_FLIGHT:
            self._land_one()

    def land(self):
        """Wait for all sums that are on their way."""
        while self.flying:
            self._land_one()

    def _land_one(self):
        work, tensor, then = self.flying.popleft()
        self._waiting(work.wait)  # on a GPU the stream waits, not the host
        then(self._unscaled(tensor))

    def _unscaled(self, gradient):
        return gradient if self.loss_scale == 1 else gradient.float().div_(self.loss_scale)

    def any(self, flag):
        """Whether any rank's flag is true."""
        if self.size > 1:
            flag = torch.tensor(float(bool(flag)))  # on the CPU: hosts exchange it, by gloo
            self._waiting(dist.all_reduce, flag, dist.ReduceOp.MAX)
        return bool(flag)

    def total(self, number):
        """The sum of a number over all ranks."""
        if self.size > 1:
            number = torch.tensor(float(number), dtype=torch.float64)
            self._waiting(dist.all_reduce, number)
        return float(number)

    def check_identical(self, state, when):
        """Leave with one line if ranks hold different states; it names the first entry that is.

        state: {name: tensors and numbers, nested}, compared bit for bit. when: for the line."""
        if self.size == 1:
            return
        hashes = [_hash(value, self.device) for value in state.values()]
        # all ranks hold the same where the smallest hash is the largest, too
        low = torch.stack(hashes)  # (entries,) int64
        high = low.clone()
        self._waiting(dist.all_reduce, low, dist.ReduceOp.MIN)
        self._waiting(dist.all_reduce, high, dist.ReduceOp.MAX)
        different = (low != high).nonzero().flatten().tolist()
        if different:
            raise SystemExit(
                f"error: rank {self.rank}: ranks differ {when}, in {len(different)} of "
                f"{len(state)} entries, first in {list(state)[different[0]]}: go on from the last "
                "checkpoint"
            )

    def leave(self):
        """End the job in good order."""
        if self.size > 1:
            dist.destroy_process_group()

    def _waiting(self, function, *args, **kwargs):
        """function(...), where a rank that died or is late is one line."""
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:  # gloo's, NCCL's and the store's errors are of this kind
            line = (
                f"error: rank {self.rank} of {self.size} has lost another rank, or it is late: the "
                f"last checkpoint resumes the run ({_line(e)})"
            )
        if self.device == "cuda":  # a sum that never ends would keep the process from leaving
            print(line, file=sys.stderr, flush=True)
            os._exit(1)
        raise SystemExit(line)


def _started_by_torchrun():
    """Whether torchrun's variables are set. Exits with one line if only some of them are."""
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and len(missing) < len(TORCHRUN):
        raise SystemExit(
            f"error: {', '.join(missing)} not set, {TORCHRUN[0]} or others are: start with torchrun"
        )
    return not missing


def _hash(value, device):
    """() int64: of a tensor's bytes and their places, or of what is in a container, or a number."""
    if isinstance(value, torch.Tensor):
        total = torch.zeros((), dtype=torch.int64, device=device)
        for part in value.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            odd = torch.arange(1, 2 * len(part), 2, device=part.device)  # one for each byte's place
            total = total * 0x9E3779B1 + (part * odd).sum()  # modulo 2^64
        return total
    if isinstance(value, dict):
        value = list(value.items())  # in its order, which is the same where the code is
    if isinstance(value, (list, tuple)):
        total = torch.full((), len(value), dtype=torch.int64, device=device)
        for place, part in enumerate(value, start=1):
            total = total + _hash(part, device) * (2 * place + 1)
        return total
    return torch.full((), random_key(value), dtype=torch.int64, device=device)


def _code():
    """{file: its hash} of the code that may run here: the core's, and that of ROOMS."""
    paths = []  # from the repository's root, with "/" on any system
    for path in glob.glob("*.py", root_dir=REPOSITORY):
        if not path.startswith(("test_", "conftest")):
            paths.append(path)
    for room in ROOMS:
        for path in glob.glob(f"{room}/*.py", root_dir=REPOSITORY, recursive=True):
            paths.append(path.replace(os.sep, "/"))
    files = {}
    for path in sorted(paths):
        with open(os.path.join(REPOSITORY, path), "rb") as f:
            files[path] = hashlib.blake2b(f.read(), digest_size=8).hexdigest()
    return files


def _line(e):
    """The first and the last line of an error: NCCL gives its reason at the end."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if not lines:
        lines = [type(e).__name__]
    # of each its first sentence: what follows is advice for programmers
    first = lines[0].partition(". ")[0]
    last = lines[-1].partition(". ")[0]
    return first if first == last else f"{first} ... {last}"
