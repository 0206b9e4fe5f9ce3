"""
Tests of kernels/attention.py: the same numbers as with a matrix of who sees whom, without one.
    python -m pytest tests/test_attention.py
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import attention
from kernels.attention import Spans, attend, attention_mask, lengths_of, masked, rotate

LENGTHS = [5, 1, 17, 9, 20, 12]  # of texts in two rows of 32


def qkv(B=2, heads=4, groups=2, T=32, hs=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, heads, hs), (B, T, groups, hs), (B, T, groups, hs)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.transpose(1, 2).detach().requires_grad_() for t in tensors]


def numbered(lengths, rows=2):
    numbers = [torch.full((n,), i) for i, n in enumerate(lengths)]
    return torch.cat(numbers).view(rows, -1)


def matrix(documents, window, T=32):
    """Who sees whom, plainly: (B or 1, 1, T, T) bool."""
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    if documents is None:
        return seen[None, None]
    return seen & (documents[:, None, :, None] == documents[:, None, None, :])


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", [32, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_a_matrix(packed, window, softcap, groups, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 6)  # so that there are several chunks
    documents = numbered(LENGTHS) if packed else None
    mask = attention_mask(0, 32, window, documents, "cpu")
    assert not isinstance(mask, torch.Tensor)
    inputs = qkv(groups=groups)
    expected = masked(*inputs, 0.3, softcap, matrix(documents, window))
    got = attend(*inputs, 0.3, softcap, mask)
    torch.testing.assert_close(got, expected)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (got, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("packed,window,softcap", [(True, 4096, 0.0), (False, 256, 0.0),
                                                   (True, 256, 0.0), (False, 4096, 2.0)])
def test_no_tensor_grows_with_the_square_of_the_tokens(packed, window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "LOGITS", 2**18)
    T = 4096
    documents = numbered([1000, 96, 2000, 1000], rows=1) if packed else None
    mask = attention_mask(0, T, window, documents, "cpu")
    inputs = qkv(B=1, heads=2, groups=1, T=T)
    with Largest() as seen:
        attend(*inputs, 0.3, softcap, mask).sum().backward()
    assert seen.most < T * T / 16


def test_texts_in_several_pieces_get_a_matrix():
    """As where a text goes on behind another one."""
    documents = torch.tensor([[0, 0, 1, 0]])
    assert lengths_of(documents) is None
    mask = attention_mask(0, 4, 4, documents, "cpu")
    assert torch.equal(mask, matrix(documents, 4, T=4))
    assert attention_mask(0, 4, 4, torch.tensor([[0, 0, 1, 2]]), "cpu") == Spans([2, 1, 1], 4)
    assert attention_mask(0, 4, 4, None, "cpu") is None


def test_rope_of_a_part_of_a_head_leaves_the_rest():
    q, k, _ = (t.detach().double().transpose(1, 2).requires_grad_() for t in qkv(1, T=3))
    angle = torch.randn(3, 2, dtype=torch.float64)  # of two pairs, of the four in a head
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()
    for t, x in zip(rotate(q, k, cos, sin), (q, k)):
        assert torch.equal(t[..., 4:], x[..., 4:])
        norm = t[..., :4].norm(dim=-1)
        assert torch.allclose(norm, 1.3 * x[..., :4].norm(dim=-1))
        assert not torch.allclose(t[..., :4], 1.3 * x[..., :4])
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))
