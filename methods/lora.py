"""
LoRA (arXiv 2106.09685), QLoRA (2305.14314) and ReLoRA (2307.05695): adapters on frozen matrices.

From scratch all that is no matrix of a block trains, too; from a checkpoint the adapters alone.
"""

import torch

from finetune.adapters import LoRA
from methods.registry import Method
from model import QLinear
from quant import random_key

PRUNED = 0.99  # of an adapter's moments, at a restart of ReLoRA


class Adapters(Method):
    fragments = 1.75

    def trains_embedding(self, s):
        return not s.freeze_embedding and not s.pretrained

    def adapt(self, model, s, device, dtype):
        if s.pretrained:
            model.requires_grad_(False)
        put_adapters(model, s, device)


def put_adapters(model, s, device):
    for layer in model.modules():
        if isinstance(layer, QLinear):
            shape = layer.out_features, layer.in_features
            layer.adapter = LoRA(*shape, s.rank, s.lora_alpha, device)


class ReLoRA(Method):
    """Adapters that every proj_gap steps are merged and start anew, with a warm-up each."""

    fragments = 1.75

    def adapt(self, model, s, device, dtype):
        put_adapters(model, s, device)

    def rate(self, s, it):
        # a tenth of the gap is the warm-up after each restart
        return min(1.0, (it % s.proj_gap + 1) / (s.proj_gap // 10 + 1))

    def before_step(self, model, optimizer, s, it):
        if it and it % s.proj_gap == 0:
            restart(model, optimizer, s.seed, it)


@torch.no_grad()
def restart(model, optimizer, *key):
    """Merge the adapters into their weights, start them anew, keep the largest moments alone."""
    for name, layer in model.named_modules():
        if not isinstance(layer, QLinear):
            continue
        seed = random_key(*key, name)  # of rounding, and of the new start
        adapter = layer.adapter
        layer.add_low_rank_(adapter.scale * adapter.b, adapter.a.T.contiguous(), key=seed)
        adapter.start(torch.Generator(adapter.a.device).manual_seed(seed))
        for p in (adapter.a, adapter.b):
            m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
            # second moments below their 99th percentile go
            smallest = max(1, int(PRUNED * v.numel()))
            small = v <= v.flatten().kthvalue(smallest).values
            m.masked_fill_(small, 0)  # both at one place: m over no v would be no step
            v.masked_fill_(small, 0)


READS = ("rank", "lora_alpha", "matmul")
Adapters("lora", "adapters on frozen matrices", weight_bits=(16, 8, 4), reads=READS)
Adapters("qlora", "the same on NF4 matrices", weight_bits=(4,), reads=READS[:2])
ReLoRA("relora", "adapters that are merged and start anew every proj_gap steps",
       weight_bits=(16, 8), reads=READS + ("proj_gap",))
