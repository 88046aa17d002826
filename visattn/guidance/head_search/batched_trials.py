"""Generations with several sets of heads as the samples of one call of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit, Where
from visattn.guidance.edits.pag import Perturb
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.guiders.guide import guide
from visattn.guidance.guiders.soft_pag import target_and_stream

__all__ = ["Generating", "PerturbEach", "Sets", "SoftPAGEach"]

Sets = Sequence[Mapping[str, Mapping[int, float]]]  # strength by head, by layer


@dataclass(frozen=True, kw_only=True)
class PerturbEach(Perturb):
    """``Perturb`` with strengths of each sample of a pass.

    Args:
        strengths: ``[samples, H]`` by the path of the layer.
    """

    strengths: Mapping[str, torch.Tensor]

    def place(self, paths: Sequence[str], heads: int) -> Where:
        return Where({path: own for path, own in self.strengths.items() if path in paths})


@dataclass(frozen=True, kw_only=True)
class SoftPAGEach(Guidance):
    """``SoftPAG`` with heads of each sample of a batch.

    Args:
        strengths: as of PerturbEach; policy, target: as of SoftPAG.
    """

    strengths: Mapping[str, torch.Tensor]
    policy: str = "all"
    target: str = "value"

    def edits(self) -> list[Edit | BlockEdit]:
        target, stream = target_and_stream(self.policy, self.target)
        return [PerturbEach(strengths=self.strengths, target=target, stream=stream)]


@dataclass(frozen=True)
class Generating:
    """A pipeline and how it is guided.

    Args:
        pipe: a diffusers pipeline; call: arguments of its call besides prompt and noise.
        heads: how many a layer has, by its path.
        strength, scale, policy, target: of SoftPAG.
    """

    pipe: Any
    call: Mapping[str, Any]
    heads: Mapping[str, int]
    strength: float
    scale: float
    policy: str
    target: str

    def frames(self, sets: Sets, prompt: str, seed: int) -> list[torch.Tensor]:
        """Frames of a prompt with each of some sets of heads perturbed, all from the noise of one
        seed: float32 ``[T, H, W, 3]`` in [0, 1] on the CPU."""
        count = len(sets)
        noise = [torch.Generator("cpu").manual_seed(seed) for _ in sets]
        options = {**self.call, "prompt": [prompt] * count, "generator": noise}
        bars = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(disable=True)
        try:
            output = self._call(sets, {**options, "output_type": "pt"})
        finally:
            self.pipe._progress_bar_config = bars if bars is not None else {}
        found = getattr(output, "frames", None)
        if found is None:
            found = getattr(output, "images", None)
        if not isinstance(found, torch.Tensor) or len(found) != count:
            raise ValueError(
                f"{type(self.pipe).__name__} made no {count} samples of frames or images of a call "
                f"with {count} prompts; take batch=1"
            )
        each = found if found.ndim == 5 else found[:, None]  # [samples, T, C, H, W]
        return list(each.permute(0, 1, 3, 4, 2).float().cpu().clamp(0, 1).contiguous())

    def _call(self, sets: Sets, options: Mapping[str, Any]) -> Any:
        if not any(heads for own in sets for heads in own.values()):
            return self.pipe(**options)
        guidance = SoftPAGEach(
            strengths=self._strengths(sets),
            scale=self.scale,
            policy=self.policy,
            target=self.target,
        )
        with guide(self.pipe, guidance):
            return self.pipe(**options)

    def _strengths(self, sets: Sets) -> dict[str, torch.Tensor]:
        """``[samples, H]`` by the layers that have a perturbed head in some sample."""
        out: dict[str, torch.Tensor] = {}
        for number, own in enumerate(sets):
            for path, heads in own.items():
                if not heads:
                    continue
                rows = out.setdefault(path, torch.zeros(len(sets), self.heads[path]))
                for head, strength in heads.items():
                    rows[number, head] = self.strength * strength
        return out
