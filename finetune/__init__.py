"""
Pretrained checkpoints: in, tuned, judged and out again. The core never imports this room.

    hf.py                 Hugging Face checkpoints out, and in: hf_load.py; push.py: to the hub
    architectures.py      those that there are; hf_config.py: what a config.json says
    gguf_model.py         for llama.cpp; gguf_tokenizer.py; hf_files.py: safetensors files
    fields.py, paths.py   the fields of a stranger's JSON; where checkpoints lie
    tokenizer.py          of a checkpoint; chat.py: its template; hf_tokenizer.py: of an export
    prepare_sft.py        inputs.py (hub_data.py, parquet.py) made into examples.py, by templates.py
                          or conversations.py of messages.py; rows.py, preview.py; example_shards.py
    dpo.py                the loss of preferences, on pairs of prepare_dpo.py
    evaluate.py           validation loss, and tasks with known answers, of questions.py
    adapters.py           LoRA, and LowRank, which takes a matrix's place
    welore.py             WeLore: a checkpoint whose low-rank matrices become two factors

Begin with hf.py: load() makes a model of a checkpoint, save() a checkpoint of a model.
"""
