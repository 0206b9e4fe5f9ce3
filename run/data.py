"""
What a run reads: windows of tokens, out of the shards that prepare_c4.py or llm.c wrote, or rows of whole examples, of
which only some tokens count in the loss, out of prepare_sft.py's.
"""

import glob

import numpy as np
import torch

from run.shards import open_shard


class Windows:
    """Windows of block_size + 1 tokens out of memory-mapped shards, in an order drawn from `seed`: each epoch takes the
    shards in a new order and each shard's windows in a new order, and sees each window once. seed None: in file order.
    A window of prepare_sft.py's shards is one of their rows (`rows` is then True).
    n_vocab, fingerprint: of the run's tokenizer; shards that say they were made with another are refused. 0: unknown.
    `position`, the windows read so far, is all the state there is."""

    def __init__(self, pattern, block_size, vocab_size, seed=None, n_vocab=0, fingerprint=0):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise SystemExit(f"error: no shards {pattern}; make some with prepare_c4.py, or set data_dir")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.counts = []
        for path in self.paths:
            shard = open_shard(path)
            if shard.n_vocab > vocab_size:
                raise SystemExit(f"error: {path}: its vocabulary has {shard.n_vocab} tokens, vocab_size is "
                                 f"{vocab_size}")
            for of_run, of_shard in ((n_vocab, shard.n_vocab), (fingerprint, shard.fingerprint)):
                if of_run and of_shard and of_run != of_shard:
                    raise SystemExit(f"error: {path}: was made with another tokenizer than the run's; make it again "
                                     "with the run's --encoding")
            if shard.row and shard.row != block_size + 1:
                raise SystemExit(f"error: {path}: its rows are made for block_size {shard.row - 1}, not {block_size}; "
                                 "set that, or make it again")
            if len(shard.tokens) <= block_size:
                raise SystemExit(f"error: {path}: {len(shard.tokens)} tokens are less than one sequence of block_size "
                                 "+ 1")
            self.rows = self.rows if self.counts else shard.row > 0
            if self.rows != (shard.row > 0):
                raise SystemExit(f"error: {path}: plain text and prepare_sft.py's examples do not mix, and "
                                 f"{self.paths[0]} is of the other kind; move one of them to another data_dir")
            self.counts.append(len(shard.tokens) // shard.row if shard.row else (len(shard.tokens) - 1) // block_size)
        self.total, self.position = sum(self.counts), 0
        self.epoch = self.shard = None

    def batch(self, n, rank=0, ranks=1):
        """The rank-th n of the next n * ranks windows: x, y (n, T) int64, y one token ahead, and documents.

        T is block_size and documents None for plain text. In rows of examples y is -1 where a token is no target,
        documents (n, T) int64 numbers the examples in each row, and T ends with the batch's last target: the columns
        cut away are padding, which nothing that counts can see."""
        self.position += n * rank
        windows = [self._next() for _ in range(n)]
        self.position += n * (ranks - 1 - rank)
        tokens, flags = zip(*windows)
        tokens = torch.from_numpy(np.stack(tokens).astype(np.int64))  # (n, block_size + 1)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if not self.rows:
            return x, y, None
        flags = torch.from_numpy(np.stack(flags).astype(np.int64))
        counts = flags[:, 1:] & 1 > 0
        y = y.masked_fill(~counts, -1)  # not in place: with one row, x and y are views of the same tokens
        documents = (flags >> 1 & 1).cumsum(1)[:, :-1]
        T = int(counts.any(0).nonzero().max()) + 1 if counts.any() else 1
        return x[:, :T].contiguous(), y[:, :T].contiguous(), documents[:, :T].contiguous()

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
            self.shard, (self.tokens, _, self.flags, *_) = shard, open_shard(self.paths[shard])
            if self.tokens.max() >= self.vocab_size:
                raise SystemExit(f"error: {self.paths[shard]}: token {self.tokens.max()} is beyond vocab_size "
                                 f"{self.vocab_size}")
            self.windows = self._permutation(self.counts[shard], epoch, shard + 1)
        start = self.windows[i - self.ends[place]] * (self.block_size + self.rows)  # counted from the shard's end
        window = slice(start, start + self.block_size + 1)
        return self.tokens[window], self.flags[window] if self.rows else None

    def _permutation(self, n, *key):
        return np.arange(n) if self.seed is None else np.random.default_rng((self.seed, *key)).permutation(n)
