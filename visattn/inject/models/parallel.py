"""Checks for models that are split over processes, by ``enable_parallelism`` or other means."""

from __future__ import annotations

from typing import Any

from visattn.runtime.private_names import cache_dit_parallel, parallel_settings

__all__ = ["check_dispatch", "check_whole"]


def check_dispatch(model: Any, role: str) -> None:
    """Raise an error if the attention of a model does not use the backends of diffusers.

    Raises:
        ValueError: the model has the context parallelism of cache-dit.
    """
    if cache_dit_parallel(model) is not None:
        raise ValueError(
            f"{role} has the context parallelism of cache-dit, whose attention takes no plan: use "
            "enable_parallelism of diffusers, or no plan"
        )


def check_whole(model: Any, role: str) -> None:
    """Raise an error if this process computes only a part of a model.

    Raises:
        ValueError: the tokens or the heads of the model are split over processes.
    """
    config = parallel_settings(model)
    if config is None:
        return
    by_tokens = getattr(config, "context_parallel_config", None) is not None
    name, part = ("context", "tokens") if by_tokens else ("tensor", "heads")
    raise ValueError(
        f"{role} runs under {name} parallelism (enable_parallelism), where each process has a part "
        f"of the {part}: its attention cannot be edited, guided or observed; load the "
        "pipeline without it"
    )
