"""Whether a search can measure a pipeline: nothing else may change the output of its denoisers."""

from __future__ import annotations

from typing import Any

from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import handlers_of
from visattn.inject.hooks.running import Announced
from visattn.inject.models.denoisers import models_of
from visattn.inject.models.parallel import check_dispatch
from visattn.runtime.private_names import cache_settings, has_cache_dit, parallel_settings

__all__ = ["check_searchable"]


def check_searchable(pipe: Any) -> None:
    """Raise an error if something other than the denoisers changes the results of a pipeline, or if
    the denoisers are split over processes.

    Raises:
        ValueError: a denoiser has a cache, is edited or guided, or is parallel or sharded.
    """
    for role, model in models_of(pipe).items():
        denoiser: Any = model
        check_dispatch(denoiser, role)
        cache = cache_settings(denoiser)
        if cache is not None:
            raise ValueError(
                f"{role} of pipe has a cache, {type(cache).__name__}, with which a search would "
                f"judge reused outputs: call pipe.{role}.disable_cache() first, and enable the "
                "cache again after the search"
            )
        if has_cache_dit(denoiser) or has_cache_dit(type(pipe)):
            raise ValueError(
                f"{role} of pipe has a cache of cache-dit, with which a search would judge reused "
                "outputs: call cache_dit.disable_cache(pipe) first, and enable the cache again "
                "after the search"
            )
        if parallel_settings(denoiser) is not None:
            raise ValueError(
                f"{role} of pipe is parallel over processes; a search needs a whole denoiser in "
                "each: load the pipeline without enable_parallelism, and let torchrun start one "
                "process for each device"
            )
        if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
            raise ValueError(
                f"{role} of pipe is sharded over processes; a search needs a whole denoiser in "
                "each: load the pipeline without sharding, and let torchrun start one process for "
                "each device"
            )
        attachment = attached(model)
        edited = attachment is not None and attachment.editor is not None
        owners = (pipe, *model.modules())
        handlers = (handler for owner in owners for handler in handlers_of(owner))
        # a plan adds only handlers of the class Announced
        if edited or not all(isinstance(handler, Announced) for handler in handlers):
            raise ValueError(
                f"{role} of pipe is edited or guided, so a search would not measure the model "
                "alone: end the block of guide or steer first"
            )
