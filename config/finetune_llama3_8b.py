# LLaMA-3-8B learns MMLU's questions in INT8 on one card of 12 GB: see it first with --dry_run=True.
# Its shards, from the benchmark's own training files (question,A,B,C,D,answer, no header):
#   python -m finetune.prepare_sft --input='mmlu/auxiliary_train/*.csv' \
#       --columns=question,A,B,C,D,answer --out_dir=data/mmlu-llama3 \
#       --encoding=meta-llama/Meta-Llama-3-8B --completion=' {answer}' \
#       --prompt='{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:'
# and afterwards:
#   python -m finetune.evaluate --model=out-llama3-8b --task=mmlu --data=mmlu --shots=5
# Rank and rate are not tuned at this size. The rate follows from SmolLM2-135M, whose best on SST-2 is
# 0.0015 (docs/results.md). LoRA's best is 0.001 there, and 0.0002 by custom at 8B: a fifth.
init_from = "meta-llama/Meta-Llama-3-8B"
out_dir = "out-llama3-8b"
data_dir = "data/mmlu-llama3"
device = "cuda"
block_size = 512
batch_size = 4
gradient_accumulation_steps = 4
checkpoint_activations = True
checkpoint_bits = 8
compile = True

freeze_embedding = True
embed_bits = 8
method = "qgalore"
if_read(rank=64, proj_gap=100)
learning_rate = 0.0003
max_iters = 2000
warmup_iters = 100
eval_interval = 200
