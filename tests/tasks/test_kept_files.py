"""Files of ours that lie in folders of users are input too: what is in their place is refused in a
sentence, or counts as not there. No pipe is waited for, and nothing is read without a limit."""

import os

import pytest
import torch
from safetensors.torch import save_file

from visattn._atomic import read_limited, read_text, sha256_of
from visattn.generation import checksums, record
from visattn.generation import clip_shapes as shapes
from visattn.generation.job import Job
from visattn.generation.loading import Loading
from visattn.generation.origin import origin_of
from visattn.guidance.head_search import head_log
from visattn.guidance.head_search.head_log import HeadLog
from visattn.tasks.result_store import ResultStore

DEEP = b"[" * 100_000 + b"]" * 100_000
DATA = {"deep": DEEP, "list": b"[]", "large": b" " * 2000, "broken": b"no JSON"}


def _fill(path, kind):
    """Put something in the place of a file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(DATA[kind])


PLACES = ("pipe", "folder", *DATA)


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_in_the_place_of_a_file(kind, tmp_path, monkeypatch):
    for module in (record, checksums, shapes, head_log):
        monkeypatch.setattr(module, "MOST_BYTES", 1000 if kind == "large" else 1 << 20)
    output = tmp_path / "clip.mp4"
    _fill(record.record_path(output), kind)
    assert record.read_record(output) is None
    with pytest.raises(ValueError, match="is no record of visattn"):
        record.check_record_path(output)

    _fill(tmp_path / checksums.CHECKSUMS, kind)
    with pytest.raises(ValueError, match=r"has a broken checksums\.json"):
        checksums.check_checksums(tmp_path)

    _fill(tmp_path / shapes.SHAPES_FILE, kind)
    with pytest.raises(ValueError, match=r"visattn_shapes\.json of model .* cannot be read"):
        shapes.read_shapes(tmp_path)

    _fill(tmp_path / "scores.jsonl", kind)
    with pytest.raises(ValueError, match=r"scores\.jsonl"):
        HeadLog(tmp_path / "scores.jsonl", {})


def test_outputs_and_pictures_that_are_pipes_have_no_hash(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "0000.png").write_bytes(b"a picture")
    assert record.output_hash(frames) is not None
    os.mkfifo(frames / "0001.png")
    assert record.output_hash(frames) is None
    with pytest.raises(ValueError, match="is no regular file"):
        Job(prompt="", image=str(frames / "0001.png")).record()
    with pytest.raises(ValueError, match="is no regular file"):
        sha256_of(frames)


def test_hashes_are_those_of_the_contents(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    found = set()
    for name, data in (("0000.png", b"a"), ("0000.png", b"b"), ("0001.png", b"b")):
        (frames / name).write_bytes(data)
        found.add(record.output_hash(frames))
    assert len(found) == 3
    # of FIPS 180-2: a million times the letter a
    (tmp_path / "million").write_bytes(b"a" * 1_000_000)
    assert sha256_of(tmp_path / "million").startswith("cdc76e5c9914fb9281a1c7e284d73e67")
    with pytest.raises(ValueError, match="more than the 10 bytes"):
        read_limited(tmp_path / "million", 10)


def test_the_name_of_a_commit_may_be_anything(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc\n")
    assert origin_of(Loading("some/model"))["model"] == "abc"
    for data in (b"\xff", b"a" * 2000):
        (refs / "main").write_bytes(data)
        assert origin_of(Loading("some/model"))["model"] is None
    (refs / "main").unlink()
    os.mkfifo(refs / "main")
    assert origin_of(Loading("some/model"))["model"] is None


def test_results_of_a_search_that_are_none_are_made_anew(tmp_path, caplog):
    values = {"deep": DEEP.decode(), "list": "[]", "broken": "{"}
    for kind, text in values.items():
        kept = {"key": kind, "value": text}
        save_file({"x": torch.zeros(1)}, tmp_path / f"{kind}.safetensors", kept)
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    own = ResultStore(tmp_path)
    for kind in (*values, "none", "pipe"):
        assert own.get(kind) is None
        own.put(kind, {"a": 1}, {"x": torch.ones(1)})
        again = ResultStore(tmp_path).get(kind)
        assert again is not None and again.value == {"a": 1} and again.tensors["x"] == 1
    assert len([own for own in caplog.records if "is damaged" in own.message]) == len(values) + 1


def test_a_text_without_end_is_refused():
    with pytest.raises(ValueError, match="prompts file '/dev/zero' has more than the 1000 bytes"):
        read_text("/dev/zero", "prompts file", 1000)
