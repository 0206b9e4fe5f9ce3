"""
Tests of run/talk.py: conversations with sample.py.
    python -m pytest tests/test_talk.py
"""

import io
import json
from functools import partial

import pytest
import tokenizers
import torch

import sample
from finetune import hf
from finetune.checkpoints.tokenizer import get_tokenizer
from model import LLaMA
from run.talk import Talk, cut
from tests.common import refused, script, tiny

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer is of bytes and three special tokens."""
    path = tmp_path_factory.mktemp("folder") / "checkpoint"
    torch.manual_seed(0)
    model = LLaMA(tiny(vocab_size=259, block_size=96))
    hf.save(model, str(path), dtype=torch.float32)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|start|>", "<|stop|>", "<|end|>"])
    bpe.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 7]}))
    return str(path)


def scripted(enc, *answers):
    """A `say` that gives these answers, one a turn; its `prompts` are what it got."""
    left = list(answers)

    def say(idx, n, caches=None):
        say.prompts.append(enc.decode(idx[0].tolist()))
        for i in left.pop(0)[:n]:
            if i is None:
                raise KeyboardInterrupt
            yield torch.tensor([[i]])

    say.prompts = []
    return say


def talk(monkeypatch, text, model, enc, say, most=50):
    """A Talk that got these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    talk = Talk(model, enc, "cpu", say, most)
    talk.go()
    return talk


def test_an_answer_ends_at_any_end_token(folder, monkeypatch, capsys):
    enc = get_tokenizer(folder)
    assert enc.end_tokens == {257, 258, 7}  # the template's, the tokenizer's, and another
    text = enc.encode_ordinary
    model = LLaMA(tiny(vocab_size=259, block_size=400))
    say = scripted(enc, text("good é🙂") + [257, 5], text("bad") + [258], [7], text("cut"))
    ended = talk(monkeypatch, "is it?\n\nand that?\n  \nx\ny\n", model, enc, say)
    out, err = capsys.readouterr()
    assert out == "good é🙂\nbad\n\ncut\n"
    assert "cut after 50 tokens" in err  # it gave no end token
    first = "<|start|>user\nis it?<|stop|>\n<|start|>assistant\n"
    assert say.prompts[0] == first
    assert say.prompts[1].startswith(first + "good é🙂<|stop|>\n<|start|>user\nand that?")
    assert [m["content"] for m in ended.messages] == [
        "is it?", "good é🙂", "and that?", "bad", "x", "", "y", "cut"
    ]


def test_ctrl_c_ends_an_answer_and_not_the_chat(folder, monkeypatch, capsys):
    enc = get_tokenizer(folder)
    say = scripted(enc, enc.encode_ordinary("ab") + [None], enc.encode_ordinary("c") + [257])
    ended = talk(monkeypatch, "x\ny\n", LLaMA(tiny(vocab_size=259, block_size=400)), enc, say)
    assert capsys.readouterr().out == "ab\nc\n"
    assert [m["content"] for m in ended.messages] == ["x", "ab", "y", "c"]


def test_kept_keys_give_what_none_give(folder, monkeypatch):
    """Also after Ctrl-C between two blocks, and where a template writes an answer otherwise."""
    enc = get_tokenizer(folder)
    torch.manual_seed(1)
    model = LLaMA(tiny(vocab_size=259, block_size=400))
    asked = []
    computed = []
    hidden = model.hidden
    interrupt = []
    block = model.blocks[1]
    forward = block.forward

    def count(idx, *args, **kwargs):
        computed.append(idx.shape[1])
        return hidden(idx, *args, **kwargs)

    def broken(*args):
        if interrupt and len(computed) == interrupt[0]:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(model, "hidden", count)
    monkeypatch.setattr(block, "forward", broken)
    generate = partial(sample.generate, model, temperature=0)

    def say(idx, n, caches=None):
        for token in generate(idx, n, caches=caches):
            asked[-1][1].append(token.item())
            yield token

    class Watched(Talk):
        def answer(self, ids):
            asked.append((ids, []))
            return super().answer(ids)

    monkeypatch.setattr("sys.stdin", io.StringIO("how\nwhat is this\nwho\n"))
    interrupt.append(5)  # the fourth token of the first answer
    watched = Watched(model, enc, "cpu", say, 8)
    watched.go()
    assert [len(tokens) for _, tokens in asked] == [4, 8, 8]
    monkeypatch.undo()
    for ids, tokens in asked:
        fresh = sample.generate(model, torch.tensor([ids]), len(tokens), temperature=0)
        assert [t.item() for t in fresh] == tokens
    assert sum(computed) < len(asked[-1][0]) + 3 * 8 + 20  # and not three times that


def test_caches_are_cut_to_what_two_texts_share():
    def caches(*lengths):
        found = []
        for k, v in lengths:
            found.append({"k": torch.zeros(1, 2, k, 4), "v": torch.zeros(1, 2, v, 4)})
        return found

    text = list(range(9))
    for held, ids, expected in (
        (caches((9, 9), (8, 8)), [*text, 50], 8),  # the second block had not seen the last token
        (caches((9, 8), (8, 8)), text, 8),
        (caches((6, 6), (6, 6)), [0, 1, 2, 50], 3),
        (caches((6, 6), (6, 6)), [0, 1, 2], 2),  # one is left to compute
        (caches((6, 6), (6, 6)), [50], 0),
        ([{}, {}], [0, 1], 0),
        ([{"k": torch.zeros(1, 2, 3, 4)}, {}], [0, 1], 0),
    ):
        assert cut(held, text, ids) == expected
        for cache in held:
            assert [t.shape[2] for t in cache.values()] == ([expected] * 2 if expected else [])


def test_a_long_conversation_loses_its_oldest_messages(folder, monkeypatch, capsys):
    enc = get_tokenizer(folder)
    say = scripted(enc, *[enc.encode_ordinary("ok") + [257]] * 4)
    model = LLaMA(tiny(vocab_size=259, block_size=96))
    text = f"{'a' * 40}\n{'b' * 200}\n{'c' * 40}\nd\n"
    ended = talk(monkeypatch, text, model, enc, say)
    out, err = capsys.readouterr()
    assert out == "ok\n" * 3
    assert err.count("the model sees 96: the oldest message is left out") == 1
    assert err.count("the model sees 96: say it shorter") == 1
    assert [m["content"][:1] for m in ended.messages] == ["c", "o", "d", "o"]
    assert "b" not in "".join(say.prompts)


def test_a_model_without_a_template_is_one_line(folder, monkeypatch):
    class Plain:
        chat_template = None

    for enc in (Plain(), object()):
        assert "chat template" in refused(Talk, LLaMA(tiny()), enc, "cpu", None, 9)


def test_lines_of_a_pipe_are_answered(folder):
    """Those that are no UTF-8, too."""
    args = [f"--out_dir={folder}", "--chat=True", "--max_new_tokens=5", "--device=cpu"]
    process = script("sample.py", *args, stdin=-1, text=False)
    out, err = process.communicate(b"hello\n\xff\xfe\n", timeout=240)
    assert process.returncode == 0, err
    assert out.count(b"\n") >= 2 and b"Traceback" not in err
