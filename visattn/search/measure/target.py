"""The target of a search: a pipeline at a shape, its attention layers and its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from visattn.generation import Job, Result, run_job
from visattn.inject import remove_plan
from visattn.inject.models.denoisers import (
    attention_layers,
    denoisers,
    family_of,
    known_denoisers,
    models_of,
)
from visattn.inject.models.fingerprint import fingerprint
from visattn.inject.searchable import check_searchable
from visattn.search.measure.output_losses import Layer
from visattn.search.measure.output_projection import output_weights

__all__ = ["SearchTarget"]

CALL_KEYS = tuple(
    field.name for field in fields(Job) if field.name not in ("prompt", "seed", "fps", "guidance")
)


class SearchTarget:
    """A pipeline and the arguments of its calls.

    Args:
        pipe: a diffusers pipeline; a plan that it has is removed.
        call: fields of a Job, without prompt and seed.
        name: name of the model; None: the name in the pipeline's config, or its class.

    Raises:
        TypeError: ``pipe`` is a denoiser alone.
        ValueError: the pipeline is of no known family, has a cache, is edited or is parallel, or a
            field is unknown.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], name: str | None) -> None:
        for key in call:
            if key not in CALL_KEYS:
                known = ", ".join(CALL_KEYS)
                raise ValueError(f"call has the unknown key {key!r}; keys are {known}")
        if isinstance(pipe, torch.nn.Module):
            raise TypeError(
                f"pipe={type(pipe).__name__} is a denoiser alone; a search generates, so give the "
                "whole pipeline"
            )
        self.pipe, self.call = pipe, dict(call)
        self.denoisers = denoisers(pipe)
        self.paths: dict[Layer, str] = {}
        self.modules: dict[Layer, Any] = {}
        for role, (model, family) in known_denoisers(pipe).items():
            for number, (path, module) in enumerate(attention_layers(model, family).items()):
                self.paths[role, number], self.modules[role, number] = path, module
        check_searchable(pipe)
        remove_plan(pipe)
        read_config = getattr(getattr(pipe, "config", None), "get", lambda _: None)
        config_name = read_config("_name_or_path")
        if not (isinstance(config_name, str) and config_name):
            config_name = type(pipe).__name__
        self.name: str = name or config_name

    @property
    def device(self) -> torch.device:
        """The device of the denoisers."""
        return next(next(iter(models_of(self.pipe).values())).parameters()).device

    def heads(self, layer: Layer) -> int:
        """Return the number of query heads of a layer."""
        return int(self.modules[layer].heads)

    def weights(self, layer: Layer) -> torch.Tensor:
        """Return the output projection of a layer, float32 ``[out, H D]``."""
        role, _ = layer
        model = models_of(self.pipe)[role]
        family = family_of(model)
        assert family is not None
        block = model.get_submodule(self.paths[layer].rpartition(".")[0])
        name = family.fused_out_projection
        return output_weights(self.modules[layer], getattr(block, name, None) if name else None)

    def job(self, prompt: str, seed: int) -> Job:
        """Return the job of a generation."""
        return Job(prompt=prompt, seed=seed, **self.call)

    def generate(self, prompt: str, seed: int) -> Result:
        """Generate the frames of a prompt with the pipeline in its current state."""
        return run_job(self.pipe, self.job(prompt, seed))

    def fingerprint(self) -> str:
        """Return a hash of the pipeline."""
        return fingerprint(self.pipe)
