"""The check of gradients at lengths that no reference can hold: some queries and some keys."""

from __future__ import annotations

import torch

from visattn.bench import WrongResult
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Pattern

__all__ = ["check_gradients"]

ROWS = 64  # queries whose dq, and keys whose dk and dv are checked


def check_gradients(
    grads: tuple[torch.Tensor, ...],
    qkv: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
) -> None:
    """Hold dq of some queries, dk and dv of some keys to ``3 max|eager - f64| + 2 ulp``, both from
    the output and LSE that were given, eager being the same products in the dtype of q.

    Args:
        grads, qkv: dq, dk, dv and q, k, v, ``[1, H, L, D]``; lse float32 ``[1, H, L]``.

    Raises:
        WrongResult: one is wrong.
    """
    device, scale = out.device, out.shape[3] ** -0.5
    places = torch.arange(layout.length)
    rows = torch.randperm(layout.length, generator=torch.Generator().manual_seed(1))[:ROWS]
    from_rows = pattern.allows(rows[:, None], places, layout).to(device)
    to_rows = pattern.allows(places[:, None], rows, layout).to(device)
    rows = rows.to(device)
    worst = {name: [0.0, 0.0, 0.0] for name in ("dq", "dk", "dv")}  # error, of eager, largest
    for head in range(out.shape[1]):
        own = [x[0, head] for x in (*qkv, grad_out)]
        delta = (out[0, head].double() * grad_out[0, head].double()).sum(1)
        sides = (lse[0, head].double(), delta)
        exact, eager = (
            _some(*(x.to(kind) for x in own), *sides, rows, from_rows, to_rows, scale)
            for kind in (torch.float64, out.dtype)
        )
        found = [x[0, head, rows].double() for x in grads]
        for name, x, plain, truth in zip(worst, found, eager, exact, strict=True):
            values = (x - truth, plain.double() - truth, truth)
            # a NaN stays
            worst[name] = torch.maximum(
                torch.tensor(worst[name], dtype=torch.float64),
                torch.stack([v.abs().max() for v in values]).cpu(),
            ).tolist()
    for name, (error, plain_error, largest) in worst.items():
        bound = 3 * plain_error + 2 * torch.finfo(out.dtype).eps * largest
        if not error <= bound:
            raise WrongResult(
                f"{name} of {pattern} at {layout} is off by {error:.2e} where {bound:.2e} is "
                "allowed; it is not timed"
            )


def _some(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    rows: torch.Tensor,
    from_rows: torch.Tensor,
    to_rows: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of ``rows``, of one head."""

    def parts(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grad_out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        kept: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p and ds of a tile, in the dtype of q."""
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q @ k.mT).to(wide) * scale
        p = (logits - lse.to(wide)[:, None]).exp().masked_fill(~kept, 0.0)
        ds = p * ((grad_out @ v.mT).to(wide) - delta.to(wide)[:, None])
        return p.to(q.dtype), ds.to(q.dtype)

    _, ds = parts(q[rows], k, v, grad_out[rows], lse[rows], delta[rows], from_rows)
    dq = (ds @ k) * scale
    p, ds = parts(q, k[rows], v[rows], grad_out, lse, delta, to_rows)
    return dq, (ds.mT @ q) * scale, p.mT @ grad_out
