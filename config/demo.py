# A small LLaMA on the English that every Python installation holds: help topics and docstrings,
# byte by byte. No download; some three minutes on two cores.
out_dir = "out-demo"
data_dir = "data/docs"
data_input = "docs"
encoding = "bytes"
vocab_size = 257

n_layer = 2
n_head = 6
n_embd = 192
ffn_dim = 528
block_size = 128
batch_size = 8

method = "qgalore"
if_read(rank=48, proj_gap=50, galore_scale=1.0)
learning_rate = 0.002
max_iters = 1000
warmup_iters = 100
eval_interval = 200
eval_iters = 50
sample_tokens = 400
