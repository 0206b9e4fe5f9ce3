# LLaMA 3B on C4, for cards of 10 GB; for 8 GB add --gradient_accumulation_steps=1. See it first with
# --dry_run=True. The paper has no such size; this is its 7B recipe, the rank a quarter of the width.
include("llama_7b.py")
out_dir = "out-3b"
n_layer = 28
n_head = 24
n_embd = 3072
ffn_dim = 8192
if_read(rank=768)
