"""
From what a user names to rows of tokens.

    inputs.py            files, and data sets of the hub, with weights: hub_data.py, parquet.py
    examples.py          a record made into an example: by templates.py, or
    conversations.py     by the checkpoint's chat template, of messages.py
    preview.py           examples shown, with what counts in the loss marked
    rows.py              examples laid into rows
    example_shards.py    all of it, as prepare_sft.py and prepare_dpo.py do it
"""
