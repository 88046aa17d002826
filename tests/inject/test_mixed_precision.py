"""Pipelines with plans and edits under what a caller sets for all of torch."""

import gc

import pytest
import torch
from support import tiny
from support.caches import clear_functions, live_tensors
from support.planned import PLAN

import visattn
from visattn.guidance import (
    PLADIS,
    BlurQueries,
    EnhanceVideo,
    LabelBias,
    Perturb,
    ProportionalAttention,
    ReplaceQueries,
    ScaleHeads,
    ScaleTokens,
    ShareKV,
    Temperature,
)
from visattn.inject import apply_plan, observe, summary
from visattn.inject.attachment import attached
from visattn.inject.layers.call import Call
from visattn.inject.layers.compiled_layer import layer_attention
from visattn.patterns import Diagonal, parse_pattern
from visattn.plan import Plan, Rule

AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)
TOKENS = (("text", 5), ("grid", 2, 4, 3))
DYNAMIC = parse_pattern("top_blocks(0.4, block=4, rest='pooled')")
JOINT = (
    *(BlurQueries(sigma=0.7), EnhanceVideo(weight=2.0), Temperature(temperature=1.7)),
    *(Perturb(target=target) for target in ("value", "mean_query", "self_and_text")),
    *(Perturb(target="self_for_image"), ScaleHeads(scale=1.5)),
    *(ReplaceQueries(source=0), ShareKV(source=0), ProportionalAttention(trained=9)),
    ScaleTokens(tokens=(1, 2), scale=2.0, attention="self"),
    ScaleTokens(tokens=(1,), scale=2.0, renormalise=True, attention="self"),
    LabelBias(
        table=torch.tensor([[0.0, 0.7], [0.3, 0.1]]),
        q_labels=lambda state: torch.arange(state.q.shape[2]) % 2,
        k_labels=lambda state: torch.arange(state.k.shape[2]) % 2,
    ),
)
CROSS = (
    *(PLADIS(), Perturb(target="mean", attention="cross")),
    ScaleTokens(tokens=(1,), scale=2.0, renormalise=True, attention="cross"),
)


def call_of(queries, keys, dtype=torch.bfloat16):
    """q, k, v of one layer of the tiny models, whose values bfloat16 has."""
    random = torch.Generator("cpu").manual_seed(0)
    shapes = [(2, tiny.HEADS, n, tiny.DIM) for n in (queries, keys, keys)]
    return [
        (2 * torch.randn(s, generator=random, device="cpu")).bfloat16().to(dtype) for s in shapes
    ]


def attended(model, cross, dtype):
    """What the first layer that is watched makes of a call."""
    attachment = attached(model)
    attachment.call.tokens = TOKENS[1:] if cross else TOKENS
    layer = next(own for own in attachment.layers if own.cross == cross)
    lengths = (24, 7) if cross else (29, 29)
    call = Call(None, 0.0, False, None, False, heads_first=layer.through_sdpa)
    given = [x if call.heads_first else x.transpose(1, 2) for x in call_of(*lengths, dtype)]
    with torch.no_grad():
        return layer.attend(*given, call)


@pytest.mark.second
@pytest.mark.parametrize("kind", ["joint", "cross"])
def test_edits_whatever_is_set_for_torch(kind):
    cross = kind == "cross"
    model = tiny.PIPELINES["wan21" if cross else "cogvideox"]().transformer.bfloat16()
    static, dynamic = (Plan((Rule(pattern),)) for pattern in (Diagonal(3), DYNAMIC))
    clear_functions()
    gc.collect()
    before = {id(x) for x in live_tensors() if x.is_inference()}
    for plan in (None,) if cross else (None, static, dynamic):
        if plan is not None:
            apply_plan(model, plan)
        for edit in CROSS if cross else JOINT:
            with visattn.steer(model, [edit]):
                if plan is not dynamic:  # whose choices a layer remembers
                    with torch.inference_mode():
                        attended(model, cross, torch.bfloat16)
                with torch.device("meta"):
                    found = [attended(model, cross, torch.bfloat16)]
                expected = attended(model, cross, torch.bfloat16)
                with AUTOCAST:
                    found += [attended(model, cross, t) for t in (torch.bfloat16, torch.float32)]
            for own in found:
                assert own.dtype == torch.bfloat16 and torch.equal(own, expected), (edit, plan)
    kept = [list(x.shape) for x in live_tensors() if x.is_inference() and id(x) not in before]
    assert kept == []


def test_observers_and_plans_see_what_attention_is_given():
    """HunyuanVideo's rotary embedding makes queries and keys float32 beside bfloat16 values."""
    pipe = tiny.hunyuanvideo()
    seen = []

    def look(observation):
        dtypes = {x.dtype for x in (observation.q, observation.k, observation.v)}
        seen.append((dtypes, torch.is_autocast_enabled("cpu")))

    apply_plan(pipe, Plan((Rule((Diagonal(2), *[DYNAMIC] * (tiny.HEADS - 1))),)))
    with observe(pipe, look), AUTOCAST:
        latents = tiny.generate(pipe, steps=2)
        rows = summary(pipe).layers
    assert seen and all(own == ({torch.bfloat16}, False) for own in seen)
    assert all(row.sparse_calls and row.reason is None for row in rows)
    assert bool(torch.isfinite(latents).all())


def test_compiled_layers_are_cast():
    model = tiny.PIPELINES["cogvideox"]().transformer
    apply_plan(model, Plan((Rule(Diagonal(3)),)))
    expected = attended(model, False, torch.bfloat16)
    layer = attached(model).layers[0]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, k, v):
        return layer_attention(layer, q, k, v, Call(None, 0.0, False, None, False, True))

    q, k, v = call_of(29, 29)
    with torch.no_grad(), AUTOCAST:
        found = run(q.float(), k.float(), v)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_training_after_validation_in_inference_mode():
    torch.manual_seed(1)
    batch = {
        "hidden_states": torch.randn(2, 4, 3, 12, 8),
        "timestep": torch.tensor([500, 100]),
        "encoder_hidden_states": torch.randn(2, 10, 16),
    }
    for plan in (PLAN, Plan((Rule((Diagonal(2), *[DYNAMIC] * (tiny.HEADS - 1))),))):
        slopes = []
        for before in (False, True):
            model = tiny.wan21().transformer.train()
            apply_plan(model, plan)
            if before:
                with torch.inference_mode():
                    model(**batch)
            loss = model(**batch, return_dict=False)[0].square().mean()
            slopes.append(torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True))
        for own, other in zip(*slopes, strict=True):
            assert (own is None) == (other is None)
            assert own is None or torch.equal(own, other)
