# LLaMA 7B on C4 by the paper's recipe, its batch of 512 sequences included, on one 16 GB card (RTX 4060 Ti): see it first
# with --dry_run=True. The batch costs 3.9 GiB, in which half of each gradient (INT8), and those of embedding and head (bf16)
# add up (low-rank gradients do in the momentum); a 12 GB card has room for a step on 16 sequences, which needs no sums:
# --gradient_accumulation_steps=1 --residual_blocks=1
out_dir = "out-7b"
device = "cuda"
n_layer = 32
n_head = 32
n_embd = 4096
ffn_dim = 11008

batch_size = 16
gradient_accumulation_steps = 32  # 512 sequences a step
checkpoint_activations = True
checkpoint_bits = 8
compile = True
rank = 1024
proj_gap = 500
residual_blocks = 2
learning_rate = 0.004
max_iters = 150000
warmup_iters = 15000
eval_interval = 100  # and a checkpoint of 10.1 GB: a step takes minutes
