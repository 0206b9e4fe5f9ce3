"""
Whether a model's weights are numbers: a checkpoint or an export of NaN is worth nothing.
"""

import math

import torch


@torch.no_grad()
def first_not_finite(model):
    """The name of the first parameter or buffer of a model that holds an inf or a NaN, or None.

    One pass over what is float, scales of INT8 weights included; a tensor's lowest and highest
    value tell, so that nothing is copied. Waits for the device once."""
    names = []
    ends = []  # (2,) float32 each: the lowest and the highest value
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and t.numel() > 0:
            names.append(name)
            ends.append(torch.stack(t.aminmax()).float())  # NaN, if one is in it
    if not ends:
        return None
    good = torch.stack(ends).isfinite().all(dim=1).tolist()
    return next((name for name, finite in zip(names, good) if not finite), None)


def check_finite(run, loss=0.0):
    """Exit with one line if a validation loss, or a weight, is not finite.

    A checkpoint holds finite weights alone: the last one is good."""
    name = first_not_finite(run.model)
    if name is None and math.isfinite(loss):
        return
    what = f"weight {name}" if name else "the validation loss"
    raise SystemExit(
        f"error: step {run.it}: {what} is not finite: training stopped; {run.saved}; a lower "
        "learning_rate, a longer warmup_iters or grad_clip may help"
    )
