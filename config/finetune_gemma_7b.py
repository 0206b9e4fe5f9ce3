# Gemma-7B by the same recipe as LLaMA-3-8B, on MMLU with its own tokenizer:
#   python prepare_sft.py --input='mmlu/auxiliary_train/*.csv' --columns=question,A,B,C,D,answer --out_dir=data/mmlu-gemma \
#       --encoding=google/gemma-7b --completion=' {answer}' \
#       --prompt='{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:'
exec(open("config/finetune_llama3_8b.py").read())
init_from = "google/gemma-7b"
out_dir = "out-gemma-7b"
data_dir = "data/mmlu-gemma"
batch_size = 1  # its vocabulary of 256,000 makes large logits
gradient_accumulation_steps = 16
