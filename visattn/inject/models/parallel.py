"""Models that are split over several processes, by ``enable_parallelism`` of diffusers or else."""

from __future__ import annotations

from typing import Any

from visattn.runtime.private_names import cache_dit_parallel, parallel_settings

__all__ = ["check_dispatch", "check_whole"]


def check_dispatch(model: Any, role: str) -> None:
    """Refuse a model whose attention goes by other backends than those of diffusers.

    Raises:
        ValueError: it has the context parallelism of cache-dit.
    """
    if cache_dit_parallel(model) is not None:
        raise ValueError(
            f"{role} has the context parallelism of cache-dit, whose attention takes no plan: use "
            "enable_parallelism of diffusers, or no plan"
        )


def check_whole(model: Any, role: str) -> None:
    """Refuse a model of which this process computes a part alone.

    Raises:
        ValueError: its tokens or its heads are split over processes.
    """
    config = parallel_settings(model)
    if config is None:
        return
    by_tokens = getattr(config, "context_parallel_config", None) is not None
    name, part = ("context", "tokens") if by_tokens else ("tensor", "heads")
    raise ValueError(
        f"{role} runs under {name} parallelism (enable_parallelism), where each process has a part "
        f"of the {part}: its attention cannot be edited, guided or observed; do that with a "
        "pipeline that is loaded without it"
    )
