# LLaMA 130M by GaLore's protocol, by any method, as c4_60m.py:
#   python prepare_c4.py --protocol=galore --shards=29 --out_dir=data/c4_galore
#   python train.py config/c4_130m.py --method=galore
include("c4_60m.py")
out_dir = "out-c4-130m-" + method
n_layer = 12
n_head = 12
n_embd = 768
ffn_dim = 2048

batch_size = 32
gradient_accumulation_steps = 16  # 512 sequences a step
if_read(rank=256)
max_iters = 20000
warmup_iters = 2000
