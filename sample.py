"""
Generate text from a run's checkpoint, token by token:
    python sample.py --out_dir=out-demo --prompt="The function" --temperature=0.8 --top_k=40
    python sample.py config/demo.py --num_samples=3
"""

import codecs
import os

import torch

from checkpoint import paths, read_checkpoint
from configurator import configure
from model import LLaMA
from prepare_c4 import get_encoding

# -----------------------------------------------------------------------------
out_dir = "out"  # whose ckpt.pt to read
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
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
    generator = torch.Generator(idx.device).manual_seed(seed)
    print(encoding.decode(idx[0].tolist()), end="", flush=True)
    for token in model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator):
        if token.item() < encoding.n_vocab:  # vocab_size may be padded beyond the encoding's
            print(utf8.decode(encoding.decode_single_token_bytes(token.item())), end="", flush=True)
    print(utf8.decode(b"", final=True))


def main():
    configure(globals(), skip_unknown_in_files=True)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = read_checkpoint((paths(out_dir) or [os.path.join(out_dir, "ckpt.pt")])[0])
    config, weights = checkpoint["config"], checkpoint["model"]
    encoding = get_encoding(config["encoding"])
    model = LLaMA.from_settings(config, kind, weights["embed.weight"].dtype)
    model.load_state_dict(weights)
    idx = torch.tensor([encoding.encode_ordinary(prompt) or [encoding.eot_token]], device=kind)
    for i in range(num_samples):
        stream(model, encoding, idx, max_new_tokens, temperature, top_k, top_p, seed + i)


if __name__ == "__main__":
    main()
