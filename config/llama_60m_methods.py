# The 60M recipe by any method: python train.py config/llama_60m_methods.py --method=fira
# Rates of GaLore, LoQT and APOLLO are their papers'; those of the others a start, yours to tune.
include("llama_60m.py")
out_dir = "out-60m-" + method
if method in ("adamw", "adam8bit"):
    learning_rate = 0.001
elif method in ("lora", "relora"):
    learning_rate = 0.002
elif not method.startswith("q"):
    learning_rate = 0.01
if method == "loqt":
    proj_gap = 100
    galore_scale = 0.5
if method == "relora":
    proj_gap = 1000
