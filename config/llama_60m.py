# LLaMA 60M on C4 by the paper's recipe: 1.3 billion tokens.
# (arXiv 2407.08296, appendix; GaLore's table 2)
out_dir = "out-60m"
n_layer = 8
n_head = 8
n_embd = 512
ffn_dim = 1376

batch_size = 128
gradient_accumulation_steps = 4  # 512 sequences a step
compile = True
method = "qgalore"
if_read(rank=128, proj_gap=200)
if_read(weight_group_size=0, matmul="int8")  # products on INT8 tensor cores
learning_rate = 0.015
max_iters = 10000
warmup_iters = 1000
