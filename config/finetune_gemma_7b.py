# Gemma-7B by the same recipe as LLaMA-3-8B, on MMLU with its own tokenizer:
#   python -m finetune.prepare_sft --input='mmlu/auxiliary_train/*.csv' \
#       --columns=question,A,B,C,D,answer --out_dir=data/mmlu-gemma \
#       --encoding=google/gemma-7b --completion=' {answer}' \
#       --prompt='{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:'
include("finetune_llama3_8b.py")
init_from = "google/gemma-7b"
out_dir = "out-gemma-7b"
data_dir = "data/mmlu-gemma"
batch_size = 1  # its vocabulary of 256,000 makes large logits
gradient_accumulation_steps = 16
