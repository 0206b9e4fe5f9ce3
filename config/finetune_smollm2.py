# SmolLM2-135M learns a movie review's sentiment (SST-2: sentence TAB label), on two CPU cores in
# minutes. First its shards:
#   python -m finetune.prepare_sft --input=sst2/train.tsv --columns=sentence,label \
#       --labels=negative,positive --out_dir=data/sst2 \
#       --encoding=HuggingFaceTB/SmolLM2-135M-Instruct --prompt='Review: {sentence}\nSentiment:' \
#       --completion=' {label}' --block_size=256
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
out_dir = "out-smollm2"
data_dir = "data/sst2"
block_size = 256
batch_size = 1  # a row holds eight or nine reviews

freeze_embedding = True
method = "qgalore"
if_read(rank=64, proj_gap=50)
learning_rate = 0.0015
max_iters = 150
warmup_iters = 15
eval_interval = 150
eval_iters = 50
log_interval = 10
