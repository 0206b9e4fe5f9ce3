r"""
Turns examples into shards of rows that train.py fine-tunes on, with a loss on the answers alone.

    python -m finetune.prepare_sft --input=gsm8k.jsonl --out_dir=data/gsm8k --encoding=smollm2 \
        --prompt='Question: {question}\nAnswer:' --completion=' {answer}'
    python -m finetune.prepare_sft --input=sst2/train.tsv --out_dir=data/sst2 --encoding=smollm2 \
        --columns=sentence,label --labels=negative,positive \
        --prompt='Review: {sentence}\nSentiment:' --completion=' {label}'
    # chats, {"messages": [...]} a record: twice those of a file, half of a data set on the hub
    python -m finetune.prepare_sft --input='my.jsonl*2,hf:HuggingFaceTB/smol-smoltalk*0.5' \
        --out_dir=data/chats --encoding=smollm2

What --input may name is in finetune/data/inputs.py. A prompt and its completion become one example,
with an end-of-text token after it. A record with "messages", [{"role", "content"}], or ShareGPT's
"conversations", goes through the checkpoint's chat template, and all that the assistant says counts
in the loss.

What else a record has ("tools") goes to the template if it asks for it by name. What of a record is
in no example is said, and so is what makes none, with its reason. The first three examples are
shown, with what counts marked, and all are counted before anything is written.

Rows have block_size + 1 tokens and hold whole examples. A shard is prepare_c4.py's with the row
length in its header and, after the tokens, a byte of flags for each (run/shards.py has the
format). Bit 0: it counts in the loss. Bit 1: an example starts here.

A folder holds one data set. What an earlier command made of the same files is replaced; shards of
anything else are left alone, and nothing is added to them. But a training set (--val_fraction=0)
and a validation set (--val_fraction=1) of two files may share a folder.
"""

import sys

from configurator import at_least, between, configure

# input and output
input = ""  # .json(l), .tsv, .csv, also with .gz, .zst; .parquet; hf:owner/name; commas between
out_dir = "data/sft"  # NAME_train_00000.bin and NAME_val_00000.bin go here
encoding = "gpt2"  # of the model to tune: its checkpoint's folder, or a name like gpt2 or bytes
block_size: at_least(1) = 512  # train.py's: longer examples lose the end of their completion
dry_run = False  # show three examples and the numbers, and leave: nothing is written

# examples
columns = ""  # the fields of a .tsv or .csv, comma separated; '': its first line names them
prompt = ""  # a template over a record's fields, \n for a newline; '': {prompt}
completion = ""  # '': {completion}
labels = ""  # comma separated: the words for {label} 0, 1, ...

# rows
val_fraction: between(0, 1) = 0.05  # of the examples, for validation; 1: all of them, 0: none
packing = True  # several examples a row, where they fit; False: one a row, padded
seed: at_least(0) = 1337  # of the split, of the rows' order, and of what weights draw

if __name__ == "__main__":  # a tokenizer's libraries take a while: what is mistyped is said before
    s = configure(sys.modules[__name__])

from finetune.data import parquet
from finetune.data.example_shards import prepare
from finetune.data.examples import examples, not_in_example, shorten
from finetune.data.inputs import shown_name
from finetune.data.messages import KEYS, key_of
from finetune.data.templates import fields_in, templates

MAKER = "finetune.prepare_sft"
SETTINGS = "block_size columns prompt completion labels val_fraction packing seed".split()


def main(s):
    try:
        prepare_sft(s)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written")


def prepare_sft(s):
    """Make the two shards that the settings describe (see above)."""
    prompt, completion, words, chat = templates(s)

    def check(file):
        check_columns(file, prompt, completion, chat)

    def make(enc, record):
        made = examples(enc, record, prompt, completion, words, chat)
        return made, not_in_example(enc, record, prompt, completion, chat)

    prepare(s, MAKER, SETTINGS, check, make, shorten)


def check_columns(file, prompt, completion, chat):
    """Exit with one line if a file that tells its columns beforehand lacks one that is needed."""
    if not parquet.is_parquet(file.path):
        return
    there = parquet.columns(file.path)
    needed = fields_in(prompt) | fields_in(completion)
    missing = ", ".join(sorted(needed - {*there}))
    if missing and not (chat and key_of(dict.fromkeys(there)) is not None):
        or_chat = f"; nor has it {' or '.join(KEYS)}" if chat else ""
        raise SystemExit(
            f"error: {shown_name(file)}: has no column {missing}{or_chat}; it has "
            f"{', '.join(there)}: name those by --prompt and --completion"
        )


if __name__ == "__main__":
    main(s)
