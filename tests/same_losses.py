"""
Do two versions of this repository train alike, bit for bit?
    python tests/same_losses.py OLD_CHECKOUT NEW_CHECKOUT                 # every case, some ten minutes
    python tests/same_losses.py OLD_CHECKOUT NEW_CHECKOUT qgalore ranks   # cases with one of these words

Each case is 40 steps of a small model by the checkout's own train.py, in a process of its own. Losses
of every step, validation losses and the final weights have to be equal. Results are kept in
/tmp/same_losses (or $SAME_LOSSES), one folder a commit or checkout: delete it to run a case again.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

FOLDER = os.environ.get("SAME_LOSSES", "/tmp/same_losses")
RUN = (
    "--n_layer=2 --n_embd=128 --n_head=4 --n_kv_head=2 --ffn_dim=352 --encoding=bytes --vocab_size=257"
    " --block_size=64 --batch_size=4 --max_iters=40 --warmup_iters=4 --eval_interval=20 --eval_iters=4"
    " --log_interval=1 --device=cpu --dtype=float32 --learning_rate=0.004"
)
SUBSPACE = "--rank=32 --proj_gap=6"
Q = f"{SUBSPACE} --galore_scale=1.0"  # methods that read all of Q-GaLore's settings
TUNED = "--init_from={model} --data_dir={examples} --encoding= --batch_size=1 --block_size=63"

# name: (what comes before train.py, the settings)
CASES = {
    "qgalore": f"--method=qgalore {Q}",
    "qgalore float weights": f"--method=qgalore {Q} --weight_bits=16",
    "qgalore 8bit svd": f"--method=qgalore {Q} --moments=8bit --proj_svd=True",
    "qgalore nearest, float32 moments": f"--method=qgalore {Q} --moments=float32 --stochastic_rounding=False",
    "qgalore 3 micro-batches": f"--method=qgalore {Q} --gradient_accumulation_steps=3",
    "qgalore 3 micro-batches, bfloat16": f"--method=qgalore {Q} --gradient_accumulation_steps=3"
    " --accumulation=bfloat16 --weight_decay=0.1",
    "qgalore clip": f"--method=qgalore {Q} --grad_clip=0.5",
    "qgalore clip, 3 micro-batches": f"--method=qgalore {Q} --grad_clip=0.5 --gradient_accumulation_steps=3",
    "qgalore checkpointed": f"--method=qgalore {Q} --checkpoint_activations=True --checkpoint_bits=8",
    "qgalore int8 products": f"--method=qgalore {Q} --matmul=int8 --weight_group_size=0",
    "qgalore 2 ranks": f"--method=qgalore {Q} --gradient_accumulation_steps=2",
    "qgalore 2 ranks, clip": f"--method=qgalore {Q} --gradient_accumulation_steps=4 --grad_clip=0.5",
    "qgalore bfloat16": f"--method=qgalore {Q} --dtype=bfloat16",
    "qgalore left, fixed gap": f"--method=qgalore {Q} --proj_side=left --proj_threshold=2.0 --proj_bits=8",
    "qmuon": f"--method=qmuon {Q}",
    "qmuon 3 micro-batches": f"--method=qmuon {Q} --gradient_accumulation_steps=3",
    "qmuon clip, 3 micro-batches": f"--method=qmuon {Q} --gradient_accumulation_steps=3 --grad_clip=0.5",
    "qmuon 2 ranks": f"--method=qmuon {Q} --gradient_accumulation_steps=4",
    "muon": f"--method=muon {Q}",
    "fira": f"--method=fira {Q}",
    "fira INT8 weights, 3 micro-batches": f"--method=fira {Q} --weight_bits=8"
    " --gradient_accumulation_steps=3",
    "qalice": f"--method=qalice {Q}",
    "galore": f"--method=galore {Q}",
    "galore 3 micro-batches, clip": f"--method=galore {Q} --gradient_accumulation_steps=3 --grad_clip=0.5",
    "galore INT8 weights": f"--method=galore {Q} --weight_bits=8",
    "galore8bit": f"--method=galore8bit {Q}",
    "natural_galore": f"--method=natural_galore {Q}",
    "apollo": f"--method=apollo {SUBSPACE}",
    "apollo INT8 weights": f"--method=apollo {SUBSPACE} --weight_bits=8",
    "apollo_mini": "--method=apollo_mini --proj_gap=6",
    "loqt": f"--method=loqt {Q}",
    "loqt INT8, 3 micro-batches, clip": f"--method=loqt {Q} --weight_bits=8 --gradient_accumulation_steps=3"
    " --grad_clip=0.5",
    "adamw": "--method=adamw --weight_decay=0.1",
    "adamw clip, 3 micro-batches": "--method=adamw --grad_clip=0.5 --gradient_accumulation_steps=3",
    "adamw 2 ranks": "--method=adamw --gradient_accumulation_steps=2",
    "adam8bit": "--method=adam8bit",
    "adam8bit 3 micro-batches, clip": "--method=adam8bit --grad_clip=0.5 --gradient_accumulation_steps=3",
    "lora": "--method=lora --rank=8",
    "qlora": "--method=qlora --rank=8",
    "relora": "--method=relora --rank=8 --proj_gap=12",
    "welore": f"--method=welore {TUNED.replace('{model}', '{compressed}')}",
    "fine-tune qgalore": f"--method=qgalore {TUNED} {Q} --freeze_embedding=True --embed_bits=8",
    "fine-tune qgalore, 3 micro-batches": f"--method=qgalore {TUNED} {Q} --gradient_accumulation_steps=3",
    "fine-tune lora": f"--method=lora {TUNED} --rank=8",
    "fine-tune adamw": f"--method=adamw {TUNED}",
}


def run_in(checkout, *args, ranks=1):
    """Run a script of the checkout; exits with its message if it fails. Returns its output."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *args], cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(args)}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return done.stdout


def make_inputs(checkout):
    """{name: folder} of what the cases read, made once, by the first checkout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ("docs", "model", "compressed", "examples")
    folders = {name: os.path.join(FOLDER, name) for name in names}
    if os.path.isdir(folders["examples"]):
        return folders
    run_in(checkout, "prepare_c4.py", "--input=docs", "--encoding=bytes", f"--out_dir={folders['docs']}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["good bad film"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.save_pretrained(folders["model"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folders["model"])
    table = os.path.join(FOLDER, "reviews.tsv")
    with open(table, "w") as f:
        for i in range(400):
            f.write(f"a {('bad', 'good')[i % 2]} film, number {i}\t{i % 2}\n")
    run_in(
        checkout, *script(checkout, "welore"), f"--model={folders['model']}",
        f"--out={folders['compressed']}", "--keep=0.6", "--least=0.9",
    )
    run_in(
        checkout, *script(checkout, "prepare_sft"), f"--input={table}", "--block_size=63",
        f"--out_dir={folders['examples']}", f"--encoding={folders['model']}", "--columns=text,label",
        "--labels=bad,good", "--prompt={text}:", "--completion= {label}",
    )
    return folders


def script(checkout, name):
    """How a checkout starts its script `name`: from finetune/, or flat as before there was one."""
    if os.path.isdir(os.path.join(checkout, "finetune")):
        return ["-m", f"finetune.{name}"]
    return [f"{name}.py"]


def run_case(checkout, name, inputs):
    """The output folder of a case, run if it is not there yet."""
    version = subprocess.run(
        ["git", "-C", checkout, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    out_dir = os.path.join(FOLDER, f"{version}-{os.path.basename(os.path.abspath(checkout))}", name)
    if not os.path.exists(f"{out_dir}/done"):
        ranks = 2 if "2 ranks" in name else 1
        settings = f"{RUN} --data_dir={{docs}} {CASES[name]}".format(**inputs).split()
        last = {setting.partition("=")[0]: setting for setting in settings}  # the last of each key
        run_in(checkout, "train.py", *last.values(), f"--out_dir={out_dir}", ranks=ranks)
        open(f"{out_dir}/done", "w").close()
    return out_dir


def result(out_dir):
    """({(iter, what): loss}, {name: tensor}) of a finished case."""
    losses = {}
    with open(f"{out_dir}/log.jsonl") as f:
        for entry in map(json.loads, f):
            for what in ("loss", "val_loss"):
                if what in entry:
                    losses[entry["iter"], what] = entry[what]
    weights = torch.load(f"{out_dir}/ckpt.pt", weights_only=True, mmap=True)["model"]
    return losses, weights


def compare(old, new, name, inputs):
    """One line on a case, and whether the two are the same."""
    (a, a_weights), (b, b_weights) = (result(run_case(of, name, inputs)) for of in (old, new))
    if a != b:
        first = next(key for key in sorted(a) if a[key] != b.get(key))
        return f"DIFFERS  {name}: at step {first[0]} {first[1]} {a[first]!r}, now {b.get(first)!r}", False
    different = [n for n, t in a_weights.items() if n not in b_weights or not torch.equal(t, b_weights[n])]
    if different or len(a_weights) != len(b_weights):
        return f"DIFFERS  {name}: the final weights, first {different[:1]}", False
    return f"same     {name}: {len(a)} losses, the last {a[40, 'val_loss']:.4f}", True


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    old, new, *words = sys.argv[1:]
    names = [name for name in CASES if not words or any(word in name for word in words)]
    inputs = make_inputs(old)
    same = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line, ok in pool.map(lambda name: compare(old, new, name, inputs), names):
            print(line, flush=True)
            same += ok
    print(f"{same} of {len(names)} cases are the same")
    raise SystemExit(same < len(names))


if __name__ == "__main__":
    main()
