"""
What keeps a run alive, from its data to its plots. train.py, the loop, is the place to begin.

    shards.py       the files of tokens, in llm.c's format      data.py    batches out of them
    docs.py         text that any Python brings along           device.py  CPU or GPU, and floats
    encodings.py    text to tokens and back, by name            ranks.py   several GPUs
    checkpoint.py   saving, and resuming bit for bit            plot.py    log.jsonl to loss.png
    memory.py       what a run would take, before it takes it
    foreign.py      the one door to finetune/, for what Hugging Face made
"""
