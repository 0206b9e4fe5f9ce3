"""
The kernels of one step, by the time that they take.
    python -m bench.profile config/llama_7b.py

Settings are train.py's. The last line that it prints is a JSON object: launches, their milliseconds,
those of a step without the profiler (more, where the device waits for the host), and the `kernels`
that take most, [name, launches, ms]. On a CPU they are torch's operations.
"""

import json
import sys
from statistics import median

from bench.settings import train_settings
from configurator import at_least, configure

kernels: at_least(1) = 25  # to list

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contenders import Phases, Training, build_ours
from kernels.launch import compile_fused
from run.device import check_device, pick_device, pick_dtype

STEPS_BEFORE = 3  # first bases, compiled kernels, and one step that is like all
STEPS_TIMED = 3


def main(s):
    kind = pick_device(s.device)
    check_device(kind)
    dtype = pick_dtype(s.dtype, kind)
    torch.manual_seed(s.seed)
    s.contender = s.method
    phases = Phases(kind)
    keeps_float32 = s.method == "adamw" or dtype == torch.float16
    weight_dtype = torch.float32 if keeps_float32 else dtype
    model, optimizer, _ = build_ours(s, kind, weight_dtype, phases)
    if s.compile:
        compile_fused(kind)
    autocast = torch.autocast(kind, dtype, enabled=weight_dtype != dtype)
    training = Training(s, kind, model, optimizer, phases, autocast)
    for _ in range(STEPS_BEFORE):
        training.step()
    phases.sync()
    step_ms = median(training.steps_ms(STEPS_TIMED))
    activities = [ProfilerActivity.CPU]
    if kind == "cuda":
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        training.step()
        phases.sync()

    rows = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
        if us > 0:
            rows.append((event.key, event.count, us / 1000))
    rows.sort(key=lambda row: -row[2])
    for name, count, ms in rows[: s.kernels]:
        print(f"{ms:10.2f} ms {count:6d} x {name[:80]}")
    print(json.dumps({
        "launches": sum(count for _, count, _ in rows),
        "ms": sum(ms for _, _, ms in rows),
        "step_ms": step_ms,
        "kernels": rows[: s.kernels],
    }))


if __name__ == "__main__":
    main(s)
