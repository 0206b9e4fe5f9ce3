"""
Pretrained checkpoints: in, tuned, judged and out again. The core never imports this room.

    hf.py            a run's model out: to transformers, to llama.cpp, to the hub; load() takes one in
    prepare_sft.py   prompts and answers, or chats, as shards that train.py reads
    prepare_dpo.py   chosen and rejected answers; dpo.py: the loss of preferences
    evaluate.py      perplexity, and tasks with known answers
    adapters.py      LoRA, and LowRank, which takes a matrix's place
    welore.py        WeLore: a checkpoint whose low-rank matrices become two factors

    evaluation/      what it asks, what a model says to it, and what that amounts to
    checkpoints/     formats: config.json, safetensors, tokenizers, chat templates, GGUF
    data/            records of files and of the hub, made into examples, and these into rows
"""
