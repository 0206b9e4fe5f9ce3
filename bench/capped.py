"""
Run train.py in as much GPU memory as a smaller card has.
    python -m bench.capped config/llama_7b.py --gradient_accumulation_steps=1 --cap_gib=12

It learns from Python's help, byte by byte, which every machine has. The last line that it prints is
a JSON object of what was taken, in GiB: allocated and reserved by torch, and used on the card, which
is what nvidia-smi shows. On a CPU there is no cap.
"""

import json
import os
import runpy
import sys
import tempfile
from pydoc_data.topics import topics

from bench.settings import REPOSITORY, train_settings
from configurator import at_least, configure

cap_gib: at_least(0) = 0.0  # GPU memory that torch may take; 0: all

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import torch

from run.device import GIB, memory_peak


def main(cap_gib):
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and cap_gib:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total))
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "topics.txt")
        with open(text, "w") as f:
            f.write("\n\n".join(topics.values()))
        sys.argv += [f"--data_input={text}", f"--data_dir={folder}/data", "--encoding=bytes"]
        runpy.run_path(os.path.join(REPOSITORY, "train.py"), run_name="__main__")
    found = {"allocated_gib": memory_peak(kind)}
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["card_gib"] = (total - free) / GIB
    print(json.dumps(found))


if __name__ == "__main__":
    sys.argv = [arg for arg in sys.argv if not arg.startswith("--cap_gib")]  # the rest is train.py's
    main(s.cap_gib)
