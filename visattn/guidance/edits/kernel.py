"""The kernel stage of an edited attention call: attention with the biases, gains and borrowed keys
that the earlier stages asked for."""

from __future__ import annotations

import torch

from visattn.attention import merge_attention
from visattn.attention.dense_attention import dense_with_lse
from visattn.guidance.edits.bias import biased, keyless_rows
from visattn.guidance.edits.state import State, Stream

__all__ = ["attend", "logit_tensors"]


def attend(
    state: State, needs_lse: bool, again: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention of a call with the changes of the stages before the kernel.

    Args:
        state: the call.
        needs_lse: whether to return the log-sum-exp.
        again: whether this is an additional computation for the same call. Dynamic patterns then
            choose for it alone and remember nothing.

    Returns:
        The output ``[b, H, Lq, D]``, and the log-sum-exp ``[b, H, Lq]`` or None.
    """
    needs = needs_lse or bool(state.borrowed)
    # the log-sum-exp of heads that a plan skips is -inf, which marks them
    needs = needs or (state.call.sparse and not _same_gains(state))
    out, lse = _without_borrowed(state, needs, again)
    if state.call.kind != "cross":
        _text_rows(state, out, lse)
    for borrowed in state.borrowed:
        samples = borrowed.samples
        other, other_lse = dense_with_lse(
            state.q[samples], borrowed.k, borrowed.v, state.call.factor
        )
        assert lse is not None
        bias = borrowed.strength.to(other_lse).log().reshape(1, -1, 1)
        merged, total = merge_attention([out[samples], other], [lse[samples], other_lse + bias])
        on = borrowed.strength.to(out.device)[None, :, None] > 0
        on = on & (lse[samples] > -torch.inf)
        out[samples] = torch.where(on[..., None], merged, out[samples])
        lse[samples] = torch.where(on, total, lse[samples])
    return out, lse


def logit_tensors(
    state: State, rows: slice | torch.Tensor, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys whose products are the logits of some rows, biases included.

    Args:
        state: the call.
        rows: the query rows.
        stream: the stream whose gains apply to the rows.

    Returns:
        Queries of the rows and all keys, ``[b, H, L, D']``; their products times
        ``state.call.factor`` are the logits.
    """
    q, k = state.q[:, :, rows], _gained_keys(state, stream)
    if state.biases:
        biases = [bias.rows(rows) for bias in state.biases]
        q, k, _ = biased(q, k, k, biases, state.call.factor)
    return q, k


def _without_borrowed(
    state: State, needs_lse: bool, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention to the keys of the call itself, without borrowed keys."""
    call, keys = state.call, _gained_keys(state, "image")
    if not state.biases:
        return call.kernel(state.part, state.q, keys, state.v, None, needs_lse, again)
    q, k, v = biased(state.q, keys, state.v, state.biases, call.factor)
    out, lse = call.kernel(state.part, q, k, v, None, needs_lse or call.sparse, again)
    out = out[..., : state.v.shape[3]]
    if call.sparse:
        assert lse is not None
        keyless = (lse < -1e4) & (lse > -torch.inf)  # -inf: the plan keeps no key, the row stays 0
    else:
        keyless = keyless_rows(state.biases, state.q)
    return _with_own_token(state, out, lse, keyless)


def _gained_keys(state: State, stream: Stream) -> torch.Tensor:
    """Return the keys multiplied by the gains that apply to the rows of a stream."""
    gains = [gain for gain in state.gains if gain[0] in ("all", stream)]
    if not gains:
        return state.k
    k = state.k.clone()
    for _, first, end, factor in gains:
        k[:, :, first:end] *= factor.to(k)[..., None, None]
    return k


def _same_gains(state: State) -> bool:
    """Return whether the rows of text and image have the same gains."""
    return all(stream == "all" for stream, *_ in state.gains)


def _text_rows(state: State, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Recompute the text rows densely if their gains differ from those of the image rows. Writes
    to ``out`` and ``lse``."""
    if _same_gains(state):
        return
    keys = _gained_keys(state, "text")
    for rows in state.rows("text"):
        q, k, v = state.q[:, :, rows], keys, state.v
        keyless = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
        if state.biases:
            biases = [bias.rows(rows) for bias in state.biases]
            keyless = keyless_rows(biases, q)  # already replaced by _with_own_token
            q, k, v = biased(q, k, v, biases, state.call.factor)
        if lse is not None:
            keyless = keyless | (lse[:, :, rows] == -torch.inf)
        text_out, text_lse = dense_with_lse(q, k, v, state.call.factor)
        text_out = text_out[..., : state.v.shape[3]]
        out[:, :, rows] = torch.where(keyless[..., None], out[:, :, rows], text_out)
        if lse is not None:
            lse[:, :, rows] = torch.where(keyless, lse[:, :, rows], text_lse)


def _with_own_token(
    state: State, out: torch.Tensor, lse: torch.Tensor | None, keyless: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Recompute rows without any key, so that they see their own token and the text keys that the
    biases allow.

    Args:
        state: the call.
        out: the output ``[b, H, Lq, D]``.
        lse: the log-sum-exp ``[b, H, Lq]``, or None.
        keyless: whether a row sees no key, bool ``[b, H, Lq]``.

    Returns:
        Copies of ``out`` and ``lse`` with the recomputed rows.
    """
    if not bool(keyless.any()):
        return out, lse
    call = state.call
    b, h, i = keyless.nonzero(as_tuple=True)
    acc_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    q = state.q[b, h, i].to(acc_dtype)
    columns = [] if call.kind == "cross" else [i]
    columns += [torch.full_like(i, j) for first, end in state.texts for j in range(first, end)]
    keys = torch.stack(columns, 1)  # [n, keys]
    k, v = (x[b[:, None], h[:, None], keys] for x in (state.k, state.v))
    logits = (q[:, None] * k.to(acc_dtype)).sum(2) * call.factor
    for bias in state.biases:
        table = bias.table.to(logits)
        q_label = bias.q_labels.to(b.device).expand(out.shape[0], -1)[b, i]
        k_label = bias.k_labels.to(b.device).expand(out.shape[0], -1)[b[:, None], keys]
        added = table[q_label[:, None], k_label]
        added = torch.where(bias.heads.to(b.device)[h][:, None], added, 0.0)
        added[:, : 0 if call.kind == "cross" else 1] = 0
        logits = logits + added
    total = logits.logsumexp(1)
    weights = (logits - total[:, None]).nan_to_num(-torch.inf).exp()
    out = out.clone()
    out[b, h, i] = (weights[..., None] * v.to(acc_dtype)).sum(1).to(out.dtype)
    if lse is not None:
        lse = lse.clone()
        lse[b, h, i] = total.to(lse.dtype)
    return out, lse
