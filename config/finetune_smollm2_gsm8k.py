# SmolLM2-135M learns to write out the steps of GSM8K's problems. First its shards:
#   python -m finetune.prepare_sft --input=gsm8k_train.jsonl --out_dir=data/gsm8k \
#       --encoding=HuggingFaceTB/SmolLM2-135M-Instruct --prompt='Question: {question}\nAnswer:' \
#       --completion=' {answer}' --block_size=512
include("finetune_smollm2.py")
out_dir = "out-smollm2-gsm8k"
data_dir = "data/gsm8k"
block_size = 512  # a row holds two or three problems
if_read(proj_gap=20)
max_iters = 50
warmup_iters = 5
eval_interval = 50
eval_iters = 25
