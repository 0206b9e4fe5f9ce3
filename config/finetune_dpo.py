# SmolLM2-135M-Instruct is taught by DPO which of two answers is preferred: of 480 pairs that
# docs/fine_tuning.md makes of SST-2, on a CPU in half an hour. First their shards:
#   python -m finetune.prepare_dpo --input=pairs.jsonl --out_dir=data/pairs --block_size=256 \
#       --encoding=HuggingFaceTB/SmolLM2-135M-Instruct --val_fraction=0.25
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
out_dir = "out-dpo"
data_dir = "data/pairs"
block_size = 256  # both sides of a pair are in one row: more for longer answers
batch_size = 2  # a row holds five or six of these pairs

dpo_beta = 0.1
freeze_embedding = True
method = "qgalore"
if_read(rank=64, proj_gap=50)
learning_rate = 0.001
max_iters = 60
warmup_iters = 6
eval_interval = 20
eval_iters = 100
log_interval = 5
