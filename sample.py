"""
Generate text from a run's checkpoint, token by token:
    python sample.py --out_dir=out-demo --prompt="The function" --temperature=0.8 --top_k=40
    python sample.py config/demo.py --num_samples=3
"""

import torch

from run.checkpoint import load_model
from configurator import configure
from run.encodings import get_encoding

# -----------------------------------------------------------------------------
out_dir = "out"  # whose ckpt.pt to read; or a Hugging Face directory or repository
prompt = "\n"
num_samples = 1
max_new_tokens = 300
temperature = 0.8  # 0: always the likeliest token
top_k = 0  # only the k likeliest tokens, 0 = all
top_p = 1.0  # of those, the fewest whose probabilities sum to this
seed = 1337
device = "auto"
# -----------------------------------------------------------------------------


def stream(model, encoding, idx, max_new_tokens, temperature, top_k, top_p, seed):
    """Print the prompt idx (1, T) int64 and the tokens that the model adds, each as soon as it is known."""
    generator = torch.Generator(idx.device).manual_seed(seed)
    ids, shown = idx[0].tolist(), 0

    def show(end):  # all ids anew, about 0.1 ms a thousand: what one token reads as depends on those before it
        nonlocal shown
        text = encoding.decode(ids)
        text = text if end else text.rstrip("\ufffd")  # a character may span tokens, and is this until it is whole
        print(text[shown:], end="\n" if end else "", flush=True)
        shown = max(shown, len(text))

    show(end=False)
    for token in model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator):
        if token.item() < encoding.n_vocab:  # vocab_size may be padded beyond the encoding's
            ids.append(token.item())
            show(end=False)
    show(end=True)


def main():
    configure(globals(), skip_unknown_in_files=True)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, name = load_model(out_dir, kind)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    encoding = get_encoding(name)
    ids = getattr(encoding, "encode_with_special", encoding.encode_ordinary)(prompt) or [encoding.eot_token]
    ids = encoding.with_bos(ids) if hasattr(encoding, "with_bos") else ids
    idx = torch.tensor([ids], device=kind)
    for i in range(num_samples):
        stream(model, encoding, idx, max_new_tokens, temperature, top_k, top_p, seed + i)


if __name__ == "__main__":
    main()
