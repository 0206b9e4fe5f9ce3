# The demo by any method, at the rate of least loss in RESULTS.md (adam8bit: at AdamW's):
#   python train.py --method=fira config/demo_methods.py
exec(open("config/demo.py").read())
out_dir = "out-demo-" + method
learning_rate = {"adamw": 0.001, "adam8bit": 0.001, "lora": 0.004, "relora": 0.004, "apollo": 0.008,
                 "apollo_mini": 0.008, "muon": 0.004, "qmuon": 0.004}.get(method, 0.002)
proj_gap = 300 if method == "relora" else 50
