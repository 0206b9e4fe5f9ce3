"""
What a run reads: windows of tokens, out of the shards that prepare_c4.py or llm.c wrote.
"""

import glob

import numpy as np
import torch

from prepare_c4 import read_shard


class Windows:
    """Windows of block_size + 1 tokens out of memory-mapped shards, in an order drawn from `seed`: each epoch takes the
    shards in a new order and each shard's windows in a new order, and sees each window once. seed None: in file order.
    `position`, the windows read so far, is all the state there is."""

    def __init__(self, pattern, block_size, vocab_size, seed=None):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise SystemExit(f"error: no shards {pattern}; make some with prepare_c4.py, or set data_dir")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.counts = []
        for path in self.paths:
            tokens, n_vocab = read_shard(path)
            if n_vocab > vocab_size:
                raise SystemExit(f"error: {path}: its vocabulary has {n_vocab} tokens, vocab_size is {vocab_size}")
            if len(tokens) <= block_size:
                raise SystemExit(f"error: {path}: {len(tokens)} tokens are less than one sequence of block_size + 1")
            self.counts.append((len(tokens) - 1) // block_size)
        self.total, self.position = sum(self.counts), 0
        self.epoch = self.shard = None

    def batch(self, n, rank=0, ranks=1):
        """The rank-th n of the next n * ranks windows: x, y (n, block_size) int64, y one token ahead."""
        self.position += n * rank
        rows = torch.from_numpy(np.stack([self._next() for _ in range(n)]).astype(np.int64))  # (n, block_size + 1)
        self.position += n * (ranks - 1 - rank)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _next(self):
        epoch, i = divmod(self.position, self.total)
        self.position += 1
        if epoch != self.epoch:
            self.epoch, self.shard = epoch, None
            self.order = self._permutation(len(self.paths), epoch)
            self.ends = np.cumsum([self.counts[s] for s in self.order])
        place = int(np.searchsorted(self.ends, i, side="right"))
        shard = int(self.order[place])
        if shard != self.shard:
            self.shard, self.tokens = shard, read_shard(self.paths[shard])[0]
            if self.tokens.max() >= self.vocab_size:
                raise SystemExit(f"error: {self.paths[shard]}: token {self.tokens.max()} is beyond vocab_size "
                                 f"{self.vocab_size}")
            self.windows = self._permutation(self.counts[shard], epoch, shard + 1)
        start = self.windows[i - self.ends[place]] * self.block_size  # counted from the shard's end
        return self.tokens[start : start + self.block_size + 1]

    def _permutation(self, n, *key):
        return np.arange(n) if self.seed is None else np.random.default_rng((self.seed, *key)).permutation(n)
