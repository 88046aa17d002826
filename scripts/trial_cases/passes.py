"""Steps, passes and counts of calls on pipelines of every kind, and plans that do nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, tiny_images, variants

import visattn
from trial_cases.case import Case
from visattn import Grid, TokenLayout, patterns
from visattn.inject import apply_plan, observe, sparse, summary
from visattn.plan import Plan, Rule
from visattn.plan.plan_file import SCHEMA

PASSED = Plan((Rule(patterns.Diagonal(2), pass_="cond"),), dense_steps=(1, 0))


def _seen(pipe: Any, generate: Any, layer: int = 0) -> list[tuple[str, ...] | None]:
    found: list[tuple[str, ...] | None] = []
    with observe(pipe, lambda call: found.append(call.passes) if call.number == layer else None):
        generate()
    return found


def _pag(_: Path) -> str:
    pipe = variants.sd3_pag()
    options: dict[str, Any] = {"num_images_per_prompt": 2, "steps": 1}
    whole = _seen(pipe, lambda: tiny_images.generate(pipe, **options))
    assert whole == [("uncond", "cond", "perturbed")], whole
    return "a batch of six is uncond, cond and perturbed, two each"


def _cutoff(_: Path) -> str:
    def end(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 0:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                tensors[name] = tensors[name].chunk(2)[1]
        return tensors

    pipe = tiny_images.sd3()
    options: dict[str, Any] = {
        "prompt": ["a red square", "blue circle"],
        "negative_prompt": ["a", "blue"],
        "callback_on_step_end": end,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    found = _seen(pipe, lambda: tiny_images.generate(pipe, **options))
    assert found == [("uncond", "cond"), ("cond",), ("cond",)], found
    return "after guidance has ended, all of the batch is cond"


def _silent(name: str, steps: int) -> Any:
    def run(_: Path) -> str:
        pipe = variants.PIPELINES[name]()
        apply_plan(pipe, PASSED, guard=False)
        variants.generate(name, pipe, False)
        row = summary(pipe).layers[0]
        assert (row.sparse_calls, row.reason) == (steps, None), row
        return f"{type(pipe).__name__}: {steps} sparse calls a layer"

    return run


def _adapter(_: Path) -> str:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    pipe = tiny_images.sd3()
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(64, 8, 16, 16))
    apply_plan(pipe, patterns.Diagonal(2), guard=False)
    given = {"ip_hidden_states": torch.ones(2, 4, 8), "temb": torch.ones(2, 16)}
    tiny_images.generate(pipe, joint_attention_kwargs=given)
    found = {(row.sparse_calls, row.dense_calls, row.reason) for row in summary(pipe).layers}
    assert found == {(3, 0, None)}, found
    return "3 sparse calls a layer, none dense"


def _large_plan(_: Path) -> str:
    phases = [n / 100 for n in range(1, 99)]
    value = {"schema": SCHEMA, "phases": phases, "patterns": ["Diagonal(width=2)"]}
    for key, own in (("rules", [{"pattern": 0}] * 100_000), ("evidence", {"a": [[]] * 5_000_000})):
        with pytest.raises(ValueError, match="allowed"):
            Plan.from_json(json.dumps({**value, key: own}))
    plan = Plan.from_json(json.dumps({**value, "rules": [{"pattern": 0}] * 65_000}))
    apply_plan(tiny_images.sd3(), plan, guard=False)
    return "100,000 rules and 20 MB of empty lists are refused; 65,000 rules, 99 phases are applied"


def _nothing_sparse(_: Path) -> str:
    """A preset of a model of 50 steps, with a LoRA that takes 4."""
    from visattn.generation import Job, run_job

    pipe = tiny.wan21()
    size = {"height": 96, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    plan = Plan((Rule(patterns.Radial(decay=0.2)),), dense_steps=(12, 0))
    with sparse(pipe, plan):
        notes = run_job(pipe, Job(prompt="a red square", **size)).notes
    said = [note for note in notes if "nothing sparse runs" in note]
    assert len(said) == 1, notes
    return said[0]


def _another_size(_: Path) -> str:
    pipe = tiny.wan21()
    plan = Plan((Rule(patterns.Neighborhood((9, 3, 3))),), geometry=TokenLayout(Grid(9, 16, 16)))
    apply_plan(pipe, plan)
    with pytest.raises(ValueError, match=r"made at 9x16x16.*visattn search") as caught:
        tiny.generate(pipe, steps=1)
    return str(caught.value)


def _speed_in_quotes(_: Path) -> str:
    with pytest.raises(TypeError, match=r"target_speedup='1\.3' must be a number") as caught:
        visattn.search(tiny.wan21(), ["a"], target_speedup="1.3")
    return str(caught.value)


CASES = (
    Case("a plan under which nothing is sparse", _nothing_sparse),
    Case("a plan of another size", _another_size),
    Case("a search for a speed that is a text", _speed_in_quotes),
    Case("a plan of many rules or values", _large_plan),
    Case("SD3 with an IP-Adapter", _adapter),
    Case("passes of SD3 PAG with several images", _pag),
    Case("guidance that ends within a run", _cutoff),
    *(
        Case(f"plan by step and pass on {name}", _silent(name, 2 if name in variants.FIRST else 3))
        for name in ("flux img2img", "flux fill", "wan v2v", "skyreels i2v")
    ),
)
