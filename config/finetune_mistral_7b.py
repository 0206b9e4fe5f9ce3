# Mistral-7B by the same recipe as LLaMA-3-8B, on MMLU with its own tokenizer:
#   python -m finetune.prepare_sft --input='mmlu/auxiliary_train/*.csv' \
#       --columns=question,A,B,C,D,answer --out_dir=data/mmlu-mistral \
#       --encoding=mistralai/Mistral-7B-v0.1 --completion=' {answer}' \
#       --prompt='{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:'
include("finetune_llama3_8b.py")
init_from = "mistralai/Mistral-7B-v0.1"
out_dir = "out-mistral-7b"
data_dir = "data/mmlu-mistral"
