"""
What a run reads: batches of windows of block_size + 1 tokens, out of shards.

In plain text (prepare_c4.py, llm.c) a window starts at each multiple of block_size and shares its
last token with the next one: there it is a target, here an input. What is left at a shard's end
is not read. In rows of examples (finetune/prepare_sft.py), of pairs (finetune/prepare_dpo.py) or of
documents (run/protocol.py) a window is a row, and only some of its tokens count in the loss.

Shards are memory-mapped, so that a data set may be larger than memory.
"""

import glob
import os

import numpy as np
import tiktoken
import torch

from prepare_c4 import check_made_of, prepare
from run.encodings import fingerprint, get_encoding
from run.manifest import Manifest
from run.shards import IN_LOSS, REJECTED, STARTS, open_shard, shard_paths

# (n_vocab, fingerprint) of tiktoken's encodings, as far as known without their vocabularies
TIKTOKEN = {
    "gpt2": (50257, 1352840262),
    "r50k_base": (50257, 1352840262),
    "p50k_base": (50281, 0),
    "p50k_edit": (50284, 0),
    "cl100k_base": (100277, 0),
    "o200k_base": (200019, 0),
    "o200k_harmony": (201088, 0),
}


def open_windows(s, part, seed):
    """The Windows of a run's settings. seed: of their order, None: as they lie in the files.

    part: "train" or "val". Exits with one line as Windows does."""
    paths = shard_paths(s.data_dir, part)
    if not paths:
        advice = "make some with prepare_c4.py, or set data_dir"
        if part == "val" and shard_paths(s.data_dir, "train"):
            advice = "there are some to train on: make them with a --val_fraction above 0"
        pattern = os.path.join(s.data_dir, f"*_{part}_*.bin")
        raise SystemExit(f"error: no shards {pattern}; {advice}")
    check_finished(s.data_dir, paths)
    n_vocab, number = known_tokenizer(s.encoding or "gpt2")
    if not number:  # the parts have to be alike, at least
        for path in shard_paths(s.data_dir, "train"):
            number = number or open_shard(path).fingerprint
    windows = Windows(paths, s.block_size, s.vocab_size, seed, n_vocab, number)
    if windows.pairs != (s.dpo_beta > 0):
        why = "are no pairs: make some with finetune.prepare_dpo, or leave dpo_beta at 0"
        if windows.pairs:
            why = "are pairs of chosen and rejected examples: set dpo_beta, as to 0.1"
        raise SystemExit(f"error: dpo_beta={s.dpo_beta:g}: the {part} shards in {s.data_dir} {why}")
    return windows


def check_finished(folder, paths):
    """Exit with one line if shards.json says that a shard is to be made again.

    A stop between two of them may leave the new text for validation, and the old one to train on.
    A folder needs no shards.json, and a damaged one keeps no run from its data."""
    try:
        made = Manifest.read(os.path.expanduser(folder))
    except SystemExit as e:
        print(f"note: {str(e).removeprefix('error: ').partition(';')[0]}")
        return
    for path in paths:
        entry = made.entry(os.path.basename(path))
        if entry and not entry["finished"]:
            raise SystemExit(
                f"error: {path}: is to be made again, which was not finished: give the command "
                "that made it once more"
            )


def known_tokenizer(encoding):
    """(n_vocab, fingerprint) of an encoding; 0 is what cannot be known here, and that is said."""
    n_vocab, number = TIKTOKEN.get(encoding, (0, 0))
    if number:  # known offline, too
        return n_vocab, number
    try:
        tokenizer = get_encoding(encoding)
    except SystemExit as e:
        if encoding not in tiktoken.list_encoding_names():
            raise
        why = str(e).removeprefix("error: ").partition(" (")[0]
        print(f"note: {why}: whether the shards were made with it is not known for sure")
        return n_vocab, 0
    return tokenizer.n_vocab, fingerprint(tokenizer)


def make_data(s, ranks):
    """Make those shards of data_input that are not there; the other ranks wait for them.

    Exits with one line if data_dir holds others."""
    if ranks.rank == 0 and s.data_input:
        there = bool(shard_paths(s.data_dir, "train"))
        if not there or not check_made_of(s.data_input, s.data_dir, s.encoding):
            prepare(input=s.data_input, out_dir=s.data_dir, encoding=s.encoding)
    ranks.agree({})


def shares_of(batches, windows, s, ranks):
    """The weight of each micro-batch's mean loss in the step's loss, times its scale: [float].

    batches: of this rank, from `windows`."""
    if not windows.rows:
        return [ranks.loss_scale / s.gradient_accumulation_steps] * len(batches)
    weights = [windows.weight(y, documents) for _, y, documents in batches]
    of_step = max(1, ranks.total(sum(weights)))
    return [weight / of_step * ranks.loss_scale for weight in weights]


class Windows:
    """The windows of all shards that match `pattern`, in an order drawn from `seed`.

    An epoch reads each window once. It takes the shards in a new order, and the windows of each
    shard in a new order. `position`, the windows read so far, is all the state there is: set it,
    and reading goes on from there.

    paths: of the shards, or a glob. seed: None reads in the order of the files.
    n_vocab, fingerprint: of the run's tokenizer; 0: of the first shard that tells. A shard that
    says it was made with another one is refused.

    `total` is the windows in an epoch, `rows` whether they are rows of examples, `pairs` whether
    these are pairs. Exits with one line if a shard is damaged or does not fit the run.
    """

    def __init__(self, paths, block_size, vocab_size, seed=None, n_vocab=0, fingerprint=0):
        self.paths = sorted(glob.glob(paths)) if isinstance(paths, str) else paths
        if not self.paths:
            raise SystemExit(
                f"error: no shards {paths}; make some with prepare_c4.py, or set data_dir"
            )
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.seed = seed
        self.n_vocab = n_vocab
        self.fingerprint = fingerprint

        self.sizes = []  # windows in each shard
        self.examples = 0  # in rows of pairs: two in each
        self.before = []  # of each shard of pairs: the examples before each row, (rows,)
        for path in self.paths:
            shard = open_shard(path)
            self._check(path, shard)
            is_rows, is_pairs = kind_of(shard)
            if not self.sizes:
                self.rows, self.pairs = is_rows, is_pairs
            elif (self.rows, self.pairs) != (is_rows, is_pairs):
                raise SystemExit(
                    f"error: {path}: plain text, rows of examples or documents, and pairs do not "
                    f"mix, and {self.paths[0]} is of another kind; move one to another data_dir"
                )
            self.sizes.append(self._windows_in(shard))
            if is_pairs:
                ends = self.examples + check_pairs(path, shard).cumsum()  # (rows,)
                self.before.append(np.concatenate([[self.examples], ends[:-1]]))
                self.examples = int(ends[-1])
        self.total = sum(self.sizes)
        self.position = 0
        self.epoch = None  # that `order` and `ends` are of
        self.shard = None  # the one that is open, as an index into `paths`

    def _check(self, path, shard):
        """Exit with one line if a shard does not fit the run, or those before it."""
        check_tokenizer(path, shard, self.n_vocab, self.fingerprint)
        self.n_vocab = self.n_vocab or shard.n_vocab
        self.fingerprint = self.fingerprint or shard.fingerprint
        # tokens that no text here has, such as one that only pads, need no row of the embedding
        if shard.n_vocab > self.vocab_size and shard.tokens.max() >= self.vocab_size:
            raise SystemExit(
                f"error: {path}: its vocabulary has {shard.n_vocab} tokens, vocab_size is "
                f"{self.vocab_size}"
            )
        check_length(path, shard, self.block_size)
        if not shard.n_vocab:  # llm.c's: what does not fit is said now, not weeks later
            self._check_tokens(path, shard)
        if shard.row:
            check_flags(path, shard)

    def _check_tokens(self, path, shard):
        """Exit with one line if a token is beyond the model, or beyond its encoding."""
        largest = shard.tokens.max()  # an embedding of vocab_size rows has none for a larger one
        if largest >= self.vocab_size:
            raise SystemExit(
                f"error: {path}: token {largest} is beyond vocab_size {self.vocab_size}"
            )
        if self.n_vocab and largest >= self.n_vocab:  # of a shard that does not tell its tokenizer
            raise SystemExit(
                f"error: {path}: token {largest} is beyond the {self.n_vocab} of the run's "
                "encoding: set --encoding to the one that made it"
            )

    def _windows_in(self, shard):
        if shard.row:
            return len(shard.tokens) // shard.row
        return (len(shard.tokens) - 1) // self.block_size

    def batch(self, n, rank=0, ranks=1):
        """(x, y, documents): the rank-th n of the next n * ranks windows.

        x, y: (n, T) int64, y one token ahead. documents: None for plain text, and T is block_size.

        In rows of examples y is -1 where a token is no target, and documents, (n, T) int64, numbers
        the examples in each row; those of pairs are numbered through all rows, from 1, the chosen
        ones oddly. T ends with the batch's last target: the columns cut away are padding, which
        nothing that counts can see.
        """
        # every rank counts all windows, and takes its own
        self.position += n * rank
        windows = [self._next() for _ in range(n)]
        self.position += n * (ranks - 1 - rank)

        tokens = np.stack([tokens for tokens, _, _ in windows])
        tokens = torch.from_numpy(tokens.astype(np.int64))  # (n, block_size + 1)
        x = tokens[:, :-1].contiguous()
        y = tokens[:, 1:].contiguous()
        if not self.rows:
            return x, y, None

        flags = np.stack([flags for _, flags, _ in windows])
        flags = torch.from_numpy(flags.astype(np.int64))  # (n, block_size + 1)
        is_target = flags[:, 1:] & IN_LOSS > 0  # (n, block_size), of y
        # not in place: of one row, x and y are views of the same tokens
        y = y.masked_fill(~is_target, -1)
        starts = flags & STARTS > 0
        before = torch.tensor([before for _, _, before in windows])  # (n,)
        documents = before[:, None] + starts.cumsum(1)[:, :-1]  # (n, block_size), of x

        # cut what lies after the last target of all rows
        T = 1
        if is_target.any():
            T = int(is_target.any(0).nonzero().max()) + 1
        return x[:, :T].contiguous(), y[:, :T].contiguous(), documents[:, :T].contiguous()

    def _next(self):
        """(tokens, flags or None, examples before it) of the window at `position`, and on to the
        next one."""
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
        before = self.before[shard][window] if self.pairs else 0
        return self.tokens[start:end], flags, before

    def weight(self, y, documents):
        """What a batch's mean loss counts: 1 of plain text. Else each target counts alike, or in
        pairs each pair."""
        if not self.rows:
            return 1
        if not self.pairs:
            return (y >= 0).sum().item()
        return len(documents[(y >= 0).to(documents.device)].unique()) // 2

    def _open(self, shard):
        path = self.paths[shard]
        opened = open_shard(path)
        if self._windows_in(opened) != self.sizes[shard] or (opened.row > 0) != self.rows:
            raise SystemExit(f"error: {path}: another file took its place while the run reads it")
        self._check_tokens(path, opened)
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


def check_tokenizer(path, shard, n_vocab, fingerprint):
    """Exit with one line if a shard says that it was made with another tokenizer than this.

    n_vocab, fingerprint: what is wanted; 0: not known. llm.c's shards do not say it."""
    other_size = n_vocab and shard.n_vocab and shard.n_vocab != n_vocab
    other_tokens = fingerprint and shard.fingerprint and shard.fingerprint != fingerprint
    if other_size or other_tokens:
        of = f" ({shard.n_vocab} tokens, not {n_vocab})" if other_size else ""
        raise SystemExit(
            f"error: {path}: was made with another tokenizer than the run's{of}: set --encoding "
            "to the one that made it, or make it again"
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


def check_flags(path, shard):
    """Exit with one line if a shard's flags are none, or let no token count in the loss."""
    flags = shard.flags.reshape(-1, shard.row)  # (rows, block_size + 1)
    largest = flags.max()
    _, is_pairs = kind_of(shard)
    if largest > (IN_LOSS | STARTS | REJECTED if is_pairs else IN_LOSS | STARTS):
        raise SystemExit(
            f"error: {path}: damaged: {largest} is no flag of a token; delete it, make it again"
        )
    targets = (rows[:, 1:] & IN_LOSS for rows in np.array_split(flags, len(flags) // 4096 + 1))
    if not any(part.any() for part in targets):
        raise SystemExit(f"error: {path}: has no target: not one of its tokens counts in the loss")


def kind_of(shard):
    """(whether it has rows, whether these are of pairs), by the flags of the first."""
    is_rows = shard.row > 0
    return is_rows, is_rows and bool((shard.flags[: shard.row] & REJECTED).any())


def check_pairs(path, shard):
    """How many examples each row of pairs has, (rows,). Exits with one line if not each row holds
    whole pairs, of a chosen and then a rejected example with targets each."""
    flags = shard.flags.reshape(-1, shard.row)  # (rows, block_size + 1)
    counts = []
    for part in np.array_split(flags, len(flags) // 4096 + 1):
        starts = part & STARTS > 0
        counts.append(starts.sum(1))
        is_rejected = part[starts] & REJECTED > 0  # (examples,)
        whole = starts[:, 0].all() and not (counts[-1] % 2).any()
        whole = whole and not is_rejected[0::2].any() and is_rejected[1::2].all()
        places = starts.ravel().nonzero()[0]
        if not whole or not np.logical_or.reduceat((part & IN_LOSS).ravel(), places).all():
            raise SystemExit(
                f"error: {path}: damaged: a row has an example that is no part of a pair, or has "
                "no target; make it again with finetune.prepare_dpo"
            )
    return np.concatenate(counts)
