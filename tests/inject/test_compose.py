"""Plans together with what diffusers and accelerate put on a denoiser, in either order."""

import functools
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry
from support import tiny

from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Diagonal, Neighborhood
from visattn.plan import Plan, Rule

STEPS = 4
SPARSE = Diagonal(0.2)
# Plans on all layers that end up dense: by the pattern, by the step, and because the phase or the
# pass of their only sparse rule never comes.
DENSE = {
    "density 1": Plan((Rule(Neighborhood((1.0, 1.0, 1.0))),)),
    "dense steps": Plan((Rule(SPARSE),), dense_steps=(1.0, 0)),
    "no such phase": Plan((Rule(SPARSE, phase=1),), phases=(0.99,)),
    "no such pass": Plan((Rule(SPARSE, pass_="perturbed"),)),
}
# one that says something else for steps and passes
VARIED = Plan(
    (Rule(SPARSE, phase=0, pass_="cond"), Rule(Neighborhood((0.5, 0.4, 1.0)), phase=1)),
    dense_steps=(1, 0),
    phases=(0.6,),
)
# Wan 2.2 is Wan 2.1 and a second denoiser; CogVideoX 1.5 has the attention of CogVideoX
KINDS = ("wan22", "cogvideox")


def denoisers(pipe):
    second = getattr(pipe, "transformer_2", None)
    return [pipe.transformer] if second is None else [pipe.transformer, second]


class Feature(NamedTuple):
    """Something that others put on a pipeline; ``off`` is None where they cannot take it off.
    ``reuses``: it leaves out calls, so that the result is another one."""

    on: object
    off: object
    reuses: bool = False


def each(method, **options):
    """Calls a method of every denoiser."""

    def call(pipe):
        for model in denoisers(pipe):
            getattr(model, method)(**options)

    return call


def lora(pipe):
    for number, model in enumerate(denoisers(pipe)):
        torch.manual_seed(7 + number)
        weights = {}
        for name, module in model.named_modules():
            if name.endswith(("attn1.to_q", "attn1.to_v", "attn1.to_out.0")):
                weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
                weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
        second = {"load_into_transformer_2": True} if number else {}
        pipe.load_lora_weights(weights, adapter_name=f"tiny_{number}", **second)


def cache(make):
    def on(pipe):
        for model in denoisers(pipe):
            model.enable_cache(make(pipe))

    return Feature(on, each("disable_cache"), reuses=True)


def group_offload(kind, **options):
    def off(pipe):
        for model in denoisers(pipe):
            registry = HookRegistry.check_if_exists_or_initialize(model)
            registry.remove_hook("group_offloading", recurse=True)

    cpu = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    return Feature(each("enable_group_offload", offload_type=kind, **cpu, **options), off)


def sequential_offload(pipe):
    """``enable_sequential_cpu_offload`` for the denoisers alone: with the CPU as the accelerator,
    accelerate fails on the tied weights of the text encoder, with or without us."""
    for model in denoisers(pipe):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)


FEATURES = {
    "LoRA": Feature(lora, lambda pipe: pipe.unload_lora_weights()),
    "fused QKV": Feature(each("fuse_qkv_projections"), each("unfuse_qkv_projections")),
    "layerwise casting": Feature(
        each(
            "enable_layerwise_casting",
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=torch.float32,
        ),
        None,
    ),
    "group offload, blocks": group_offload("block_level", num_blocks_per_group=1),
    "group offload, leaves": group_offload("leaf_level"),
    "model offload": Feature(
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.remove_all_hooks(),
    ),
    "sequential offload": Feature(sequential_offload, lambda pipe: pipe.remove_all_hooks()),
    "FirstBlockCache": cache(lambda pipe: FirstBlockCacheConfig(threshold=0.8)),
    "MagCache": cache(
        lambda pipe: MagCacheConfig(
            threshold=10.0,
            max_skip_steps=1,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=[1.0] * STEPS,
        )
    ),
    "TaylorSeer": cache(
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*blocks\.\d+\.attn1"],
        )
    ),
    "PAB": cache(
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    ),
}


@contextmanager
def counted(pipe):
    """How often each self-attention of a pipeline computes, whoever wraps it."""
    modules = [
        module
        for model in denoisers(pipe)
        for path, module in model.named_modules()
        if path.endswith("attn1")
    ]
    counts = [0] * len(modules)

    def count(number, *_):
        counts[number] += 1

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            hook = functools.partial(count, number)
            stack.callback(module.to_out[0].register_forward_pre_hook(hook).remove)
        yield counts


def calls(pipe):
    """Dense and sparse calls of each layer, as the summary has them."""
    rows = {(row.role, row.layer): row for row in summary(pipe).layers}
    assert all(row.reason is None for row in rows.values())
    return [(row.dense_calls, row.sparse_calls) for row in rows.values()]


@functools.cache
def alone(kind, feature, plan=None):
    """What a pipeline gives with a feature, and how often its attention runs."""
    pipe = tiny.PIPELINES[kind]()
    if feature is not None:
        FEATURES[feature].on(pipe)
    if plan is not None:
        apply_plan(pipe, plan)
    with counted(pipe) as counts:
        return tiny.generate(pipe, steps=STEPS), list(counts)


def check_dense(pipe, kind, feature):
    """With the plan that is on it, the pipeline gives what it gives without us, and through us."""
    expected, runs = alone(kind, feature)
    before = calls(pipe)
    with counted(pipe) as counts:
        found = tiny.generate(pipe, steps=STEPS)
    assert torch.equal(found, expected)
    assert counts == runs
    assert calls(pipe) == [(n + more, 0) for (n, _), more in zip(before, runs, strict=True)]


def check_alone(pipe, kind, feature):
    """Without a plan, the pipeline gives what it gave before us."""
    assert torch.equal(tiny.generate(pipe, steps=STEPS), alone(kind, feature)[0])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_feature_does_something(kind, feature):
    """Or the tests below would show nothing."""
    plain, plain_runs = alone(kind, None)
    latents, runs = alone(kind, feature)
    assert len(runs) == tiny.LAYERS * (2 if kind == "wan22" else 1) and min(runs) > 0
    if FEATURES[feature].reuses:
        assert sum(runs) < sum(plain_runs) and not torch.equal(latents, plain)
        return
    assert runs == plain_runs
    if feature in ("LoRA", "layerwise casting"):
        assert not torch.equal(latents, plain)
    elif "offload" in feature:
        assert torch.equal(latents, plain)


@pytest.mark.second
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_plan_before_the_feature(kind, feature):
    pipe, own = tiny.PIPELINES[kind](), FEATURES[feature]
    first, *others = DENSE.values()
    apply_plan(pipe, first)
    own.on(pipe)
    check_dense(pipe, kind, feature)
    for plan in others:  # each takes the place of the one before
        apply_plan(pipe, plan)
        check_dense(pipe, kind, feature)
    remove_plan(pipe)  # first on, first off
    check_alone(pipe, kind, feature)
    if own.off is not None:
        apply_plan(pipe, first)
        own.off(pipe)
        check_dense(pipe, kind, None)
        remove_plan(pipe)
        check_alone(pipe, kind, None)


@pytest.mark.second
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_plan_after_the_feature(kind, feature):
    pipe, own = tiny.PIPELINES[kind](), FEATURES[feature]
    first, second, *_ = DENSE.values()
    own.on(pipe)
    apply_plan(pipe, first)
    check_dense(pipe, kind, feature)
    remove_plan(pipe)  # last on, first off
    check_alone(pipe, kind, feature)
    apply_plan(pipe, second)
    if own.off is not None:
        own.off(pipe)
        check_dense(pipe, kind, None)
        own.on(pipe)
    check_dense(pipe, kind, feature)
    remove_plan(pipe)
    check_alone(pipe, kind, feature)


@pytest.mark.second
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_plan_in_either_order(kind, feature):
    pipe, own = tiny.PIPELINES[kind](), FEATURES[feature]
    apply_plan(pipe, VARIED)
    own.on(pipe)
    with counted(pipe) as counts:
        found = tiny.generate(pipe, steps=STEPS)
    assert [dense + sparse for dense, sparse in calls(pipe)] == counts
    assert sum(sparse for _, sparse in calls(pipe)) > 0
    expected, runs = alone(kind, feature, VARIED)
    assert torch.equal(found, expected) and counts == runs
    assert not torch.equal(found, alone(kind, feature)[0])
    if "offload" in feature:
        assert torch.equal(found, alone(kind, None, VARIED)[0])
    remove_plan(pipe)
    check_alone(pipe, kind, feature)
