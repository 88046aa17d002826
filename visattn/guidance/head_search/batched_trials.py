"""Generations with several sets of heads, as samples of one call of a pipeline."""

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
from visattn.runtime.private_names import progress_bar_settings, set_progress_bar_settings

__all__ = ["BatchedTrials", "HeadStrengths", "PerturbEach", "SoftPAGEach"]

HeadStrengths = Mapping[str, Mapping[int, float]]  # strength by head, by path of the layer


@dataclass(frozen=True, kw_only=True)
class PerturbEach(Perturb):
    """``Perturb`` with the strengths of each sample of a pass.

    Args:
        strengths: ``[samples, H]`` by the path of the layer.
    """

    strengths: Mapping[str, torch.Tensor]

    def place(self, paths: Sequence[str], heads: int) -> Where:
        return Where({path: each for path, each in self.strengths.items() if path in paths})


@dataclass(frozen=True, kw_only=True)
class SoftPAGEach(Guidance):
    """``SoftPAG`` with the heads of each sample of a batch.

    Args:
        strengths: as of PerturbEach.
        policy: as of SoftPAG.
        target: as of SoftPAG.
    """

    strengths: Mapping[str, torch.Tensor]
    policy: str = "all"
    target: str = "value"

    def edits(self) -> list[Edit | BlockEdit]:
        target, stream = target_and_stream(self.policy, self.target)
        return [PerturbEach(strengths=self.strengths, target=target, stream=stream)]


@dataclass(frozen=True)
class BatchedTrials:
    """Generates with several sets of heads in one call of a pipeline.

    Args:
        pipe: a diffusers pipeline.
        call: arguments of its call, without prompt and noise.
        num_heads: heads of each layer, by path.
        strength: of SoftPAG.
        scale: of SoftPAG.
        policy: of SoftPAG.
        target: of SoftPAG.
    """

    pipe: Any
    call: Mapping[str, Any]
    num_heads: Mapping[str, int]
    strength: float
    scale: float
    policy: str
    target: str

    def frames(self, sets: Sequence[HeadStrengths], prompt: str, seed: int) -> list[torch.Tensor]:
        """Generate a prompt with each set of heads perturbed.

        Args:
            sets: sets of heads.
            prompt: a text.
            seed: of the noise, which is the same for all sets.

        Returns:
            The frames of each set, float32 ``[T, H, W, 3]`` in [0, 1] on the CPU.

        Raises:
            ValueError: the pipeline does not return one sample for each set.
        """
        count = len(sets)
        noise = [torch.Generator("cpu").manual_seed(seed) for _ in sets]
        options = {**self.call, "prompt": [prompt] * count, "generator": noise}
        bars = progress_bar_settings(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        try:
            output = self._call(sets, {**options, "output_type": "pt"})
        finally:
            set_progress_bar_settings(self.pipe, bars)
        samples = getattr(output, "frames", None)
        if samples is None:
            samples = getattr(output, "images", None)
        if not isinstance(samples, torch.Tensor) or len(samples) != count:
            raise ValueError(
                f"{type(self.pipe).__name__} did not return {count} samples of frames or images "
                f"for {count} prompts; use batch=1"
            )
        videos = samples if samples.ndim == 5 else samples[:, None]  # [samples, T, C, H, W]
        return list(videos.permute(0, 1, 3, 4, 2).float().cpu().clamp(0, 1).contiguous())

    def _call(self, sets: Sequence[HeadStrengths], options: Mapping[str, Any]) -> Any:
        if not any(heads for heads_by_path in sets for heads in heads_by_path.values()):
            return self.pipe(**options)
        guidance = SoftPAGEach(
            strengths=self._strengths(sets),
            scale=self.scale,
            policy=self.policy,
            target=self.target,
        )
        with guide(self.pipe, guidance):
            return self.pipe(**options)

    def _strengths(self, sets: Sequence[HeadStrengths]) -> dict[str, torch.Tensor]:
        """Return strengths ``[samples, H]`` of the layers with a perturbed head in some sample."""
        strengths: dict[str, torch.Tensor] = {}
        for sample, heads_by_path in enumerate(sets):
            for path, heads in heads_by_path.items():
                if not heads:
                    continue
                rows = strengths.setdefault(path, torch.zeros(len(sets), self.num_heads[path]))
                for head, strength in heads.items():
                    rows[sample, head] = self.strength * strength
        return strengths
