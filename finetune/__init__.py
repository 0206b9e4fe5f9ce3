"""
Pretrained checkpoints: in, tuned, judged and out again. The core never imports this room.

    hf.py                 Hugging Face checkpoints out, and in: hf_load.py; push.py: to the hub
    gguf_model.py         a model as a file for llama.cpp; gguf_tokenizer.py: its tokenizer
    hf_config.py          what their config.json says; hf_files.py: their safetensors files
    fields.py, paths.py   the fields of a stranger's JSON; where checkpoints lie
    tokenizer.py          the tokenizer of a checkpoint; chat.py: its chat template
    hf_tokenizer.py       the tokenizer of an export
    prepare_sft.py        prompts and answers, or conversations.py, as shards that train.py reads
    evaluate.py           validation loss, and tasks with known answers, of questions.py
    adapters.py           LoRA, and LowRank, which takes a matrix's place
    welore.py             WeLore: a checkpoint whose low-rank matrices become two factors

Begin with hf.py: load() makes a model of a checkpoint, save() a checkpoint of a model.
"""
