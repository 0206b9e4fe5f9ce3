# The yardstick: the 60M recipe at full rank, float32 weights and torch's AdamW. The rate is ours to tune, not the paper's.
exec(open("config/llama_60m.py").read())
out_dir = "out-60m-adamw"
method = "adamw"
learning_rate = 0.001
