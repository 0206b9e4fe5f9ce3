"""
What keeps a run alive, from its data to its plots. train.py, the loop, is the place to begin.

    shards.py       the files of tokens, in llm.c's format      data.py    batches out of them
    manifest.py     of what those were made                     jobs.py    which are to be made
    records.py      what users' files hold; sources.py: bytes   pool.py    work among processes
    docs.py         text that any Python brings along           device.py  CPU or GPU, and floats
    encodings.py    text to tokens and back (text.py: lines)    ranks.py   several GPUs
    checkpoint.py   saving, and resuming bit for bit            stop.py    Ctrl-C, SIGTERM, minutes
    memory.py       what a run would take, before it takes it   log.py     log.jsonl, and the end
    foreign.py      the door to what Hugging Face made          history.py  what log.jsonl tells
    plot.py         loss.png, subspaces.png
    talk.py         a conversation in the terminal              show.py    lines, texts, progress
"""
