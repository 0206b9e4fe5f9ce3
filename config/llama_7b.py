# LLaMA 7B on C4 on one 16 GB card (RTX 4060 Ti): see it first with --dry_run=True.
# The recipe is the paper's but for the batch: 512 sequences a step would need a low-rank accumulation buffer of 6 GiB.
# A step here is 16 sequences, as the paper's published single-GPU code in fact takes them.
out_dir = "out-7b"
device = "cuda"
n_layer = 32
n_head = 32
n_embd = 4096
ffn_dim = 11008

batch_size = 16
checkpoint_activations = True
checkpoint_bits = 8
compile = True
rank = 1024
proj_gap = 500
learning_rate = 0.004
max_iters = 150000
warmup_iters = 15000
eval_interval = 1000
