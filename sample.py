"""
Generate text from a run's checkpoint, token by token:
    python sample.py --out_dir=out-demo --prompt="The function" --temperature=0.8 --top_k=40
    python sample.py config/demo.py --num_samples=3

or talk with a model that has a chat template. Each line is a message; Ctrl-C ends an answer, and
Ctrl-D the chat:
    python sample.py --out_dir=out-smollm2 --chat=True
"""

import os
import sys
from functools import partial

from configurator import above, at_least, configure, one_of

# -----------------------------------------------------------------------------
# text
out_dir = "out"  # whose ckpt.pt to read; or a Hugging Face directory or repository
prompt = "\n"
chat = False  # each line of standard input is a prompt, in the checkpoint's chat template
num_samples: at_least(1) = 1
max_new_tokens: at_least(1) = 300
# choice of tokens
temperature: at_least(0) = 0.8  # 0: always the likeliest token
top_k: at_least(0) = 0  # only the k likeliest tokens, 0 = all
top_p: above(0) = 1.0  # of those, the fewest whose probabilities sum to this
seed = 1337
# system
device: one_of("auto", "cuda", "cpu") = "auto"
# -----------------------------------------------------------------------------

if __name__ == "__main__":  # torch takes seconds to load: what is mistyped is said before
    s = configure(sys.modules[__name__], ignore_unknown=True)

import torch

from run.checkpoint import load_model
from run.device import check_device, pick_device
from run.encodings import get_encoding
from run.finite import first_not_finite
from run.show import Typed
from run.talk import Talk

PROMPT_END = "|>"  # is shown where the prompt ends and the model goes on


def main(s):
    device = pick_device(s.device)
    check_device(device)
    try:
        model, name = load_model(os.path.expanduser(s.out_dir), device)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    bad = first_not_finite(model)
    if bad is not None:
        raise SystemExit(f"error: {s.out_dir}: weight {bad} is not finite: nothing can be sampled")
    encoding = get_encoding(name)
    choice = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    if s.chat:
        generator = torch.Generator(device).manual_seed(s.seed)
        say = partial(generate, model, generator=generator, **choice)
        Talk(model, encoding, device, say, s.max_new_tokens).go()
        return
    # a checkpoint's own tokenizer knows special tokens in a text, and may begin with one
    encode = getattr(encoding, "encode_with_special", encoding.encode_ordinary)
    ids = encode(s.prompt) or [encoding.eot_token]
    if hasattr(encoding, "with_bos"):
        ids = encoding.with_bos(ids)
    idx = torch.tensor([ids], device=device)  # (1, T)
    for i in range(s.num_samples):
        stream(model, encoding, idx, s.max_new_tokens, seed=s.seed + i, mark=PROMPT_END, **choice)


def stream(model, encoding, idx, max_new_tokens, temperature, top_k, top_p, seed, mark=""):
    """Print the prompt idx (1, T) int64, `mark`, and each next token as soon as it is known."""
    generator = torch.Generator(idx.device).manual_seed(seed)
    typed = Typed(encoding)
    typed.add(*idx[0].tolist())
    print(mark, end="", flush=True)
    for token in generate(model, idx, max_new_tokens, temperature, top_k, top_p, generator):
        typed.add(token.item())
    typed.end()


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             caches=None):
    """Yield max_new_tokens times the next token of each row, (B, 1) int64, after idx (B, T).

    temperature 0 takes the likeliest. top_k 0 and top_p 1 leave all tokens in; else the k
    likeliest, and of those the fewest whose probabilities sum to top_p. Each token costs one
    position's work: keys and values are kept, in `caches` if given, one dict a block, with those of
    the text before idx."""
    caches = caches or [{} for _ in model.blocks]
    idx = idx[:, -model.config.block_size :]
    position = caches[0]["k"].shape[2] if caches[0] else 0
    for _ in range(max_new_tokens):
        logits = model(idx, caches=caches, position=position)  # (B, V)
        position += idx.shape[1]
        if temperature == 0:
            idx = logits.argmax(dim=-1, keepdim=True)
        else:
            k = min(top_k or logits.shape[-1], logits.shape[-1])
            logits, token = (logits / temperature).topk(k)  # sorted
            p = logits.softmax(dim=-1)
            p[p.cumsum(dim=-1) - p >= top_p] = 0  # never the first, whose sum of larger ones is 0
            idx = token.gather(1, torch.multinomial(p, 1, generator=generator))
        yield idx


if __name__ == "__main__":
    main(s)
