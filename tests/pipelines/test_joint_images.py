"""Plans on Flux and Stable Diffusion 3: the grid that their tokens are, and plans that reach their
joint attention, and nothing else, with the passes and steps that they name."""

import copy

import pytest
import torch
from support import tiny_images
from support.planned import traces
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn import Grid, TokenLayout
from visattn.guidance.edits.block_edits import block_paths
from visattn.inject import apply_plan, denoisers, remove_plan, sparse, summary
from visattn.inject.models.denoisers import attention_layers, known_denoisers
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.pipelines.flux import grids_of
from visattn.plan import Denoiser, Plan, Rule

HEADS = (Dense(), Neighborhood((1, 3, 3)), Diagonal(4), Diagonal(9))
OTHER = (Diagonal(2),) * 4
PLAN = Plan((Rule(HEADS, pass_="cond"), Rule(OTHER, pass_="uncond")), dense_steps=(1, 0))
LAYOUTS = {
    "flux": TokenLayout(Grid(1, 6, 4), text_before=tiny_images.TEXT),
    "sd3": TokenLayout(Grid(1, 6, 4), text_after=tiny_images.CLIP + tiny_images.TEXT),
}
PATHS = {
    "flux": [f"{kind}transformer_blocks.{n}" for kind in ("", "single_") for n in range(2)],
    "sd3": [f"transformer_blocks.{n}" for n in range(3)],
}
KINDS = tuple(tiny_images.IMAGES)
WIDE = {"height": 16, "width": 24}  # as many tokens


def pipeline(kind):
    return tiny_images.sd3(dual=(0, 1)) if kind == "sd3" else tiny_images.flux()


class Masked(TorchFunctionMode):
    """torch's attention with a mask per head and part of the batch, in float64."""

    def __init__(self, parts, layout):
        super().__init__()
        index = torch.arange(layout.length)
        self.mask = torch.stack(
            [torch.stack([p.allows(index[:, None], index, layout) for p in own]) for own in parts]
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = [*args, *((kwargs or {}).get(n) for n in ("query", "key", "value")[len(args) :])]
        q, k, v = (x.double() for x in given[:3])
        logits = q @ k.mT * q.shape[-1] ** -0.5
        mask = self.mask.repeat_interleave(len(q) // len(self.mask), 0)
        return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v).to(given[0].dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_blocks_are_those_of_the_model(kind):
    pipe = pipeline(kind)
    ((model, family),) = known_denoisers(pipe).values()
    assert [path for own in block_paths(model, family) for path in own] == PATHS[kind]
    assert list(attention_layers(model, family)) == [f"{path}.attn" for path in PATHS[kind]]
    name = type(model).__name__
    assert denoisers(pipe) == {"transformer": Denoiser(name, len(PATHS[kind]), 4)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_plan_reaches_the_calls_that_it_names_and_no_other(kind, batch):
    pipe = pipeline(kind)
    untouched = copy.deepcopy(pipe)
    dense = tiny_images.generate(pipe, num_images_per_prompt=batch)
    apply_plan(pipe, PLAN)
    record = []
    for path in PATHS[kind]:
        module = pipe.transformer.get_submodule(f"{path}.attn")
        module.register_forward_hook(
            lambda module, args, kwargs, out, path=path: record.append((path, args, kwargs, out)),
            with_kwargs=True,
        )
    found = tiny_images.generate(pipe, num_images_per_prompt=batch)
    assert not torch.allclose(found, dense, atol=1e-3)
    layers, calls = len(PATHS[kind]), 2 if kind == "flux" else 1
    assert len(record) == 3 * layers * calls
    for number, (path, args, kwargs, out) in enumerate(record):
        step, pass_ = number // (layers * calls), number // layers % calls
        parts = [OTHER, HEADS] if kind == "sd3" else [(HEADS, OTHER)[pass_]]
        module = untouched.transformer.get_submodule(f"{path}.attn")
        with torch.no_grad():
            plain = module(*args, **kwargs)
            with Masked(parts, LAYOUTS[kind]):
                masked = module(*args, **kwargs)
        own, same, other = (x if isinstance(x, tuple) else (x,) for x in (out, plain, masked))
        if step == 0:
            assert all(map(torch.equal, own, same))
        else:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    rows = {row.layer: row for row in summary(pipe).layers}
    assert all((row.sparse_calls, row.reason) == (2 * calls, None) for row in rows.values())
    assert summary(pipe).layout == str(LAYOUTS[kind])
    remove_plan(pipe)
    assert torch.equal(tiny_images.generate(pipe, num_images_per_prompt=batch), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_that_are_dense_change_no_bit_and_leave_no_trace(kind):
    pipe = pipeline(kind)
    dense, clean = tiny_images.generate(pipe), traces(pipe)
    dense_too = Plan(PLAN.rules, dense_steps=(1.0, 0)), Plan((Rule(Neighborhood((1, 1.0, 1.0))),))
    for plan in dense_too:
        with sparse(pipe, plan):
            assert torch.equal(tiny_images.generate(pipe), dense)
            assert all(row.sparse_calls == 0 for row in summary(pipe).layers)
        assert traces(pipe) == clean


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_off_and_the_share_of_attention(kind):
    pipe = pipeline(kind)
    with sparse(pipe, Plan((Rule(HEADS),))):
        every = tiny_images.generate(pipe, guidance=False)
        model = pipe.transformer
        linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        tokens = LAYOUTS[kind].length
        attention = 2 * tokens**2 * 64 * len(PATHS[kind])
        share = attention / (attention + tokens * sum(linear))
        assert summary(pipe).attention_share == pytest.approx(share)
    with sparse(pipe, Plan((Rule(HEADS, pass_="cond"),))):
        assert torch.equal(tiny_images.generate(pipe, guidance=False), every)
    with sparse(pipe, Plan((Rule(HEADS, pass_="uncond"),))):
        dense = tiny_images.generate(pipe, guidance=False)
    assert torch.equal(dense, tiny_images.generate(pipe, guidance=False))


def test_skip_layer_guidance_of_sd3_is_a_pass_of_its_own():
    """Its batch is not doubled, which two images would hide."""
    options = {
        "num_images_per_prompt": 2,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
        "steps": 4,
    }
    pipe, seen = tiny_images.sd3(), []
    apply_plan(pipe, Plan((Rule(HEADS, pass_="cond"), Rule(OTHER, pass_="uncond"))))
    own = pipe.transformer._visattn
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(own.passes(len(kwargs["hidden_states"]))),
        with_kwargs=True,
    )
    tiny_images.generate(pipe, **options)
    both, alone = ("uncond", "cond"), ("perturbed",)
    assert seen == [both, both, alone, both, alone, both, alone]


# ---- the grid of Flux


def positions(*grids, dtype=torch.float32):
    parts = []
    for number, (height, width) in enumerate(grids):
        h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(torch.stack([torch.full_like(h, number), h, w], 2).reshape(-1, 3))
    return torch.cat(parts).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(6, 4), (4, 6), (1, 9), (9, 1), (1, 1), (5, 300), (300, 5)])
def test_grid_is_read_from_the_positions(grid, dtype):
    ids = positions(grid, dtype=dtype)
    assert grids_of(ids, len(ids)) == (("grid", 1, *grid),)
    assert grids_of(ids[None], len(ids)) == (("grid", 1, *grid),)
    two = positions(grid, (3, 2), dtype=dtype)  # as of an image that Kontext is given
    assert grids_of(two, len(two)) == (("grid", 1, *grid), ("grid", 1, 3, 2))


def test_grid_that_is_none_is_refused():
    ids = positions((6, 4))
    with pytest.raises(ValueError, match=r"img_ids of shape \[24, 3\] must be \[25, 3\]"):
        grids_of(ids, 25)
    swapped = ids.clone()
    swapped[[3, 4]] = ids[[4, 3]]
    for wrong in (swapped, ids[:, [0, 2, 1]], ids[:23], ids.flip(0), ids * 2):
        with pytest.raises(ValueError, match="are not the positions of a grid row by row"):
            grids_of(wrong, len(wrong))
    pipe = tiny_images.flux()
    apply_plan(pipe, PLAN)
    with pytest.raises(ValueError, match="img_ids is missing"):
        pipe.transformer(torch.zeros(1, 24, 16), torch.zeros(1, 10, 32))


def test_grid_follows_the_image():
    """Two images of as many tokens; and positions that are overwritten."""
    pipe = tiny_images.flux()
    with sparse(pipe, PLAN):
        first, second = tiny_images.generate(pipe), tiny_images.generate(pipe, **WIDE)
        assert summary(pipe).layout == "text(10) + 1x4x6"
    fresh = tiny_images.flux()
    with sparse(fresh, PLAN):
        assert torch.equal(tiny_images.generate(fresh, **WIDE), second)
        assert torch.equal(tiny_images.generate(fresh), first)
        ids = positions((6, 4))
        inputs = {
            "hidden_states": torch.zeros(1, 24, 16),
            "encoder_hidden_states": torch.zeros(1, 10, 32),
            "pooled_projections": torch.zeros(1, 16),
            "timestep": torch.tensor([0.5]),
            "txt_ids": torch.zeros(10, 3),
            "img_ids": ids,
        }
        with torch.no_grad(), fresh.transformer.cache_context(
            "cond", step_index=0, num_inference_steps=2
        ):
            fresh.transformer(**inputs)
            assert summary(fresh).layout == "text(10) + 1x6x4"
            ids.copy_(positions((4, 6)))
            fresh.transformer(**inputs)
            assert summary(fresh).layout == "text(10) + 1x4x6"


def test_grid_follows_the_image_where_the_model_is_compiled_as_a_whole():
    torch._dynamo.reset()
    pipe, some = tiny_images.flux(), {"steps": 1, "guidance": False}
    with sparse(pipe, PLAN):
        first = tiny_images.generate(pipe, **some)
        second = tiny_images.generate(pipe, **some, **WIDE)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        assert (tiny_images.generate(pipe, **some) - first).abs().max() < 1e-5
        assert (tiny_images.generate(pipe, **some, **WIDE) - second).abs().max() < 1e-5
    torch._dynamo.reset()


def test_one_graph_of_the_whole_model_runs_its_plan():
    """At two sizes with as many tokens, which one graph has."""
    torch._dynamo.reset()
    pipe = tiny_images.flux()
    with sparse(pipe, PLAN):
        expected = [tiny_images.generate(pipe, **own) for own in ({}, WIDE)]
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        for own, other in zip(({}, WIDE), expected, strict=True):
            assert (tiny_images.generate(pipe, **own) - other).abs().max() < 1e-5
    torch._dynamo.reset()
