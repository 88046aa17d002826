"""Guidance whose defaults are those of the authors' released code."""

from __future__ import annotations

from pathlib import Path

import torch

from trial_cases.case import Case

__all__ = ["CASES"]


def skip_guidance(folder: Path) -> str:
    from visattn.guidance import STG, SkipBlock

    assert STG(blocks=1).edits() == [SkipBlock(blocks=1, what="block")]
    return "stg skips whole blocks"


def perturbed_guidance(folder: Path) -> str:
    from support import tiny, tiny_images

    from visattn.guidance import PAG, SoftPAG, guide

    pipe, found = tiny_images.sd3(), []
    for own in (PAG(layers=1), SoftPAG({1: None}, policy="ii_identity")):
        with guide(pipe, own):
            found.append(tiny_images.generate(pipe))
    assert torch.equal(*found)
    wan = tiny.wan21()
    with guide(wan, PAG(layers=1)):  # without text tokens it is the identity
        tiny.generate(wan, steps=1)
    return "image rows of joint attention keep the text's logits and their own"


def clamped_blur(folder: Path) -> str:
    from visattn.guidance.edits.query_edits import blur_matrix

    rows = blur_matrix(8, 100.0, False)
    assert int((rows[0] > 0).sum()) == 5  # 9 taps that are reflected at the border
    return "a blur of sigma 100 has 9 taps on an axis of 8 tokens"


def pairs_of_segments(folder: Path) -> str:
    from support import tiny

    from visattn.guidance import generate_sequence

    pipe, sizes = tiny.wan21(), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    generate_sequence(
        pipe,
        ["a red square", "a blue square", "a red circle"],
        overlap=1,
        num_inference_steps=1,
        output_type="latent",
        max_sequence_length=10,
        share=None,
        **tiny.SHAPE,
    )
    assert set(sizes) == {4}, sizes
    return "three prompts are two pairs of segments in each call"


CASES = (
    Case("STG skips what its authors' pipelines skip", skip_guidance),
    Case("PAG perturbs joint attention as its published form does", perturbed_guidance),
    Case("SEG blurs with the kernel of its authors' code", clamped_blur),
    Case("a sequence of three prompts is denoised in pairs", pairs_of_segments),
)
