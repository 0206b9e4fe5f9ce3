"""
What a run reads: batches of windows of block_size + 1 tokens, out of shards.

In plain text (prepare_c4.py, llm.c) a window starts at each multiple of block_size and shares its
last token with the next one: there it is a target, here an input. What is left at a shard's end
is not read. In rows of examples (finetune/prepare_sft.py) a window is a row, and only some of its
tokens count in the loss.

Shards are memory-mapped, so that a data set may be larger than memory.
"""

import glob
import os

import numpy as np
import torch

from run.encodings import fingerprint, get_encoding
from run.shards import IN_LOSS, STARTS, open_shard


def shard_paths(data_dir, part):
    """The shards of a part, "train" or "val", of a folder."""
    return glob.glob(_pattern(data_dir, part))


def _pattern(data_dir, part):
    return os.path.join(data_dir, f"*_{part}_*.bin")


def open_windows(s, part, seed):
    """The Windows of a run's settings. seed: of their order, None: as they lie in the files."""
    vocabulary = {}
    if s.pretrained:  # the tokenizer's numbers are the rows of the embedding
        tokenizer = get_encoding(s.encoding)
        vocabulary = {"n_vocab": tokenizer.n_vocab, "fingerprint": fingerprint(tokenizer)}
    pattern = _pattern(s.data_dir, part)
    return Windows(pattern, s.block_size, s.vocab_size, seed, **vocabulary)


class Windows:
    """The windows of all shards that match `pattern`, in an order drawn from `seed`.

    An epoch reads each window once. It takes the shards in a new order, and the windows of each
    shard in a new order. `position`, the windows read so far, is all the state there is: set it,
    and reading goes on from there.

    seed: None reads in the order of the files.
    n_vocab, fingerprint: of the run's tokenizer. A shard that says it was made with another one is
    refused. 0: not known.

    `total` is the windows in an epoch, `rows` whether they are rows of examples. Exits with one
    line if a shard is damaged or does not fit the run.
    """

    def __init__(self, pattern, block_size, vocab_size, seed=None, n_vocab=0, fingerprint=0):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise SystemExit(
                f"error: no shards {pattern}; make some with prepare_c4.py, or set data_dir"
            )
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.seed = seed

        self.sizes = []  # windows in each shard
        for path in self.paths:
            shard = open_shard(path)
            check_vocabulary(path, shard, vocab_size, n_vocab, fingerprint)
            check_length(path, shard, block_size)
            is_rows = shard.row > 0
            if not self.sizes:
                self.rows = is_rows
            elif self.rows != is_rows:
                raise SystemExit(
                    f"error: {path}: plain text and examples of finetune.prepare_sft do not mix, "
                    f"and {self.paths[0]} is of the other kind; move one to another data_dir"
                )
            if is_rows:
                self.sizes.append(len(shard.tokens) // shard.row)
            else:
                self.sizes.append((len(shard.tokens) - 1) // block_size)
        self.total = sum(self.sizes)
        self.position = 0
        self.epoch = None  # that `order` and `ends` are of
        self.shard = None  # the one that is open, as an index into `paths`

    def batch(self, n, rank=0, ranks=1):
        """(x, y, documents): the rank-th n of the next n * ranks windows.

        x, y: (n, T) int64, y one token ahead. documents: None for plain text, and T is block_size.

        In rows of examples y is -1 where a token is no target, and documents, (n, T) int64, numbers
        the examples in each row. T ends with the batch's last target: the columns cut away are
        padding, which nothing that counts can see.
        """
        # every rank counts all windows, and takes its own
        self.position += n * rank
        windows = [self._next() for _ in range(n)]
        self.position += n * (ranks - 1 - rank)

        tokens = np.stack([tokens for tokens, _ in windows])
        tokens = torch.from_numpy(tokens.astype(np.int64))  # (n, block_size + 1)
        x = tokens[:, :-1].contiguous()
        y = tokens[:, 1:].contiguous()
        if not self.rows:
            return x, y, None

        flags = np.stack([flags for _, flags in windows])
        flags = torch.from_numpy(flags.astype(np.int64))  # (n, block_size + 1)
        is_target = flags[:, 1:] & IN_LOSS > 0  # (n, block_size), of y
        # not in place: of one row, x and y are views of the same tokens
        y = y.masked_fill(~is_target, -1)
        starts = flags & STARTS > 0
        documents = starts.cumsum(1)[:, :-1]  # (n, block_size), of x

        # cut what lies after the last target of all rows
        T = 1
        if is_target.any():
            T = int(is_target.any(0).nonzero().max()) + 1
        return x[:, :T].contiguous(), y[:, :T].contiguous(), documents[:, :T].contiguous()

    def _next(self):
        """(tokens, flags or None) of the window at `position`, and on to the next one."""
        epoch, at = divmod(self.position, self.total)
        self.position += 1
        if epoch != self.epoch:
            self.epoch = epoch
            self.shard = None
            self.order = self._permutation(len(self.paths), epoch)  # indices into `paths`
            self.ends = np.cumsum([self.sizes[shard] for shard in self.order])  # in that order

        # the shard that holds window `at` of this epoch
        place = int(np.searchsorted(self.ends, at, side="right"))
        shard = int(self.order[place])
        if shard != self.shard:
            self._open(shard)

        # and the window in it
        start_of_shard = self.ends[place] - self.sizes[shard]
        window = self.windows[at - start_of_shard]
        stride = self.block_size + 1 if self.rows else self.block_size
        start = window * stride
        end = start + self.block_size + 1
        flags = self.flags[start:end] if self.rows else None
        return self.tokens[start:end], flags

    def _open(self, shard):
        path = self.paths[shard]
        opened = open_shard(path)
        largest = opened.tokens.max()  # an embedding of vocab_size rows has none for a larger one
        if largest >= self.vocab_size:
            raise SystemExit(
                f"error: {path}: token {largest} is beyond vocab_size {self.vocab_size}"
            )
        self.shard = shard
        self.tokens = opened.tokens
        self.flags = opened.flags
        # shard + 1: the key (epoch,) alone is that of the order of shards
        self.windows = self._permutation(self.sizes[shard], self.epoch, shard + 1)

    def _permutation(self, n, *key):
        """An order of n things that depends on the seed and the key alone."""
        if self.seed is None:
            return np.arange(n)
        return np.random.default_rng((self.seed, *key)).permutation(n)


def check_vocabulary(path, shard, vocab_size, n_vocab, fingerprint):
    """Exit with one line if a shard's tokens are not those of the model or of its tokenizer."""
    # tokens that no text here has, such as one that only pads, need no row of the embedding
    if shard.n_vocab > vocab_size and shard.tokens.max() >= vocab_size:
        raise SystemExit(
            f"error: {path}: its vocabulary has {shard.n_vocab} tokens, vocab_size is {vocab_size}"
        )
    other_size = n_vocab and shard.n_vocab and shard.n_vocab != n_vocab
    other_tokens = fingerprint and shard.fingerprint and shard.fingerprint != fingerprint
    if other_size or other_tokens:
        raise SystemExit(
            f"error: {path}: was made with another tokenizer than the run's; make it again "
            "with the run's --encoding"
        )


def check_length(path, shard, block_size):
    """Exit with one line if a shard's rows are of another length, or its text is too short."""
    if shard.row and shard.row != block_size + 1:
        raise SystemExit(
            f"error: {path}: its rows are made for block_size {shard.row - 1}, not {block_size}; "
            "set that, or make it again"
        )
    if len(shard.tokens) <= block_size:
        raise SystemExit(
            f"error: {path}: {len(shard.tokens)} tokens are less than one sequence of "
            "block_size + 1"
        )
