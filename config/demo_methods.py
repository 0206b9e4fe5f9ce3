# The demo by any method, at its rate of least loss in docs/results.md (adam8bit: at AdamW's):
#   python train.py config/demo_methods.py --method=fira
include("demo.py")
out_dir = "out-demo-" + method
_rates = {
    "adamw": 0.001,
    "adam8bit": 0.001,
    "lora": 0.004,
    "relora": 0.004,
    "apollo": 0.008,
    "apollo_mini": 0.008,
    "qgalore": 0.008,
    "qalice": 0.008,
    "muon": 0.032,
    "qmuon": 0.032,
}
learning_rate = _rates.get(method, 0.002)
if method in ("muon", "qmuon"):
    galore_scale = 0.125
if method in ("qgalore", "qalice"):
    galore_scale = 0.25
if method == "relora":
    proj_gap = 300
