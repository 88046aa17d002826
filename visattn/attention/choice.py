"""The table of backends, and the choice of one for a call.

To add a backend, write one file in ``backends/`` and add one row to ``IMPLEMENTATIONS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from visattn.attention.backends.blockwise import blockwise_attention, blockwise_backward
from visattn.attention.backends.reference import reference_attention
from visattn.attention.backends.triton_kernels import (
    differentiable_triton_attention,
    triton_backward,
    why_no_kernel,
    why_unavailable,
)
from visattn.attention.spec import AttentionSpec, Choice
from visattn.patterns import HeadPattern
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend

__all__ = [
    "BACKENDS",
    "IMPLEMENTATIONS",
    "Backend",
    "BackendUnavailable",
    "Implementation",
    "check_kernels",
    "choose_backend",
    "resolve",
]

# Rows of IMPLEMENTATIONS, for type checkers; a test compares the two.
Backend = Literal["auto", "triton", "blockwise", "reference"]

Forward: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec],
    tuple[torch.Tensor, torch.Tensor | None],
]


class BackendUnavailable(RuntimeError):
    """The backend that the caller named cannot run; the message says why and what to use instead.

    Example:
        >>> import torch
        >>> from visattn.attention import BackendUnavailable, choose_backend
        >>> q = torch.randn(1, 8, 64, 32, dtype=torch.float64)
        >>> try:
        ...     choose_backend("triton", q)
        ... except BackendUnavailable as error:
        ...     print("use backend='blockwise'" in str(error))
        True
    """


@dataclass(frozen=True)
class Implementation:
    """One row of the table: a backend and what it can do.

    Attributes:
        name: what callers pass as ``backend``.
        automatic: whether ``"auto"`` may choose it for tensors on a device; rows are tried in the
            order of the table.
        reason: why ``"auto"`` chose it, with ``{device}``.
        why_unavailable: why it cannot run on a tensor like ``q``; None where it can.
        why_no_kernel: why it cannot compute a pattern; None where it can.
        forward: output and LSE of heads with static patterns, from q, k, v and a resolved spec;
            differentiable.
        backward: gradients of q, k, v, from ``q, k, v, out, lse, grad_out, grad_lse, spec``.
        attend: output and LSE of heads that share a selection of blocks, in plain torch.
        uses_kernels: whether dynamic patterns choose blocks and attend by the Triton kernels.
    """

    name: str
    automatic: Callable[[torch.device], bool]
    reason: str
    why_unavailable: Callable[[torch.Tensor], str | None]
    why_no_kernel: Callable[[HeadPattern], str | None]
    forward: Forward
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    uses_kernels: bool = False


def _nothing_against(_: object) -> None:
    """Return None: a backend in plain torch runs on every device and computes every pattern."""


IMPLEMENTATIONS: dict[str, Implementation] = {
    row.name: row
    for row in (
        Implementation(
            name="triton",
            automatic=lambda device: device.type == "cuda",
            reason="{device} runs Triton",
            why_unavailable=why_unavailable,
            why_no_kernel=why_no_kernel,
            forward=differentiable_triton_attention,
            backward=triton_backward,
            attend=attend,
            uses_kernels=True,
        ),
        Implementation(
            name="blockwise",
            automatic=lambda device: True,
            reason="plain torch runs on device type {device.type}",
            why_unavailable=_nothing_against,
            why_no_kernel=_nothing_against,
            forward=blockwise_attention,
            backward=blockwise_backward,
            attend=attend,
        ),
        Implementation(
            name="reference",
            automatic=lambda device: False,
            reason="it is the oracle",
            why_unavailable=_nothing_against,
            why_no_kernel=_nothing_against,
            forward=reference_attention,
            backward=blockwise_backward,
            attend=reference_attend,
        ),
    )
}
BACKENDS = ("auto", *IMPLEMENTATIONS)


def choose_backend(backend: str, q: torch.Tensor) -> Choice:
    """Choose the backend for tensors like ``q``; only ``"auto"`` leaves a choice.

    Args:
        backend: one of ``BACKENDS``.
        q: queries ``[B, H, L, D]``; the device, the dtype and ``D`` decide.

    Returns:
        The name of the backend and the reason.

    Raises:
        ValueError: ``backend`` is unknown.
        BackendUnavailable: the caller named a backend that cannot run.

    Example:
        >>> import torch
        >>> from visattn.attention import choose_backend
        >>> choose_backend("reference", torch.randn(1, 8, 64, 32)).backend
        'reference'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        obstacle = IMPLEMENTATIONS[backend].why_unavailable(q)
        if obstacle is not None:
            raise BackendUnavailable(
                f"backend={backend!r} cannot run: {obstacle}; use backend='blockwise'"
            )
        return Choice(backend, "asked for")
    obstacles: list[str] = []
    for row in IMPLEMENTATIONS.values():
        if not row.automatic(q.device):
            continue
        obstacle = row.why_unavailable(q)
        if obstacle is None:
            reason = "; ".join(obstacles) or row.reason.format(device=q.device)
            return Choice(row.name, reason)
        obstacles.append(f"not {row.name}: {obstacle}")
    raise AssertionError("blockwise runs everywhere")


def resolve(spec: AttentionSpec, q: torch.Tensor) -> AttentionSpec:
    """Return a spec with the backend chosen for tensors like ``q``; a resolved spec is returned as
    it is.

    Raises:
        ValueError, BackendUnavailable: as ``choose_backend``.
    """
    if spec.choice is not None:
        return spec
    return replace(spec, choice=choose_backend(spec.backend, q))


def check_kernels(backend: str, patterns: Iterable[HeadPattern]) -> None:
    """Refuse a backend that the caller named and that cannot compute one of the patterns.

    Raises:
        BackendUnavailable: the backend has no kernel for a pattern.
    """
    if backend == "auto":
        return
    for pattern in patterns:
        obstacle = IMPLEMENTATIONS[backend].why_no_kernel(pattern)
        if obstacle is not None:
            raise BackendUnavailable(
                f"backend={backend!r} {obstacle}; use backend='blockwise' or 'auto'"
            )
