# A small LLaMA on the English that every Python installation holds: help topics and docstrings, byte by byte.
out_dir = "out-demo"
data_dir = "data/docs"
data_input = "docs"
encoding = "bytes"
vocab_size = 257

n_layer = 4
n_head = 4
n_embd = 128
ffn_dim = 352
block_size = 128
batch_size = 8

rank = 32
proj_gap = 50
learning_rate = 0.01
max_iters = 800
warmup_iters = 80
eval_interval = 200
eval_iters = 50
sample_tokens = 400
