"""
The published optimizers that ours are measured against, each put on the model as its authors do.

prepare_peer(name) gives attach(settings, model, phases). That hooks the optimizer into the model,
so that backward steps it, and returns a function that lists the bases. What a package needs to run
at all with bitsandbytes 0.50 is mended where it is used, and said there.
"""

import importlib
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn

from bench.settings import PEERS

# of all contenders: low enough that none diverges on random tokens; time does not depend on it
RATE = 1e-4


def prepare_peer(name, kind, svd):
    """Import a peer. svd False: unit vectors, which take no time, replace its exact SVD."""
    importlib.import_module(PEERS[name])
    if kind == "cpu":
        torch.cuda.synchronize = _nothing  # their optimizers call it after each weight
    if not svd:
        torch.linalg.svd = unit_svd
    attach = {"galore": galore, "q_galore": q_galore, "apollo": apollo, "torchao": torchao}
    return attach[name]


def _nothing(*args):
    """On the CPU there is no device to wait for."""


def unit_svd(a, full_matrices=False):
    """(U, S, V^T) of a (m, n), all of unit vectors."""
    m, n = a.shape
    k = min(m, n)
    u = torch.eye(m, k, device=a.device)
    s = torch.ones(k, device=a.device)
    vh = torch.eye(k, n, device=a.device)
    return u, s, vh


def galore(c, model, phases):
    """Layer-wise, as in galore-torch's README.

    Its 8-bit Adam steps the blocks' matrices, bitsandbytes' the rest."""
    from galore_torch import GaLoreAdamW8bit
    from galore_torch.galore_projector import GaLoreProjector

    group = {
        "rank": c.rank,
        "update_proj_gap": c.proj_gap,
        "scale": c.galore_scale,
        "proj_type": "std",
    }
    return step_in_backward(model, phases, GaLoreAdamW8bit, group, GaLoreProjector)


def q_galore(c, model, phases):
    """As its repository's q_galore_adamw8bit_per_layer, but that all parameters train.

    There the hooks on parameters which are not INT8 are never called."""
    import q_galore_torch.q_galore_adamw8bit as published
    from q_galore_torch.q_galore_projector import GaLoreProjector

    def current(update, place):
        """`update` of today, called as before bitsandbytes 0.44, which put two arguments, beta3
        and alpha, at `place`."""
        return lambda *args, **kwargs: update(*args[:place], 0.0, 0.0, *args[place:], **kwargs)

    bnb = published.F
    published.F = SimpleNamespace(
        optimizer_update_32bit=current(bnb.optimizer_update_32bit, 10),
        optimizer_update_8bit_blockwise=current(bnb.optimizer_update_8bit_blockwise, 7),
    )
    PublishedInt8.convert(model, published.AdamW8bit)
    group = {
        "rank": c.rank,
        "update_proj_gap": c.proj_gap,
        "scale": c.galore_scale,
        "proj_type": "std",
        "quant": True,  # of the projection
        "quant_n_bit": 4,
        "quant_group_size": 256,
        # the gap doubles where 5 refreshes' mean similarity exceeds 0.4
        "cos_threshold": 0.4,
        "gamma_proj": 2,
        "queue_size": 5,
    }
    return step_in_backward(model, phases, published.AdamW8bit, group, GaLoreProjector)


def apollo(c, model, phases):
    """Q-APOLLO-Mini: rank 1, random projections, INT8 weights, float32 moments."""
    from apollo_torch import QAPOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    PublishedInt8.convert(model, QAPOLLOAdamW)
    group = {
        "rank": 1,
        "proj": "random",  # directions, not singular vectors
        "scale_type": "tensor",  # one factor a matrix, not one a column
        "scale": 128,
        "update_proj_gap": c.proj_gap,
        "proj_type": "std",
    }
    return step_in_backward(model, phases, QAPOLLOAdamW, group, GradientProjector)


def torchao(c, model, phases):
    """INT8 quantised training, a scale a row, with torchao's compiled 8-bit AdamW."""
    from torchao.optim import AdamW8bit
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    # in place, and the blocks' matrices alone: embedding and head stay in the model's float type
    quantize_(model.blocks, int8_weight_only_quantized_training())
    return step_in_backward(model, phases, AdamW8bit)


def step_in_backward(model, phases, low_rank, group=None, projector=None):
    """Give each parameter an optimizer that steps as soon as its gradient is whole.

    low_rank, an optimizer with the settings `group`, steps the blocks' matrices, and bitsandbytes'
    Adam8bit the others; without a group low_rank steps all. projector: the package's class that
    holds a basis. Returns a function that lists the bases which there are."""
    from bitsandbytes.optim import Adam8bit

    restore_bitsandbytes_config()
    if projector:
        phases.wrap(projector, "project", "projection")
        phases.wrap(projector, "get_orthogonal_matrix", "refresh", takes_basis=True)

    def step(optimizer, p):
        with phases("update"):
            optimizer.step()
            optimizer.zero_grad()

    optimizers = []  # one a parameter
    for name, p in model.named_parameters():
        if group and p.ndim > 1 and name.startswith("blocks."):
            optimizer = low_rank([{"params": [p], **group}], lr=RATE, weight_decay=0.0)
        elif group:
            optimizer = Adam8bit([p], lr=RATE, weight_decay=0.0)
        else:
            optimizer = low_rank([p], lr=RATE, weight_decay=0.0)
        optimizers.append(optimizer)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(partial(step, optimizer))  # torch calls it
        else:
            p.backward_hook = partial(step, optimizer)  # PublishedInt8 calls it

    def bases():
        found = []
        for optimizer in optimizers:
            for state in optimizer.state.values():
                if "projector" in state:
                    found.append(state["projector"])
        return found

    return bases


def restore_bitsandbytes_config():
    """Let 8-bit optimizers find the settings that bitsandbytes 0.50 took out of its constructor.

    Two arguments went out of its middle, and these peers give them by place: max_unorm becomes
    100, with which APOLLO's weights never move; and percentile_clipping is missed where it is read.
    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    get_config = Optimizer8bit.get_config
    expected = {
        "max_unorm": 0.0,
        "skip_zeros": False,
        "percentile_clipping": 100,
        "block_wise": True,
    }
    Optimizer8bit.get_config = lambda *args: get_config(*args) | expected


class PublishedInt8(nn.Module):
    """The linear layer that q_galore's and apollo's optimizers step.

    Their repositories have one, their packages do not. This is written to what the optimizers read:
    a uint8 weight with a scale and a zero each 256, and float_grad, the full gradient, formed in
    backward and stepped at once."""

    def __init__(self, linear, optimizer):
        super().__init__()
        q, scales, zeros = optimizer._quantize(None, linear.weight.detach(), q_group_size=256)
        self.weight = nn.Parameter(q, requires_grad=False)
        self.optimizer = optimizer
        # the optimizers look for these on the weight
        self.weight.scales = scales
        self.weight.zeros = zeros
        self.weight.group_size = 256
        self.weight.stochastic_round = True

    def float_weight(self, dtype):
        w = self.weight
        return self.optimizer._dequantize(None, w.data, dtype, w.group_size, w.scales, w.zeros)

    def forward(self, x):
        return _PublishedInt8Function.apply(x, self)

    @classmethod
    def convert(cls, model, optimizer):
        """Put such a layer in the place of each nn.Linear of the model's blocks."""
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
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        dx = dy @ layer.float_weight(dy.dtype)  # before the step, which moves the weight
        layer.weight.float_grad = dy.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
        layer.weight.backward_hook(layer.weight)
        return dx, None
