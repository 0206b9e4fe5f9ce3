# LLaMA 7B on C4 by the paper's recipe, its batch of 512 sequences included, on one card of 16 GB
# (RTX 4060 Ti). See first what it takes, with --dry_run=True: 13.1 GiB. 2.4 of these hold the sums
# of micro-batches; a step on 16 sequences needs none: --gradient_accumulation_steps=1, for 12 GB.
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
method = "qgalore"
if_read(rank=1024, proj_gap=500)
if_read(weight_group_size=0, matmul="int8")  # products on INT8 tensor cores
learning_rate = 0.004
max_iters = 150000
warmup_iters = 15000
eval_interval = 100  # and a checkpoint of 10.1 GB: a step takes minutes
