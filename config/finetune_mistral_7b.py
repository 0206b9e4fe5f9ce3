# Mistral-7B by the same recipe as LLaMA-3-8B, on MMLU with its own tokenizer:
#   python prepare_sft.py --input='mmlu/auxiliary_train/*.csv' --columns=question,A,B,C,D,answer --out_dir=data/mmlu-mistral \
#       --encoding=mistralai/Mistral-7B-v0.1 --completion=' {answer}' \
#       --prompt='{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:'
exec(open("config/finetune_llama3_8b.py").read())
init_from = "mistralai/Mistral-7B-v0.1"
out_dir = "out-mistral-7b"
data_dir = "data/mmlu-mistral"
