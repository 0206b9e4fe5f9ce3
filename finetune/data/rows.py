"""
Examples divided into training and validation, and laid into rows of one length.
"""

import collections
import hashlib

import numpy as np


def split(examples, val_fraction, seed):
    """({"train": numbers, "val": numbers}, how many repeat another), in a random order.

    By examples, not rows: packing changes nothing. Those that are the same are on one side."""
    same = collections.defaultdict(list)  # {hash of an example: its numbers}
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    for i in order:
        e = examples[i]
        same[hashlib.blake2b(e.tokens.tobytes() + e.flags.tobytes()).digest()].append(i)
    held_out = round(len(examples) * val_fraction)
    in_val = set()
    for numbers in same.values():  # in the order of the first of each
        if len(in_val) + len(numbers) <= held_out:
            in_val.update(numbers)
    splits = {
        "val": [i for i in order if i in in_val],
        "train": [i for i in order if i not in in_val],
    }
    return splits, len(examples) - len(same)


def pack(lengths, size):
    """Rows of `size`, as lists of indices, of pieces of these lengths.

    Each goes into the fullest row that has room for it, or into a new one."""
    rows = []
    by_room = collections.defaultdict(list)  # {room left: rows}
    rooms = 0  # bit r is set if some row has room r
    for i, length in enumerate(lengths):
        fitting = rooms >> length  # bit r: a row has room for it, and r to spare
        if fitting:
            spare = (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
            room = length + spare
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room  # it was the last with this room
        else:
            room = size
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def fill_rows(examples, block_size, packing, eot):
    """(tokens, flags), each (rows, block_size + 1), of examples that fit one row each.

    What is left of a row is padded with `eot`, which counts for nothing."""
    size = block_size + 1
    if packing:
        rows = pack([len(e.tokens) for e in examples], size)
    else:
        rows = [[i] for i in range(len(examples))]
    tokens = np.full((len(rows), size), eot, np.uint32)  # uint16 holds no vocabulary above 65,535
    flags = np.zeros((len(rows), size), np.uint8)
    for row, numbers in enumerate(rows):
        at = 0
        for i in numbers:
            end = at + len(examples[i].tokens)
            tokens[row, at:end] = examples[i].tokens
            flags[row, at:end] = examples[i].flags
            at = end
    return tokens, flags
