"""The entry of the launch tables that a device gets."""

import pytest
import torch

from visattn.kernels.targets import target_of

CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_89",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 1): "sm_120",
}


def device(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_device_gets_its_own_or_the_nearest_older_one(monkeypatch, capability):
    assert target_of(device(monkeypatch, capability)) == CAPABILITIES[capability]


def test_devices_that_have_none_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"capability 7\.5 is below the least target, 8\.0"):
        target_of(device(monkeypatch, (7, 5)))
    with pytest.raises(ValueError, match="device=cpu has no Triton target"):
        target_of(torch.device("cpu"))
