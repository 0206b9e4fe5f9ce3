# Qwen3-4B learns from chats in INT8, every matrix of it, on one card of 8 GB: 5.71 GiB by plan.
# First its shards, of chats.jsonl, which has {"messages": [...]} a line:
#   python -m finetune.prepare_sft --input=chats.jsonl --out_dir=data/chats-qwen3 \
#       --encoding=Qwen/Qwen3-4B-Instruct-2507 --block_size=2048
# and afterwards:
#   python sample.py --out_dir=out-qwen3-4b --chat=True
#   python -m finetune.hf --out_dir=out-qwen3-4b --export=qwen3-tuned.gguf
# Phi-4-mini by the same recipe, with its own shards: --init_from=microsoft/Phi-4-mini-instruct
include("finetune_llama3_8b.py")
init_from = "Qwen/Qwen3-4B-Instruct-2507"
out_dir = "out-qwen3-4b"
data_dir = "data/chats-qwen3"
block_size = 2048
batch_size = 1
