# LLaMA 13B on C4 on one 24 GB card: see it first with --dry_run=True. The paper stops at 7B: its recipe, a quarter's rank.
exec(open("config/llama_7b.py").read())
out_dir = "out-13b"
n_layer = 40
n_head = 40
n_embd = 5120
ffn_dim = 13824
rank = 1280
residual_blocks = 1
gradient_accumulation_steps = 1  # 512 sequences a step, like 7B's, take 4 GiB more by --method=qgalore
