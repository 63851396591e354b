"""What is kept between calls."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexnsa import kept


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_only_real_tensors_are_kept(device, monkeypatch):
    device = torch.empty(0, device=device).device
    if device.type == "cpu":
        monkeypatch.setattr(kept, "_stream", lambda device: 0)
    count = kept.kept(4)(lambda number, device: torch.arange(number, device=device))
    torch.func.grad(lambda x: (x * count(3, device)).sum())(torch.ones(3, device=device))
    with FakeTensorMode():
        count(3, device)
    with torch.inference_mode():
        found = count(3, device)
    assert type(found) is torch.Tensor and found.tolist() == [0, 1, 2] and found.data_ptr()
    assert not found.is_inference() and count(3, device) is found and count(4, device).tolist() == [0, 1, 2, 3]


def test_nothing_is_kept_off_cuda():
    count = kept.kept(4)(lambda number, device: torch.arange(number, device=device))
    assert count(3, torch.device("cpu")) is not count(3, torch.device("cpu"))
