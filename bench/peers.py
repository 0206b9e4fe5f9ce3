"""
The published optimizers that bench.py measures ours against, each put on the model as its authors do.

prepare_peer(name) gives attach(settings, model, phases), which hooks the optimizer into the model, so that backward
steps it, and returns a function that lists the bases. What a package needs to run at all with bitsandbytes 0.50 is
mended where it is used, and said there.
"""

import importlib
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn

PEERS = {"galore": "galore_torch", "q_galore": "q_galore_torch", "apollo": "apollo_torch", "torchao": "torchao.optim"}
RATE = 1e-4  # of all: low enough that none diverges on random tokens; a step's time does not depend on it


def prepare_peer(name, kind, svd):
    """Import a peer. svd False: its exact SVD is replaced by unit vectors, which take no time."""
    importlib.import_module(PEERS[name])
    if kind == "cpu":
        torch.cuda.synchronize = lambda *args: None  # their optimizers call it after each weight
    if not svd:
        torch.linalg.svd = unit_svd
    return {"galore": galore, "q_galore": q_galore, "apollo": apollo, "torchao": torchao}[name]


def unit_svd(a, full_matrices=False):
    (m, n), k = a.shape, min(a.shape)
    return torch.eye(m, k, device=a.device), torch.ones(k, device=a.device), torch.eye(k, n, device=a.device)


def galore(c, model, phases):
    """Layer-wise, as in galore-torch's README: its 8-bit Adam on the blocks' matrices, bitsandbytes' on the rest."""
    from galore_torch import GaLoreAdamW8bit
    from galore_torch.galore_projector import GaLoreProjector

    group = {"rank": c.rank, "update_proj_gap": c.proj_gap, "scale": c.galore_scale, "proj_type": "std"}
    return step_in_backward(model, phases, GaLoreAdamW8bit, group, GaLoreProjector)


def q_galore(c, model, phases):
    """As its repository's q_galore_adamw8bit_per_layer, but that the parameters which are not INT8 train, too: there
    the hooks on them are never called."""
    import q_galore_torch.q_galore_adamw8bit as published
    from q_galore_torch.q_galore_projector import GaLoreProjector

    def current(update, place):  # bitsandbytes 0.44 put two arguments, beta3 and alpha, at `place`
        return lambda *args, **kwargs: update(*args[:place], 0.0, 0.0, *args[place:], **kwargs)

    bnb = published.F
    published.F = SimpleNamespace(optimizer_update_32bit=current(bnb.optimizer_update_32bit, 10),
                                  optimizer_update_8bit_blockwise=current(bnb.optimizer_update_8bit_blockwise, 7))
    PublishedInt8.convert(model, published.AdamW8bit)
    group = {"rank": c.rank, "update_proj_gap": c.proj_gap, "scale": c.galore_scale, "proj_type": "std", "quant": True,
             "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    return step_in_backward(model, phases, published.AdamW8bit, group, GaLoreProjector)


def apollo(c, model, phases):
    """Q-APOLLO-Mini: rank 1, random projections, INT8 weights, float32 moments."""
    from apollo_torch import QAPOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    PublishedInt8.convert(model, QAPOLLOAdamW)
    group = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": c.proj_gap,
             "proj_type": "std"}
    return step_in_backward(model, phases, QAPOLLOAdamW, group, GradientProjector)


def torchao(c, model, phases):
    """INT8 quantised training, a scale a row, with torchao's compiled 8-bit AdamW."""
    from torchao.optim import AdamW8bit
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(model.blocks, int8_weight_only_quantized_training())
    return step_in_backward(model, phases, AdamW8bit)


def step_in_backward(model, phases, low_rank, group=None, projector=None):
    """Give each parameter an optimizer that steps as soon as its gradient is whole: low_rank with `group` to the
    blocks' matrices, bitsandbytes' Adam8bit to the others; without a group, low_rank to all."""
    from bitsandbytes.optim import Adam8bit
    from bitsandbytes.optim.optimizer import Optimizer8bit

    # bitsandbytes 0.50 has taken two arguments out of the middle of its constructor. These peers give them by place:
    # max_unorm becomes 100, with which APOLLO's weights never move; and percentile_clipping is missed where it is read.
    get_config = Optimizer8bit.get_config
    expected = {"max_unorm": 0.0, "skip_zeros": False, "percentile_clipping": 100, "block_wise": True}
    Optimizer8bit.get_config = lambda *args: get_config(*args) | expected
    if projector:
        phases.wrap(projector, "project", "projection")
        phases.wrap(projector, "get_orthogonal_matrix", "refresh")
    optimizers = []

    def step(optimizer, p):
        with phases("update"):
            optimizer.step()
            optimizer.zero_grad()

    for name, p in model.named_parameters():
        if group and p.ndim > 1 and name.startswith("blocks."):
            optimizer = low_rank([{"params": [p], **group}], lr=RATE, weight_decay=0.0)
        else:
            optimizer = (Adam8bit if group else low_rank)([p], lr=RATE, weight_decay=0.0)
        optimizers.append(optimizer)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(partial(step, optimizer))
        else:
            p.backward_hook = partial(step, optimizer)
    states = [optimizer.state for optimizer in optimizers]
    return lambda: [s["projector"] for state in states for s in state.values() if "projector" in s]


class PublishedInt8(nn.Module):
    """The linear layer that q_galore's and apollo's optimizers step. Their repositories have one, their packages do
    not; this is written to what the optimizers read: a uint8 weight with a scale and a zero each 256, and float_grad,
    the full gradient, formed in backward and stepped at once."""

    def __init__(self, linear, optimizer):
        super().__init__()
        q, scales, zeros = optimizer._quantize(None, linear.weight.detach(), q_group_size=256)
        self.weight, self.optimizer = nn.Parameter(q, requires_grad=False), optimizer
        vars(self.weight).update(scales=scales, zeros=zeros, group_size=256, stochastic_round=True)

    def float_weight(self, dtype):
        w = self.weight
        return self.optimizer._dequantize(None, w.data, dtype, w.group_size, w.scales, w.zeros)

    def forward(self, x):
        return _PublishedInt8Function.apply(x, self)

    @classmethod
    def convert(cls, model, optimizer):
        for module in list(model.blocks.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, cls(child, optimizer))


class _PublishedInt8Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.float_weight(x.dtype).T

    @staticmethod
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = dy @ layer.float_weight(dy.dtype)
        layer.weight.float_grad = dy.flatten(0, -2).T @ x.flatten(0, -2)
        layer.weight.backward_hook(layer.weight)
        return dx, None
