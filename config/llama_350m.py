# LLaMA 350M on C4 by the paper's recipe: 7.9 billion tokens.
out_dir = "out-350m"
n_layer = 24
n_head = 16
n_embd = 1024
ffn_dim = 2736

batch_size = 64  # for a card of 16 GB; with 16 it fits 8 GB
gradient_accumulation_steps = 8  # 512 sequences a step; with batch_size 16: 32
compile = True
method = "qgalore"
if_read(rank=256, proj_gap=200)
if_read(weight_group_size=0, matmul="int8")  # products on INT8 tensor cores
learning_rate = 0.01
max_iters = 60000
warmup_iters = 6000
eval_interval = 1000
