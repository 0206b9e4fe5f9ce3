# LLaMA 60M by GaLore's protocol, whose perplexities papers print beside each other: T5's tokens,
# one document a row (run/protocol.py). By any method:
#   python prepare_c4.py --protocol=galore --shards=15 --out_dir=data/c4_galore
#   python train.py config/c4_60m.py --method=galore
# The model, the batch, the steps and the rates are those of llama_60m_methods.py.
include("llama_60m_methods.py")
out_dir = "out-c4-60m-" + method
data_dir = "data/c4_galore"
encoding = "google-t5/t5-base"
vocab_size = 32000
block_size = 255  # rows of 256 tokens: the last one is a target alone
eval_interval = 1000
eval_iters = 100_000  # more than there are: all of the validation, 10 million tokens
