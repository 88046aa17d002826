"""Models that ``enable_parallelism`` of diffusers has split over several processes."""

from __future__ import annotations

from typing import Any

__all__ = ["check_whole"]


def check_whole(model: Any, role: str) -> None:
    """Refuse a model of which this process computes a part alone.

    Raises:
        ValueError: its tokens or its heads are split over processes.
    """
    config = getattr(model, "_parallel_config", None)
    if config is None:
        return
    by_tokens = getattr(config, "context_parallel_config", None) is not None
    name, part = ("context", "tokens") if by_tokens else ("tensor", "heads")
    raise ValueError(
        f"{role} runs under {name} parallelism (enable_parallelism), where each process has a part "
        f"of the {part}: its attention cannot be edited, guided or observed; do that with a "
        "pipeline that is loaded without it"
    )
