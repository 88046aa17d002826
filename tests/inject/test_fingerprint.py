"""What tells kept results of one pipeline from those of another: every change of a pipeline that
results depend on changes the fingerprint, and nothing else does."""

import contextlib
import logging

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from diffusers import (
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from support import tiny, variants

from visattn.generation.silence_logs import quiet
from visattn.guidance import PAG, SEG, guide
from visattn.guidance.head_search.driver import search_heads
from visattn.inject import apply_plan, remove_plan, sparse
from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import handlers_of
from visattn.inject.models.fingerprint import fingerprint
from visattn.inject.searchable import check_searchable
from visattn.patterns import Diagonal
from visattn.search.measure.target import SearchTarget


@pytest.fixture(scope="module")
def pipe():
    """With two adapters, of which one is active."""
    own = tiny.wan21()
    torch.manual_seed(0)
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        own.transformer.add_adapter(config, adapter_name=name)
    own.transformer.set_adapter("one")
    return own


@contextlib.contextmanager
def exchanged(own, name, value):
    """Another attribute inside a ``with`` block."""
    before = getattr(own, name)
    setattr(own, name, value)
    try:
        yield
    finally:
        setattr(own, name, before)


@contextlib.contextmanager
def done(do, undo):
    do()
    try:
        yield
    finally:
        undo()


def weight(model):
    """A parameter of a model, twice as large."""
    own = next(iter(model.parameters()))
    return done(lambda: own.data.mul_(2), lambda: own.data.div_(2))


def cached(pipe, config):
    own = pipe.transformer
    return done(lambda: own.enable_cache(config), own.disable_cache)


CHANGES = {
    "weights of the denoiser": lambda p: weight(p.transformer),
    "weights of the text encoder": lambda p: weight(p.text_encoder),
    "weights of the VAE": lambda p: weight(p.vae),
    "scale of a LoRA": lambda p: done(
        lambda: p.set_adapters(["one"], [0.1]), lambda: p.set_adapters(["one"], [1.0])
    ),
    "another LoRA": lambda p: done(
        lambda: p.transformer.set_adapter("two"), lambda: p.transformer.set_adapter("one")
    ),
    "both LoRAs": lambda p: done(
        lambda: p.transformer.set_adapter(["one", "two"]), lambda: p.transformer.set_adapter("one")
    ),
    "LoRA disabled": lambda p: done(p.transformer.disable_adapters, p.transformer.enable_adapters),
    "a cache": lambda p: cached(p, FirstBlockCacheConfig(threshold=0.5)),
    "a cache of another threshold": lambda p: cached(p, FirstBlockCacheConfig(threshold=0.1)),
    "another cache": lambda p: cached(p, MagCacheConfig(num_inference_steps=3, calibrate=True)),
    "scheduler": lambda p: exchanged(p, "scheduler", DDIMScheduler()),
    "shift of the scheduler": lambda p: exchanged(
        p, "scheduler", UniPCMultistepScheduler.from_config(p.scheduler.config, flow_shift=5.0)
    ),
    "a scheduler with shift": lambda p: exchanged(
        p, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0)
    ),
    "set_shift of a scheduler": lambda p: exchanged(p, "scheduler", shifted()),
    "class of the pipeline": lambda p: exchanged(p, "__class__", WanVideoToVideoPipeline),
    "setting of the pipeline": lambda p: done(
        lambda: p.register_to_config(boundary_ratio=0.5),
        lambda: p.register_to_config(boundary_ratio=None),
    ),
    "attention backend": lambda p: done(
        lambda: p.transformer.set_attention_backend("native"),
        p.transformer.reset_attention_backend,
    ),
    "processor": lambda p: exchanged(p.transformer.blocks[0].attn1, "processor", Processor()),
    "tiles of the VAE": lambda p: done(p.vae.enable_tiling, p.vae.disable_tiling),
    "slices of the VAE": lambda p: exchanged(p.vae, "use_slicing", True),
    "tokenizer": lambda p: exchanged(p, "tokenizer", tiny.tokenizer(31)),
    "dtype": lambda p: done(lambda: p.vae.to(torch.float64), lambda: p.vae.to(torch.float32)),
    "compiled": lambda p: exchanged(p.transformer.blocks[0], "_compiled_call_impl", print),
    "training": lambda p: done(p.transformer.train, p.transformer.eval),
}


class Processor:
    _attention_backend = None


def shifted():
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_shift(7.0)
    return own


def test_every_change_is_seen_and_nothing_else(pipe):
    first, found = fingerprint(pipe), {}
    assert len(first) == 24 and int(first, 16) >= 0
    for name, change in CHANGES.items():
        with quiet(), change(pipe):
            found[name] = fingerprint(pipe)
        assert fingerprint(pipe) == first, f"{name}: not as before"
    same = [name for name, own in found.items() if own == first]
    assert same == []
    assert len(set(found.values())) == len(CHANGES)


def test_use_and_plans_change_nothing(pipe):
    first = fingerprint(pipe)
    tiny.generate(pipe, steps=1)
    assert fingerprint(pipe) == first
    with sparse(pipe, Diagonal(4)):
        assert fingerprint(pipe) == first
        tiny.generate(pipe, steps=1)
        assert fingerprint(pipe) == first
    assert fingerprint(pipe) == first


class Quantized(torch.Tensor):
    """A tensor that is made of others and knows few operations, as those of torchao."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale):
        self.data_, self.scale_ = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale_"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale_)
        raise NotImplementedError(f"{cls.__name__} has no {func}")


def test_quantized_weights():
    own, data = tiny.wan21(), torch.arange(256, dtype=torch.int8).reshape(16, 16)
    layer, found = own.transformer.blocks[0].attn1, []
    for values, scale in ((data, 1.0), (data, 2.0), (data + 1, 1.0)):
        quantized = Quantized(values, torch.tensor([scale]))
        layer.to_q.weight = torch.nn.Parameter(quantized, requires_grad=False)
        found.append(fingerprint(own))
        assert fingerprint(own) == found[-1]
    assert len(set(found)) == 3


@pytest.mark.parametrize("how", ["memory", "disk", "groups", "groups on disk"])
def test_offloaded_weights(tmp_path, caplog, how):
    """Are read where they are, so that other weights are seen."""

    def offloaded(seed):
        model, cpu = tiny.wan_transformer(seed), torch.device("cpu")
        folder = tmp_path / str(seed)
        if how == "memory":
            return cpu_offload(model, cpu)
        if how == "disk":
            return disk_offload(model, folder, cpu)
        path = str(folder) if how == "groups on disk" else None
        apply_group_offloading(model, cpu, offload_type="leaf_level", offload_to_disk_path=path)
        return model

    first, other = offloaded(0), offloaded(1)
    if how in ("memory", "disk"):
        assert next(first.parameters()).is_meta
    with caplog.at_level(logging.WARNING, "visattn"):
        assert fingerprint(first) == fingerprint(offloaded(0)) != fingerprint(other)
    assert not caplog.records


def test_weights_that_cannot_be_read_are_told(caplog):
    with torch.device("meta"):
        model = tiny.wan_transformer(0)
    with caplog.at_level(logging.WARNING, "visattn"):
        fingerprint(model)
    (record,) = caplog.records
    assert "cannot be read, the first is transformer.scale_shift_table" in record.getMessage()


def test_sharded_weights():
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

    own = tiny.wan_transformer(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        own.scale_shift_table = torch.nn.Parameter(distribute_tensor(own.scale_shift_table, mesh))
        assert isinstance(own.scale_shift_table, DTensor)
        first = fingerprint(own)
        with torch.no_grad():
            own.scale_shift_table.mul_(2)
        assert fingerprint(own) != first
        pipe = tiny.wan21()
        pipe.transformer = own
        with pytest.raises(ValueError, match="sharded over processes"):
            SearchTarget(pipe, {}, None)
    finally:
        dist.destroy_process_group()


def heads(pipe):
    return search_heads(pipe, lambda frames, prompt: 0.0, ["a"])


def refuses(search, pipe, words):
    with pytest.raises(ValueError, match=words):
        search(pipe)


@pytest.mark.parametrize("search", [lambda pipe: SearchTarget(pipe, {}, None), heads])
def test_what_cannot_be_searched_is_refused(pipe, search):
    words = r"FirstBlockCacheConfig.*disable_cache\(\) first"
    with cached(pipe, FirstBlockCacheConfig(threshold=0.5)):
        refuses(search, pipe, words)
    with exchanged(pipe.transformer, "_parallel_config", "some"):
        refuses(search, pipe, "without enable_parallelism")
    with guide(pipe, PAG(scale=3.0)):
        refuses(search, pipe, "guide or steer")
        tiny.generate(pipe, steps=1)  # as a guidance that was not used is an error


def test_a_plan_is_no_edit():
    """Pipelines that do not say where they stand have their calls announced to a plan."""
    own = variants.PIPELINES["flux img2img"]()
    apply_plan(own, Diagonal(2))
    assert handlers_of(own)
    check_searchable(own)
    with guide(own, SEG(layers=[0], scale=2.0)):
        refuses(check_searchable, own, "guide or steer")
        variants.generate("flux img2img", own, False)
    own.transformer._cp_config = object()
    refuses(check_searchable, own, "the context parallelism of cache-dit")


def test_a_plan_stays_where_a_search_is_refused(pipe):
    apply_plan(pipe, Diagonal(4))
    try:
        with cached(pipe, FirstBlockCacheConfig(threshold=0.5)):
            refuses(lambda pipe: SearchTarget(pipe, {}, None), pipe, "has a cache")
        assert attached(pipe.transformer).plan.rules
    finally:
        remove_plan(pipe)
