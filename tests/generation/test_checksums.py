"""A model that brings checksums is loaded as it was made, or refused."""

import json

import pytest

from visattn.generation.checksums import CHECKSUMS, check_checksums, write_checksums


@pytest.fixture
def model(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    write_checksums(tmp_path)
    return tmp_path


def test_a_model_as_it_was_made_is_fine(model, tmp_path_factory):
    assert set(json.loads((model / CHECKSUMS).read_text())) == {
        "model_index.json",
        "part/weights.safetensors",
    }
    check_checksums(model)
    (model / "README.md").write_text("another card")
    (model / "visattn_plan.json").write_text("{}")
    check_checksums(model)
    check_checksums(tmp_path_factory.mktemp("without"))


def test_a_changed_model_is_refused_in_one_sentence(model):
    weights = model / "part" / "weights.safetensors"
    data = weights.read_bytes()
    for broken in (data[:-1], data[:9] + b"x" + data[10:], b""):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is damaged or changed: part/weights\.safetensors"):
            check_checksums(model)
    weights.unlink()
    with pytest.raises(ValueError, match=r"lacks the file part/weights\.safetensors"):
        check_checksums(model)
    (model / CHECKSUMS).write_text("{")
    with pytest.raises(ValueError, match=r"has a broken checksums\.json"):
        check_checksums(model)
