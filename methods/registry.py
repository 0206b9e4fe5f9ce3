"""
The methods that train.py compares, each a few settings of one loop: what it trains, in which format, by which
optimizer; and the model that a run starts from.
"""

from dataclasses import fields

import torch

from finetune import hf
from methods.family import RULES
from model import LLaMA, LLaMAConfig, QLinear
from qgalore import QGaLore
from quant import random_key

FLOAT = {"proj_bits": 16, "proj_threshold": 2.0, "moments": "float32"}  # a fixed gap: a threshold of 2 is never met
METHODS = {  # the weight_bits that each takes, its own first; and the settings that make it what it is
    "qgalore": ((8, 16), {}),
    "galore": ((16, 8), FLOAT),  # arXiv 2403.03507, with Adam's moments in float32
    "galore8bit": ((16, 8), FLOAT | {"moments": "8bit"}),
    "natural_galore": ((16, 8), FLOAT),  # these seven: see family.py
    "fira": ((16, 8), FLOAT),
    "qfira": ((8, 16), {}),  # Q-GaLore, and Fira's residual
    "muon": ((16, 8), FLOAT),  # Muon of low-rank momentum
    "qmuon": ((8, 16), {}),
    "apollo": ((16, 8), FLOAT | {"galore_scale": 1.0}),
    "apollo_mini": ((16, 8), FLOAT | {"galore_scale": 128**0.5, "rank": 1}),
    "loqt": ((4, 8), {"proj_threshold": 2.0, "gap_growth": 1.2, "moments": "8bit"}),
    "adamw": ((32, 16), {}),  # torch's, at full rank; 32: under autocast, if dtype is bfloat16
    "adam8bit": ((16,), {"moments": "8bit"}),  # bitsandbytes', at full rank, stepped in backward
    "lora": ((16, 8, 4), {}),  # adapters on frozen matrices (arXiv 2106.09685), torch's AdamW; from scratch, what is
    "qlora": ((4,), {}),  # no matrix of a block trains, too. The same on NF4 (arXiv 2305.14314)
    "relora": ((16, 8), {}),  # adapters that are merged and start anew every proj_gap steps (arXiv 2307.05695)
    "welore": ((16, 8), {}),  # factors that welore.py has put in a checkpoint's matrices, and norms (arXiv 2407.11239)
}
BY_TORCH = ("adamw", "lora", "qlora", "relora", "welore")
PRUNED = 0.99  # of an adapter's moments, at a restart
OF_RUN = ("block_size", "checkpoint_activations", "checkpoint_bits")  # LLaMAConfig's fields that no checkpoint brings


def of_method(c):
    """What the method of settings c makes of them. Exits with one line if they do not fit it."""
    if c["method"] not in METHODS:
        raise SystemExit(f"error: method {c['method']!r}: there are {', '.join(METHODS)}")
    bits, own = METHODS[c["method"]]
    if c["weight_bits"] and c["weight_bits"] not in bits:
        raise SystemExit(f"error: weight_bits={c['weight_bits']}: {c['method']} has {' or '.join(map(str, bits))}")
    if c.get("embed_bits", 16) == 8 and not c["freeze_embedding"] and "lora" not in c["method"]:
        raise SystemExit("error: embed_bits=8: an INT8 embedding is not trained; set freeze_embedding=True")
    if c["method"] == "loqt" and c["proj_side"] != "auto":
        raise SystemExit("error: proj_side: loqt's factors lie on the smaller side of a weight")
    return own | {"weight_bits": c["weight_bits"] or bits[0]}


def of_model(c, checkpoint=None):
    """What the model that a run of settings c starts from, by init_from, makes of them: the fields of LLaMAConfig;
    `pretrained`, the Hugging Face checkpoint that it comes from, or ""; `load`, the directory to fill it from, or "".
    checkpoint: the run's own, where it is resumed."""
    before = checkpoint["config"] if checkpoint else {}
    found = {"pretrained": before.get("pretrained", ""), "load": ""}
    if c["init_from"] not in ("scratch", "resume"):
        try:
            found |= {"pretrained": c["init_from"], "load": hf.local(c["init_from"], not c["dry_run"])}
            before = hf.settings(found["load"])
        except ValueError as e:
            raise SystemExit(f"error: init_from: {e}")
        if c["block_size"] > (most := before["block_size"]):
            raise SystemExit(f"error: block_size {c['block_size']}: {c['init_from']} sees {most} tokens")
    if found["pretrained"]:
        found |= {f.name: before[f.name] for f in fields(LLaMAConfig) if f.name in before and f.name not in OF_RUN}
    if c["method"] == "welore" and not found.get("low_rank"):
        raise SystemExit("error: method welore trains what welore.py has compressed: name its directory in init_from")
    return found


def build(c, device, dtype, ranks=None):
    """The model and the optimizer of settings c; its weights are those of the checkpoint c["load"], if there is one."""
    c = c | of_method(c)
    load = (lambda model: hf.load_weights(model, c["load"], device, dtype)) if c.get("load") else None
    model, betas = LLaMA.from_settings(c, device, dtype, load), (c["beta1"], c["beta2"])
    if c["method"] not in BY_TORCH:
        return model, QGaLore(model, c["learning_rate"], betas, c["adam_eps"], c["weight_decay"], c["rank"],
                              c["proj_gap"], c["galore_scale"], c["proj_threshold"], c["proj_k"], c["proj_bits"],
                              c["moments"], c["moments_at_refresh"], c["stochastic_rounding"], c["proj_svd"],
                              c["accumulation"], c["grad_clip"], c["seed"], ranks,
                              c["method"] if c["method"] in RULES else "galore", c["proj_side"], c["gap_growth"],
                              c["residual_blocks"])
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": c["weight_decay"]}
    vectors = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}
    return model, torch.optim.AdamW([matrices, vectors], c["learning_rate"], betas, c["adam_eps"], fused=True)


@torch.no_grad()
def restart(model, optimizer, *key):
    """ReLoRA: merge the adapters into their weights, start them anew, and leave the largest of their moments alone."""
    adapters = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    for name, layer in adapters.items():
        seed, adapter = random_key(*key, name), layer.adapter
        layer.add_low_rank_(adapter.scale * adapter.b, adapter.a.T.contiguous(), key=seed)
        adapter.start(torch.Generator(adapter.a.device).manual_seed(seed))
        for p in (adapter.a, adapter.b):
            m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
            small = v <= v.flatten().kthvalue(max(1, int(PRUNED * v.numel()))).values
            m.masked_fill_(small, 0), v.masked_fill_(small, 0)  # both at one place: m over no v would be no step
