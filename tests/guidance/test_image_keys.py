"""Wan from an image has cross-attention to the image too: edits are for text alone."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from support import tiny

import visattn
from visattn.guidance import ScaleTokens
from visattn.guidance.edits.edit import Edit

TEXT, IMAGE = 512, 5  # diffusers' processor counts on 512 text tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Spy(Edit):
    seen: list = field(default_factory=list)
    stage: ClassVar[str] = "read"

    def apply(self, state, strength):
        self.seen.append(state.k.shape[2])


def test_cross_attention_to_the_image_is_not_edited():
    torch.manual_seed(0)
    own = tiny.wan_transformer(1).config
    config = {key: value for key, value in own.items() if not key.startswith("_")}
    model = WanTransformer3DModel(**{**config, "image_dim": 16, "added_kv_proj_dim": 64}).eval()
    given = {
        "hidden_states": torch.randn(1, 4, 3, 12, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "encoder_hidden_states_image": torch.randn(1, IMAGE, 16),
        "return_dict": False,
    }
    spy = Spy(attention="cross")
    with torch.no_grad():
        (plain,) = model(**given)
        with visattn.steer(model, spy):
            assert torch.equal(model(**given)[0], plain)
        with visattn.steer(model, ScaleTokens(tokens=(300,), scale=50.0, attention="cross")):
            assert not torch.equal(model(**given)[0], plain)
    assert spy.seen == [TEXT] * tiny.LAYERS
