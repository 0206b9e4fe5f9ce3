"""
Records made into examples: tokens, and for each whether it counts in the loss.
"""

import collections
import itertools
import os

import numpy as np

from finetune.data.conversations import conversations, template_fields, unused, without_nothing
from finetune.data.inputs import records_of, shown_name
from finetune.data.messages import key_of, messages_of
from finetune.data.templates import fields_in, prompt_and_completion
from finetune.checkpoints.tokenizer import Tokenizer
from prepare_c4 import PIECE, last_cut
from run.records import Skipped
from run.shards import IN_LOSS, STARTS
from run.show import Progress
from run.text import first_line

# tokens, flags: uint32 and uint8, (length,) each; cut: whether it lost its end
Example = collections.namedtuple("Example", "tokens flags cut", defaults=[False])


def encode(encode_text, pieces):
    """(ids, flags) of a text in pieces [(text, whether it counts)].

    The tokens are the whole text's, where each piece ends with one: alone, a piece would have its
    start marked as a word's by sentencepiece. Else they are those of the pieces, as the model will
    see a prompt by itself ("Answer: " + "4")."""
    texts, counts = zip(*pieces)
    prefixes = [in_slices(encode_text, text) for text in itertools.accumulate(texts)]
    ids = prefixes[-1]  # the whole text's
    ends = [len(prefix) for prefix in prefixes]  # of each piece in ids
    # a token that spans two pieces: each piece by itself
    if any(prefix != ids[: len(prefix)] for prefix in prefixes):
        parts = [in_slices(encode_text, text) for text in texts]
        ids = list(itertools.chain(*parts))
        ends = list(itertools.accumulate(map(len, parts)))
    flags = np.where(counts, IN_LOSS, 0)
    return ids, np.repeat(flags, np.diff(ends, prepend=0)).tolist()


def in_slices(encode_text, text):
    """The ids of a text; tiktoken gives up on a million spaces, so that a very long one is cut."""
    ids = []
    start = 0
    while len(text) - start > PIECE:
        end = last_cut(text, start, start + PIECE)
        if end == start:
            end = start + PIECE
        ids += encode_text(text[start:end])
        start = end
    return ids + encode_text(text[start:])


def examples(enc, record, prompt="{prompt}", completion="{completion}", words=(), chat=True):
    """The Examples that a record makes, of any length: one, or of a conversation one an answer.

    chat: a record with messages is a conversation. The rest: as in prompt_and_completion. Raises
    ValueError, or KeyError, if it makes none."""
    if not chat or key_of(record) is None:
        pieces = prompt_and_completion(record, prompt, completion, words)
        return [of_pieces(enc, pieces, is_chat=False)]
    check_template(enc, "--prompt and --completion")
    fields = template_fields(enc, record)
    found = conversations(enc, messages_of(record, fields), fields)
    return [of_pieces(enc, pieces, is_chat=True) for pieces in found]


def check_template(enc, otherwise):
    """Exit with one line if an encoding has no chat template. otherwise: flags that need none."""
    if not isinstance(enc, Tokenizer) or enc.chat_template is None:
        raise SystemExit(
            "the encoding has no chat template; messages need an instruct model's checkpoint, "
            f"or {otherwise}"
        )


def of_pieces(enc, pieces, is_chat):
    """The Example of a text in pieces [(text, whether it counts)].

    is_chat: a chat template wrote it, with special tokens; else an end-of-text token follows."""
    if is_chat:
        ids, flags = encode(enc.encode_with_special, pieces)
    else:
        ids, flags = encode(enc.encode_ordinary, pieces)
        ids = [*ids, enc.eot_token]
        flags = [*flags, IN_LOSS]
    # bos is context, too, and no target
    if isinstance(enc, Tokenizer):
        with_bos = enc.with_bos(ids)
        flags = [0] * (len(with_bos) - len(ids)) + flags
        ids = with_bos
    flags[0] = STARTS  # and no target: nothing comes before it
    return Example(np.array(ids, np.uint32), np.array(flags, np.uint8))


def not_in_example(enc, record, prompt, completion, chat):
    """What of a record that made an example is not in it, a list of short texts."""
    if chat and key_of(record) is not None:
        return unused(enc, record)
    used = fields_in(prompt) | fields_in(completion)
    return [f"the field {name!r}" for name in without_nothing(record) if name not in used]



def read_examples(file, enc, columns, make, counts):
    """Yield the Examples in a File.

    make(enc, record): (those that the record makes, what of it is in none, a list of texts); raises
    ValueError, or KeyError, if it makes none. counts: a Counter that gets "records", and "unread",
    how many made none. Says why, and what of the records is in no example."""
    name = shown_name(file)
    total = 0
    divided = 0  # conversations that made an example an answer
    skipped = Skipped()
    not_used = Skipped()
    progress = Progress(os.path.basename(name), unit="records")
    for where, record in progress.over(records_of(file, columns)):
        total += 1
        try:
            if isinstance(record, ValueError):
                raise record
            made, rest = make(enc, record)
            for what in rest:
                not_used.add(what, where)
        except KeyError:  # the file's structure is another: all of its records will be so
            raise SystemExit(
                f'error: {name}, {where}: a message has no role; each is {{"role", "content"}}'
            )
        except SystemExit as e:  # nor can others be read: say which was met first
            raise SystemExit(f"error: {name}, {where}: {str(e.code).removeprefix('error: ')}")
        except ValueError as e:
            skipped.add(first_line(e), where)
        else:
            divided += len(made) > 1
            yield from made
    counts.update(records=total, unread=skipped.total)
    skipped.say(name, total)
    for what, (count, where) in not_used.items():
        print(f"{name}: not used: {what} ({count:,} of {total:,} records; the first: {where})")
    if divided:
        print(f"note: {name}: {divided:,} conversations make an example for each answer: the chat "
              f"template of {enc.name} writes earlier turns otherwise once others follow")


def shorten(found, size, counts):
    """Yield the examples, of at most `size` tokens each.

    counts: its "too_long" are those that are left out, as no target is left of them."""
    for e in found:
        short = e.flags[:size]
        if not (short & IN_LOSS).any():
            counts["too_long"] += 1
        elif len(e.tokens) > size:  # copies: not views of a long one
            yield Example(e.tokens[:size].copy(), short.copy(), True)
        else:
            yield e


def take(found, weight, seed):
    """The examples as often as the weight says: 2.5 is each twice, and half of them once more.

    seed: whole numbers, of which half is drawn. In the order of the file."""
    whole = int(weight)
    part = round((weight - whole) * len(found))
    drawn = sorted(np.random.default_rng(seed).permutation(len(found))[:part].tolist())
    return found * whole + [found[i] for i in drawn]
