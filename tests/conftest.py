"""What holds for every test: one torch thread, and interpreted kernels where there is no GPU; and
folders with models for the tests of commands."""

import os
import sys
from collections import Counter
from contextlib import ExitStack

import pytest
import torch

if not torch.cuda.is_available():  # true for HIP as well
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

os.environ["VISATTN_GUARD"] = "0"  # what runs sparse does not depend on the machine

from support.interpreter import make_interpreter_faster

from visattn._compat import ensure_torchvision
from visattn.runtime.temporary_files import temporary_folder

CACHE = ExitStack()
os.environ["VISATTN_CACHE"] = str(CACHE.enter_context(temporary_folder()))

ensure_torchvision()
torch.set_num_threads(1)
pytest.register_assert_rewrite("support.cli")
if os.environ.get("TRITON_INTERPRET") == "1":
    make_interpreter_faster()


def pytest_unconfigure():
    CACHE.close()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Put all cases but one in ``n`` of a test with the marker ``sampled(n)`` into the second
    tier. Neighbours in the product of two lists of parameters differ in both lists."""
    counts = Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is None:
            continue
        (n,) = sampled.args
        test = (item.path, item.originalname)
        number = counts[test]
        counts[test] += 1
        if (number + number // n) % n:
            item.add_marker(pytest.mark.second)


@pytest.fixture(autouse=True)
def attention_backend():
    """``set_attention_backend`` of a model changes that of the process, too: it is put back."""
    before = _active_backend()
    yield
    if before is not None and _active_backend() is not before:
        registry = sys.modules["diffusers.models.attention_dispatch"]._AttentionBackendRegistry
        registry.set_active_backend(before)


def _active_backend():
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return None if dispatch is None else dispatch._AttentionBackendRegistry.get_active_backend()[0]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to work in, where no other test writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny pipelines saved by name; ``wan`` is ``wan21``."""
    from support import tiny  # here, as most tests need no diffusers

    from visattn.generation.silence_logs import quiet

    folder = tmp_path_factory.mktemp("models")
    with quiet():
        for name, make in (*tiny.PIPELINES.items(), ("i2v", tiny.image_to_video)):
            make().save_pretrained(folder / name)
    (folder / "wan").symlink_to("wan21")
    return folder


@pytest.fixture
def folder(models, alone, monkeypatch):
    """An empty folder to work in, with the models beside; nothing is fetched from a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in models.iterdir():
        (alone / path.name).symlink_to(path)
    return alone
