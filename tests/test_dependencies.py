"""What stock pipelines need besides diffusers and transformers comes with visattn."""

import importlib
import json
import pkgutil
import re
import shutil

import diffusers.modular_pipelines.wan
import diffusers.pipelines.skyreels_v2
import diffusers.pipelines.wan
from support import tiny
from test_packaging import CONFIG

from visattn.generation import Loading, load_pipeline

FAMILIES = (
    diffusers.pipelines.wan,
    diffusers.pipelines.skyreels_v2,
    diffusers.modular_pipelines.wan,
)


def test_every_pipeline_of_wan_cleans_its_prompt():
    cleaned = []
    for package in FAMILIES:
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            if hasattr(module, "prompt_clean"):
                cleaned.append(module.__name__)
                assert module.prompt_clean(" a  red&amp;blue  square ") == "a red&blue square"
    assert "diffusers.pipelines.wan.pipeline_wan_i2v" in cleaned and len(cleaned) >= 8


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(tmp_path):
    """As that of CogVideoX: there is no tokenizer.json beside it."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    tiny.cogvideox().save_pretrained(tmp_path / "model")
    folder = tmp_path / "model" / "tokenizer"
    shutil.rmtree(folder)
    folder.mkdir()
    model = proto.ModelProto()
    for word in ("<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in tiny.WORDS[3:])):
        kind = {"<unk>": 2, "<pad>": 3, "</s>": 3}.get(word, 1)
        model.pieces.add(piece=word, score=-1.0, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 226, "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    index = tmp_path / "model" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "tokenizer": ["transformers", "T5Tokenizer"]}))
    pipe = load_pipeline(Loading(str(tmp_path / "model")))
    assert pipe.tokenizer.tokenize("a red square") == ["▁a", "▁red", "▁square"]
    assert pipe.tokenizer("a").input_ids == [4, 1]


def test_they_are_dependencies_and_not_extras():
    named = {re.split(r"[\s<>=;\[]", line)[0] for line in CONFIG["project"]["dependencies"]}
    assert {"ftfy", "sentencepiece", "protobuf"} <= named
