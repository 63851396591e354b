"""Which engine runs a call, asked with tensors that have a device and a dtype and no memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexnsa import engines, explain
from flexnsa_masks import causal, dilated


def chosen(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, **options: object) -> list[str]:
    with FakeTensorMode():
        return [choice.engine for choice in explain(torch.empty(1, 4, 8, dim, device=device, dtype=dtype), **options)]


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(engines, "TRITON_INSTALLED", True)
    monkeypatch.setattr(engines, "FLASH_INSTALLED", False)


def test_auto_on_cuda_takes_flex_for_static_masks_and_triton_for_the_rest():
    assert chosen() == ["flex", "triton", "triton", "flex"]
    assert chosen(dtype=torch.float32) == ["flex", "triton", "triton", "flex"]


def test_auto_goes_on_to_the_next_engine_that_can():
    assert chosen(mods=True) == ["flex", "reference", "flex", "flex"]
    assert chosen(mask_mod=lambda b, h, i, j: j <= i) == ["flex", "reference", "flex", "flex"]
    assert chosen(mask_mod=causal()) == ["flex", "triton", "triton", "flex"]
    assert chosen(dim=320) == ["flex", "reference", "flex", "flex"]
    assert chosen(dtype=torch.float64) == 4 * ["reference"]
    assert chosen(device="cpu") == 4 * ["reference"]


def test_heads_too_narrow_for_flex_on_cuda_take_what_runs():
    assert chosen(dim=8) == ["reference", "triton", "triton", "reference"]
    assert chosen(dim=8, mods=True) == 4 * ["reference"]
    with pytest.raises(NotImplementedError, match="head dims from 16 on CUDA, got 8"):
        chosen(dim=8, impl="flex")


def test_a_mask_that_triton_does_not_take_goes_to_flex_compiled_or_not(monkeypatch):
    mask = dilated(3, 40)
    assert chosen(mask_mod=mask) == ["flex", "reference", "flex", "flex"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(mask_mod=mask) == ["flex", "reference", "flex", "flex"]
    assert chosen(mask_mod=causal()) == ["flex", "triton", "triton", "flex"]


def test_too_many_blocks_for_the_top_n_leave_the_other_stages_alone():
    assert chosen(num_selected=65) == ["flex", "reference", "triton", "flex"]
    with pytest.raises(NotImplementedError, match="up to 64 blocks, got num_selected=65"):
        chosen(num_selected=65, impl="triton")


def test_auto_without_triton_still_takes_no_dense_engine_on_cuda(monkeypatch):
    monkeypatch.setattr(engines, "TRITON_INSTALLED", False)
    assert chosen() == ["flex", "reference", "flex", "flex"]
    with FakeTensorMode():
        reasons = [choice.reason for choice in explain(torch.empty(1, 1, 1, 64, device="cuda"))]
    assert all("triton is not installed" in reason for reason in reasons)
