# LLaMA 1B on C4 by the paper's recipe: 13 billion tokens.
# The paper's text says rank 512; its published script, 1024.
out_dir = "out-1b"
n_layer = 24
n_head = 32
n_embd = 2048
ffn_dim = 5461

batch_size = 16
gradient_accumulation_steps = 32  # 512 sequences a step
checkpoint_activations = True
compile = True
method = "qgalore"
if_read(rank=512, proj_gap=200)
if_read(weight_group_size=0, matmul="int8")  # products on INT8 tensor cores
learning_rate = 0.01
max_iters = 100000
warmup_iters = 10000
eval_interval = 1000
