# SmolLM2-135M-Instruct learns which of two answers is preferred, by DPO. First its pairs:
#   python -m finetune.prepare_dpo --input=pairs.jsonl --out_dir=data/pairs \
#       --encoding=HuggingFaceTB/SmolLM2-135M-Instruct
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
out_dir = "out-dpo"
data_dir = "data/pairs"
block_size = 1024  # both sides of a pair are in one row
batch_size = 1

dpo_beta = 0.1
freeze_embedding = True
method = "qgalore"
if_read(rank=64, proj_gap=50)
learning_rate = 0.0003
max_iters = 300
warmup_iters = 30
eval_interval = 100
eval_iters = 50
log_interval = 10
