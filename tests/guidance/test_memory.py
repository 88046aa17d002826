"""Memory that grows as the tokens do: of whole denoisers, under a plan, and over several steps."""

from dataclasses import replace

import pytest
import torch
from support import tiny
from support.allocations import check_linear, joint_state
from support.edited import edited, tensors

import visattn
from visattn import Grid, TokenLayout
from visattn.guidance import RegionMask, ShuffleTokens, SkipBlock, SoftPAG, consistory
from visattn.guidance.edits.steer import apply_edits
from visattn.patterns import Diagonal

OF_DENOISERS = {
    "guided": SoftPAG({0: [0, 1]}, strength=0.5),
    "skipped block": SkipBlock(blocks=0),
    "shuffled tokens": ShuffleTokens(blocks=0, share=0.5),
}


@pytest.mark.parametrize("name", OF_DENOISERS)
def test_memory_of_a_denoiser_is_linear(name):
    """Of Wan with one block; a map of one of its four heads would be seen."""
    own, model = OF_DENOISERS[name], tiny.wan_transformer(0, layers=1)
    enter = visattn.guide if name == "guided" else visattn.steer

    def make(tokens):
        torch.manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(1, 4, tokens // 1024, 64, 64),  # 32 x 32 tokens a frame
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 8, 16),
        }

        def call():
            with torch.no_grad(), enter(model, own):
                model(**inputs)

        return call

    check_linear(make)


def test_memory_of_consistory_is_linear():
    """Of a step whose masks are from maps of the step before, and of that one."""
    edits = consistory([(2,), (1,)], attention="self")
    active = [(edit, torch.ones(1)) for edit in edits]

    def make(tokens):
        first, second = joint_state(tokens, samples=2), joint_state(tokens, samples=2)
        first.call = replace(first.call, step=0)

        def steps():
            apply_edits(first, active[:-1])  # which only read
            apply_edits(second, active)
            assert second.borrowed

        return steps

    check_linear(make)


def test_memory_under_a_plan_is_linear():
    def make(tokens):
        layout = TokenLayout(Grid(2, tokens // 128, 64), text_before=16)
        q, k, v = tensors(layout, dtype=torch.float32, heads=1, dim=64)
        edit = RegionMask(q_bits=1 + torch.arange(layout.length) % 3)
        return lambda: edited(edit, q, k, v, layout, Diagonal(128))

    check_linear(make)
