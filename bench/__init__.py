"""
How much memory and time training takes, by Q-GaLore and by others, on the same model and tokens.

    python -m bench config/llama_60m.py

__main__.py    settings, and the table and picture of all contenders; begin here
settings.py    what a command is checked by, before torch is loaded
contenders.py  measures one contender, in a process of its own
peers.py       the published optimizers, each put on the model as its authors do
memory.py      draws the memory plans of several methods (python -m bench.memory)
refresh.py     the range finder of a refresh against exact SVD (--refresh_study=True)
contest.py     train.py by several methods, rates and seeds, for a table of losses
tuned.py       so for fine-tuning, beside peft's own LoRA and QLoRA, which by_peft.py runs
report.py      all of it in a few minutes, for docs/measured (python -m bench.report)
capped.py      train.py in a smaller card's memory
profile.py     the kernels of a step
"""
