"""
Pretrained checkpoints: in, tuned, judged and out again. The core never imports this room.

    hf.py                 Hugging Face checkpoints out, and in: hf_load.py
    hf_config.py          what their config.json says; hf_files.py: their safetensors files
    tokenizer.py          the tokenizer of a checkpoint, with its chat template
    prepare_sft.py        prompts and answers, or conversations.py, as shards that train.py reads
    evaluate.py           validation loss, and tasks with known answers, of questions.py
    adapters.py           LoRA, and LowRank, which takes a matrix's place
    welore.py             WeLore: a checkpoint whose low-rank matrices become two factors

Begin with hf.py: load() makes a model of a checkpoint, save() a checkpoint of a model.
"""
