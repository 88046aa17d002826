"""Kept results: whole, found again, and safe from full disks and damage."""

import errno
import logging
import os

import pytest
import torch

from visattn.tasks import result_store as module
from visattn.tasks.result_store import ResultStore, key_of

VALUE = {"error": 0.1 + 0.2, "names": ["a", None], "nested": {"x": [1, 2.5]}}
TENSORS = {"t": torch.tensor([0.1, float("nan"), 3.0], dtype=torch.float64)}


def test_found_again_bit_by_bit(tmp_path):
    ResultStore(tmp_path).put("k", VALUE, TENSORS)
    item = ResultStore(tmp_path).get("k")
    assert item.value == VALUE
    assert torch.equal(item.tensors["t"].nan_to_num(), TENSORS["t"].nan_to_num())
    assert item.tensors["t"].dtype == torch.float64
    assert [path.name for path in tmp_path.iterdir()] == ["k.safetensors"]


def test_nothing_there_and_memory_alone(tmp_path):
    assert ResultStore(tmp_path).get("k") is None
    own = ResultStore(None)
    own.put("k", VALUE)
    assert own.get("k").value == VALUE


@pytest.mark.parametrize("cut", [0, 7, 40, -3])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, cut):
    ResultStore(tmp_path).put("k", VALUE, TENSORS)
    path = tmp_path / "k.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING, "visattn"):
        assert ResultStore(tmp_path).get("k") is None
    assert "damaged" in caplog.text


def test_a_file_of_another_key_is_made_anew(tmp_path, caplog):
    ResultStore(tmp_path).put("k", {"n": 1})
    (tmp_path / "k.safetensors").rename(tmp_path / "other.safetensors")
    with caplog.at_level(logging.WARNING, "visattn"):
        assert ResultStore(tmp_path).get("other") is None
    assert "damaged" in caplog.text


def test_a_full_disk_is_said_once_and_survived(tmp_path, caplog, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    own = ResultStore(tmp_path)
    monkeypatch.setattr(module, "write_whole", full)
    with caplog.at_level(logging.WARNING, "visattn"):
        for n in range(3):
            own.put(f"k{n}", {"n": n})
    assert [own.get(f"k{n}").value["n"] for n in range(3)] == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "No space left" in own.lost
    own.forget()  # what cannot be read again stays
    assert own.get("k0") is not None
    assert not list(tmp_path.iterdir())


def test_keys_tell_questions_apart():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("a", {"x": 1}), key_of("b", {"x": 1}), key_of("a", {"x": 1.5})}) == 3
