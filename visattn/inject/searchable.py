"""Whether a pipeline computes by itself what a search is to judge."""

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
    """Refuse a pipeline whose results are not those of its denoisers alone, or whose denoisers are
    spread over processes.

    Raises:
        ValueError: a denoiser has a cache, is edited or guided, or is parallel or sharded.
    """
    for role, model in models_of(pipe).items():
        own: Any = model
        check_dispatch(own, role)
        cache = cache_settings(own)
        if cache is not None:
            raise ValueError(
                f"{role} of pipe has a cache, {type(cache).__name__}, with which a search would "
                f"judge reused outputs: call pipe.{role}.disable_cache() first, and enable the "
                "cache again after the search"
            )
        if has_cache_dit(own) or has_cache_dit(type(pipe)):
            raise ValueError(
                f"{role} of pipe has a cache of cache-dit, with which a search would judge reused "
                "outputs: call cache_dit.disable_cache(pipe) first, and enable the cache again "
                "after the search"
            )
        if parallel_settings(own) is not None:
            raise ValueError(
                f"{role} of pipe is parallel over processes; a search needs a whole one: load the "
                "pipeline without enable_parallelism, and let torchrun start one for each device"
            )
        if any(type(one).__name__ == "DTensor" for one in own.parameters()):
            raise ValueError(
                f"{role} of pipe is sharded over processes; a search needs a whole one: load the "
                "pipeline without sharding, and let torchrun start one for each device"
            )
        attachment = attached(model)
        edited = attachment is not None and attachment.editor is not None
        handlers = (one for part in (pipe, *model.modules()) for one in handlers_of(part))
        if edited or not all(isinstance(one, Announced) for one in handlers):  # those of a plan
            raise ValueError(
                f"{role} of pipe is edited or guided, which a search would take for the model: end "
                "the block of guide or steer first"
            )
