"""
Checkpoints as others write them, and as others read them.

    architectures.py    those that there are
    hf_config.py        what a config.json says; hf_rope.py: what it says of RoPE
    hf_load.py          a checkpoint into INT8, tensor by tensor; hf_files.py: safetensors files
    tokenizer.py        of a checkpoint; vocabularies.py: its formats; chat.py: its chat template
    hf_tokenizer.py     the one of an export
    gguf_model.py       one file for llama.cpp; gguf_tokenizer.py: the tokenizer in it
    push.py             to the hub
    fields.py, paths.py  the fields of a stranger's JSON; where checkpoints lie
"""
