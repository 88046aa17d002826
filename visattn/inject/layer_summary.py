"""``summary``: the patterns of the layers of a pipeline with a plan, and counts of their calls."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from visattn.attention.lowering import block_sizes, lower_cached
from visattn.geometry.layout import TokenLayout
from visattn.inject.attachment import Attachment, attached
from visattn.inject.layers.layer import Layer
from visattn.inject.layers.measured import executed, missed
from visattn.inject.models.denoisers import attention_layers, models_of
from visattn.inject.planned import replaced
from visattn.patterns import HeadPattern, Pattern
from visattn.plan import ANY
from visattn.plan.show.columns import aligned, cell

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """A layer with a plan.

    Attributes:
        role: name of the denoiser in its pipeline.
        layer: path of the attention module in the denoiser.
        phase: index of the phase in which it runs ``patterns``.
        pass_: the pass in which it runs ``patterns``, or ``"any"``.
        patterns: number of heads by pattern, in written form.
        density: mean density of its heads at the layout of the last call, or else of the plan;
            None without either.
        block_density: mean share of computed blocks at the same layout; None likewise.
        sparse_calls: calls so far with sparse heads, in all phases and passes.
        dense_calls: other calls so far, in all phases and passes.
        reason: why calls were dense although the plan has sparse heads, or kept all blocks; None:
            there were no such calls.
        dropped: attention mass that was left out, mean over the audited rows of the sparse heads at
            their last calls; None without an audit, or if a head has no log-sum-exp (Agent).
        error: L1 norm of the error of the output relative to that of the exact output, mean over
            the same rows; None without an audit.
    """

    role: str
    layer: str
    phase: int
    pass_: str
    patterns: dict[str, int]
    density: float | None
    block_density: float | None
    sparse_calls: int
    dense_calls: int
    reason: str | None
    dropped: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a pipeline with a plan runs. ``print`` shows it as a table.

    Attributes:
        layers: the layers with a plan, one entry for each phase and pass.
        dense_layers: number of attention layers to which the plan applies no pattern.
        backend: the requested backend.
        ran: the backends that ran.
        layout: layout of the tokens; None if it is not known yet.
        attention_share: share of attention in the multiplications of a step; None if ``layout`` is
            None. It is counted, not timed: weights of linear layers times tokens, against
            ``2 * tokens**2 * width`` for each attention layer.
        most_speedup: upper bound of the speedup of a step, ``1 / (1 - share * (1 - block
            density))``; None likewise. It assumes that a computed block costs as much as in dense
            attention and that nothing else is added.
        replaced: roles of denoisers that replaced one with a plan.

    Example:
        >>> from visattn import sparse, summary
        >>> with sparse(pipe, "diagonal(3)"):
        ...     numbers = summary(pipe).numbers()
        >>> numbers["dense_layers"], numbers["layers"][0]["patterns"]
        (0, {'Diagonal(width=3)': 4})
    """

    layers: tuple[LayerSummary, ...]
    dense_layers: int
    backend: str
    ran: tuple[str, ...]
    layout: str | None
    attention_share: float | None
    most_speedup: float | None
    replaced: tuple[str, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        value = asdict(self)
        value["ran"], value["replaced"] = list(self.ran), list(self.replaced)
        value["layers"] = [
            {("pass" if key == "pass_" else key): item for key, item in row.items()}
            for row in value["layers"]
        ]
        return value

    def __str__(self) -> str:
        warnings = [
            f"{role} replaced a denoiser with a plan and has no plan: call apply_plan again"
            for role in self.replaced
        ]
        if not self.layers:
            return "\n".join(["no layer has a plan: all attention is dense", *warnings])
        planned = len({(row.role, row.layer) for row in self.layers})
        single = {row.phase for row in self.layers} == {0}
        ran = f" ({', '.join(self.ran)} ran)" if self.ran else ""
        names: dict[str, str] = {}
        for row in self.layers:
            for pattern in row.patterns:
                names.setdefault(pattern, f"p{len(names) + 1}")
        audited = any(row.error is not None for row in self.layers)
        measured = ("dropped", "error") if audited else ()
        calls = ("sparse calls", "dense calls")
        table = [("layer", "when", "density", "blocks", *measured, *calls, "heads")]
        for rows in _equal_rows(self.layers):
            row = rows[0]
            table.append(
                (
                    f"{row.role}.{row.layer}" + (f" and {len(rows) - 1} more" if rows[1:] else ""),
                    _phase_and_pass(row, single),
                    cell(row.density),
                    cell(row.block_density),
                    *((cell(row.dropped), cell(row.error)) if audited else ()),
                    str(row.sparse_calls),
                    str(row.dense_calls) + ("" if row.reason is None else f" ({row.reason})"),
                    " + ".join(f"{count} {names[name]}" for name, count in row.patterns.items()),
                )
            )
        lines = [
            f"plan on {planned} of {planned + self.dense_layers} attention layers, backend "
            f"{self.backend}{ran}, tokens {self.layout or 'not known before the first call'}"
        ]
        lines += aligned(table)
        lines += [f"{name} = {pattern}" for pattern, name in names.items()]
        if self.attention_share is not None and self.most_speedup is not None:
            lines.append(
                f"attention is {self.attention_share:.0%} of the multiplications of a step; a step "
                f"can gain {self.most_speedup:.2f}x at most"
            )
        return "\n".join([*lines, *warnings])


def _phase_and_pass(row: LayerSummary, single: bool) -> str:
    """Return phase and pass in words; ``single``: the plan has one phase."""
    words = ([] if single else [f"phase {row.phase}"]) + ([] if row.pass_ == ANY else [row.pass_])
    return " ".join(words) or "always"


def _equal_rows(rows: tuple[LayerSummary, ...]) -> list[list[LayerSummary]]:
    """Group neighbouring rows that differ only in the layer."""
    out: list[list[LayerSummary]] = []
    for row in rows:
        if out and replace(row, layer="") == replace(out[-1][0], layer=""):
            out[-1].append(row)
        else:
            out.append([row])
    return out


def summary(pipe: Any) -> Summary:
    """Return the patterns of the layers of a pipeline under its plan, and counts of their calls.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.

    Returns:
        The summary; without a plan it has no layers.

    Example:
        >>> from visattn import sparse, summary
        >>> with sparse(pipe, "diagonal(3)"):
        ...     row = summary(pipe).layers[0]
        >>> row.layer, row.sparse_calls, row.dense_calls
        ('blocks.0.attn1', 0, 0)
    """
    models = models_of(pipe)
    attachments = [one for model in models.values() if (one := attached(model)) is not None]
    if not attachments:
        return Summary((), 0, "auto", (), None, None, None, replaced(pipe, models))
    rows = [row for attachment in attachments for row in _rows(attachment)]
    layouts = {str(layout) for one in attachments if (layout := _layout(one)) is not None}
    share, speedup = _gain(attachments)
    ran = {name for one in attachments for layer in one.layers for name in layer.ran}
    return Summary(
        layers=tuple(rows),
        dense_layers=sum(
            len(attachment.paths) - sum(bool(layer.table) for layer in attachment.layers)
            for attachment in attachments
        ),
        backend=attachments[0].backend,
        ran=tuple(sorted(ran)),
        layout=", ".join(sorted(layouts)) or None,
        attention_share=share,
        most_speedup=speedup,
        replaced=replaced(pipe, models),
    )


def _layout(attachment: Attachment) -> TokenLayout | None:
    """Return the layout of the last call, or else of the plan."""
    if attachment.latest:
        return TokenLayout.from_tokens(attachment.latest)
    return attachment.plan.geometry


def _densities(
    layer: Layer, heads: tuple[HeadPattern, ...], layout: TokenLayout
) -> tuple[float | None, float | None]:
    """Return the mean density and block density of the heads of a layer. Those of a dynamic pattern
    are measured at its calls; None before its first call."""
    sizes = block_sizes(layout.length)
    density = blocks = 0.0
    for pattern, count in Counter(heads).items():
        if isinstance(pattern, Pattern):
            density += count * pattern.density(layout)
            blocks += count * lower_cached(pattern, layout, None, *sizes).block_density
            continue
        share = executed(layer, pattern)
        if share is None:
            return None, None
        density, blocks = density + count * share, blocks + count * share
    return density / len(heads), min(blocks / len(heads), 1.0)


def _rows(attachment: Attachment) -> list[LayerSummary]:
    layout = _layout(attachment)
    rows = []
    for layer in attachment.layers:
        for memory in layer.memories.values():
            layer.warn(memory)
        for (phase, pass_), heads in layer.table.items():
            density, blocks = (None, None) if layout is None else _densities(layer, heads, layout)
            audited = missed(layer, heads)
            rows.append(
                LayerSummary(
                    role=attachment.role,
                    layer=layer.path,
                    phase=phase,
                    pass_=pass_,
                    patterns={repr(p): n for p, n in Counter(heads).most_common()},
                    density=density,
                    block_density=blocks,
                    sparse_calls=layer.sparse_calls,
                    dense_calls=layer.dense_calls,
                    reason=layer.reason,
                    dropped=None if audited is None or math.isnan(audited[0]) else audited[0],
                    error=None if audited is None else audited[1],
                )
            )
    return rows


def _gain(attachments: list[Attachment]) -> tuple[float | None, float | None]:
    """Return the share of attention in the multiplications of a step, and the largest possible
    speedup of a step."""
    attention = saved = linear = 0.0
    for attachment in attachments:
        layout = _layout(attachment)
        if layout is None:
            return None, None
        model: Any = attachment.model
        weights = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        linear += float(sum(weights)) * layout.length
        modules = attention_layers(model, attachment.family)
        widths = {path: _width(model, module) for path, module in modules.items()}
        if None in widths.values():
            return None, None
        costs = {path: 2.0 * layout.length**2 * (width or 0) for path, width in widths.items()}
        attention += sum(costs.values())
        for layer in attachment.layers:
            cost = costs.get(layer.path, 0.0)
            parts = [_densities(layer, heads, layout)[1] for heads in layer.table.values()]
            if not parts:  # it is observed or edited, and has no plan
                continue
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None, None
            saved += cost * (1 - sum(known) / len(known))
    total = attention + linear
    return attention / total, total / (total - saved)


def _width(model: Any, module: Any) -> int | None:
    """Return heads times head size of an attention module; None if it is not known."""
    width = getattr(module, "inner_dim", getattr(getattr(module, "to_q", None), "out_features", 0))
    if isinstance(width, int) and width > 0:
        return width
    config = getattr(model, "config", None)
    names = ("num_attention_heads", "attention_head_dim")
    heads, size = (getattr(config, name, 0) for name in names)
    return heads * size if isinstance(heads, int) and isinstance(size, int) and heads else None
