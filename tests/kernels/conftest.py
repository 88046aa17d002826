"""What holds for all tests of kernels: new tensors are filled with NaN, so that what is left
unwritten is seen."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from visattn.attention.backends import triton_kernels as triton_backend


@pytest.fixture
def masks_as_bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every mask is bits, as on a GPU."""
    own = triton_backend.device_maps
    monkeypatch.setattr(triton_backend, "device_maps", lambda *args: own(*args[:5], True))
    triton_backend.DEVICE_MAPS.clear()
    yield
    triton_backend.DEVICE_MAPS.clear()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and ``new_empty`` give NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(make: object, *args: object, **kwargs: object) -> torch.Tensor:
        assert callable(make)
        out: torch.Tensor = make(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", partial(fill, empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty, *a, **k))
