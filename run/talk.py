"""
A conversation in the terminal, in a checkpoint's own chat template.

The template writes the whole conversation anew for each answer. What of it the model has read
already is not computed again: keys and values of the tokens with which both begin are kept.
"""

import contextlib
import sys

import torch

from run.show import Typed
from run.text import first_line

try:
    import readline  # noqa: F401: input() then has a history and arrow keys
except ImportError:  # Windows
    pass


class Talk:
    """What was said, and its keys and values.

    encoding: a checkpoint's Tokenizer. say(idx, n, caches=): yields up to n tokens after idx (1, T)
    int64, as sample.generate() does. most: tokens of an answer. Exits with one line if there is no
    chat template."""

    def __init__(self, model, encoding, device, say, most):
        if getattr(encoding, "chat_template", None) is None:
            raise SystemExit("error: the checkpoint's tokenizer has no chat template, which "
                             "--chat=True takes: an instruct model's has one")
        self.encoding = encoding
        self.device = device
        self.say = say
        self.most = most
        self.longest = model.config.block_size
        self.messages = []
        self.ids = []  # the text that was computed, or some more of it
        self.caches = [{} for _ in model.blocks]

    def go(self):
        """Answer each line of standard input."""
        for line in lines():
            self.messages.append({"role": "user", "content": line})
            ids = self.prompt()
            if ids is None:
                continue
            answer = self.answer(ids)
            self.messages.append({"role": "assistant", "content": answer})

    def prompt(self):
        """The conversation's ids, with the start of an answer; None if the message is too long.

        Where it is too long for the model, its oldest message and the answer to it are left out."""
        while self.messages:
            try:
                text = self.encoding.render(self.messages, add_generation_prompt=True)
            except ValueError as e:
                raise SystemExit(f"error: {first_line(e)}")
            ids = self.encoding.with_bos(self.encoding.encode_with_special(text))
            if len(ids) < self.longest:
                return ids
            what = "the oldest message is left out"
            if len(self.messages) == 1:
                what = "say it shorter"
            tell(f"{len(ids)} tokens, and the model sees {self.longest}: {what}")
            del self.messages[:2]
        return None

    def answer(self, ids):
        """Print what the model says after `ids`, until an end token or Ctrl-C, and return it."""
        begun = cut(self.caches, self.ids, ids)
        idx = torch.tensor([ids[begun:]], device=self.device)
        most = min(self.most, self.longest - len(ids))
        self.ids = list(ids)
        typed = Typed(self.encoding)
        ended = False
        with contextlib.suppress(KeyboardInterrupt):
            for token in self.say(idx, most, caches=self.caches):
                self.ids.append(token.item())
                ended = token.item() in self.encoding.end_tokens
                if ended:
                    break
                typed.add(token.item())
            if not ended:
                tell(f"cut after {most} tokens; --max_new_tokens sets how many")
        typed.end()
        return typed.text()


def lines():
    """What the user says, line by line, until Ctrl-D or the end of a file."""
    terminal = sys.stdin.isatty()
    with contextlib.suppress(AttributeError, OSError):  # a stream of another kind
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print(end="\n" if terminal else "")
            return
        if line.strip():
            yield line


def cut(caches, before, ids):
    """Cut the caches of the text `before` to the tokens with which ids begins; returns how many.

    They may be of less than all of `before`, or of one token more in some blocks than in others. At
    least one of ids is left to be computed."""
    held = 0
    if all(len(cache) == 2 for cache in caches):
        held = min(t.shape[2] for cache in caches for t in cache.values())
    same = 0
    for a, b in zip(before[:held], ids[:-1]):
        if a != b:
            break
        same += 1
    for cache in caches:
        for name, t in list(cache.items()):
            cache[name] = t[:, :, :same]  # (1, heads, same, hs)
        if not same:
            cache.clear()
    return same


def tell(text):
    print(f"note: {text}", file=sys.stderr, flush=True)
