"""torch's attention over packed rows, where a GPU has it: it is asked for what the plain path computes."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inference.generation import attention
from inference.generation.attention import PackedKernel, Sequences

LENGTHS = [3, 1, 7, 5]


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    window_size: tuple[int, int] = (-1, -1), scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What the documentation of torch 2.13 says: (tokens, heads, head), a window of so many tokens to the left."""
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
    assert enable_gqa or query.shape[1] == key.shape[1]
    found = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        q, k, v = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        place = torch.arange(end - start)
        away = place[:, None] - place
        left, right = (end if side < 0 else side for side in window_size)
        seen = (away <= left) & (-away <= right)
        found.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


def of_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    assert is_causal
    return by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, (-1, 0))


@pytest.mark.parametrize("function", [by_hand, of_2_10])
@pytest.mark.parametrize("window", [None, 2, 7, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_it_is_asked_for_what_the_plain_path_computes(function, window, scale, key_heads, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(heads, sum(LENGTHS), 8, dtype=torch.float64) for heads in (4, key_heads, key_heads)
    )
    attend = partial(Sequences(LENGTHS).attend, 0, query, key, value, scale, window)
    expected, calls = attend(), []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        return function(*arguments, **options)

    kernel = PackedKernel(function)
    kernel.function = counted
    monkeypatch.setattr(attention, "takes_packed", lambda query, value: True)
    monkeypatch.setattr(attention, "packed_kernel", lambda: kernel)
    assert torch.allclose(attend(), expected, rtol=1e-12)
    narrow = window is not None and window < max(LENGTHS)
    assert len(calls) == (function is by_hand or not narrow)  # 2.10 knows no window
    attend(dropout=0.5)
    assert len(calls) == (function is by_hand or not narrow)  # nor does any version know dropout


def test_the_installed_torch_is_known():
    kernel = attention.packed_kernel()
    assert kernel is None or {"cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= kernel.takes
    assert kernel is None or {"is_causal", "window_size"} & kernel.takes


@pytest.mark.parametrize(
    ("dtype", "head", "takes"),
    [(torch.bfloat16, 64, True), (torch.float16, 256, True), (torch.float32, 64, False), (torch.bfloat16, 12, False)],
)
def test_it_takes_16_bit_in_sizes_of_flash_attention(dtype, head, takes, monkeypatch):
    monkeypatch.setattr(attention, "has_flash_attention", lambda device: True)
    query: Any = type("OnCuda", (), {"is_cuda": True, "dtype": dtype, "shape": (1, 1, head), "device": None})
    assert attention.takes_packed(query, query) == takes
    query.is_cuda = False
    assert not attention.takes_packed(query, query)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel itself: needs CUDA")
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_gives_what_the_plain_path_gives_gradients_too(window, key_heads, monkeypatch):
    torch.manual_seed(0)
    shapes = [(heads, sum(LENGTHS), 64) for heads in (4, key_heads, key_heads)]
    given = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes]
    weights = torch.randn(sum(LENGTHS), 4, 64, dtype=torch.bfloat16, device="cuda")

    def attended() -> list[Tensor]:
        seen = Sequences(LENGTHS).attend(0, *given, None, window)
        return [seen, *torch.autograd.grad((seen * weights).sum(), given)]

    by_kernel = attended()
    monkeypatch.setattr(attention, "packed_kernel", lambda: None)
    for ours, plain in zip(by_kernel, attended(), strict=True):
        torch.testing.assert_close(ours.float(), plain.float(), rtol=2e-2, atol=2e-2)
