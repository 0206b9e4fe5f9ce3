# The 60M recipe by any method: python train.py --method=fira config/llama_60m_methods.py
# The rates of GaLore, LoQT and APOLLO are their papers'; those of the others are a start, and yours to tune.
exec(open("config/llama_60m.py").read())
out_dir = "out-60m-" + method
learning_rate = {"adamw": 0.001, "adam8bit": 0.001, "lora": 0.002, "relora": 0.002}.get(
    method, 0.015 if method.startswith("q") else 0.01)
proj_gap = {"loqt": 100, "relora": 1000}.get(method, 200)
galore_scale = 0.5 if method == "loqt" else 0.25
