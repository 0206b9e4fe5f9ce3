# LLaMA 13B on C4 on one card of 24 GB: see it first with --dry_run=True. The paper stops at 7B;
# this is its recipe, the rank a quarter of the width.
include("llama_7b.py")
out_dir = "out-13b"
n_layer = 40
n_head = 40
n_embd = 5120
ffn_dim = 13824
if_read(rank=1280)
gradient_accumulation_steps = 1  # 512, like 7B's, take 4 GiB more, by_block 0.9
