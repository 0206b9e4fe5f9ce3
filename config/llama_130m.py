# LLaMA 130M on C4 by the paper's recipe: 2.6 billion tokens.
out_dir = "out-130m"
n_layer = 12
n_head = 12
n_embd = 768
ffn_dim = 2048

batch_size = 32
gradient_accumulation_steps = 16  # 512 sequences a step
compile = True
method = "qgalore"
if_read(rank=256, proj_gap=200)
if_read(weight_group_size=0, matmul="int8")  # products on INT8 tensor cores
learning_rate = 0.015
max_iters = 20000
warmup_iters = 2000
