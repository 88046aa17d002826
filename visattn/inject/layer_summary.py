"""``summary``: what the layers of a pipeline with a plan run, and have run."""

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
from visattn.plan.show.columns import aligned

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """A layer with a plan.

    ``phase`` and ``pass_`` say when it runs ``patterns`` (written form, how many heads).
    ``density`` and ``block_density`` are means over its heads at ``layout``, the last one that ran,
    or else the plan's own; None without either. ``sparse_calls`` and ``dense_calls`` count its
    calls so far, in all phases and passes, and ``reason`` says why calls were dense that the plan
    wanted sparse, or kept all of their blocks. ``dropped`` and ``error`` are means over the audited
    rows of its sparse heads at their last calls: the mass that was left out (None beside a head
    that has no LSE, as of Agent), and the L1 norm of the output's error over that of the exact
    output; None without an audit.
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
    """What a pipeline with a plan runs; printed, it is a table.

    ``attention_share`` is the share of attention in the multiplications of a step, counted and not
    timed (weights of linear layers times tokens, against 2 · tokens² · width per layer), and
    ``most_speedup`` what a step could gain if every visited block cost what it does in dense
    attention and nothing else were added: 1 / (1 − share · (1 − block density)). Both are None
    before a layout is known. ``backend`` is the one asked for, ``ran`` those that ran.
    ``replaced`` are the roles of denoisers that took the place of one with a plan since.
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
        """The summary as JSON values."""
        value = asdict(self)
        value["ran"], value["replaced"] = list(self.ran), list(self.replaced)
        value["layers"] = [
            {("pass" if key == "pass_" else key): item for key, item in row.items()}
            for row in value["layers"]
        ]
        return value

    def __str__(self) -> str:
        lost = [
            f"{role} took the place of one with a plan, and has none: call apply_plan again"
            for role in self.replaced
        ]
        if not self.layers:
            return "\n".join(["no layer has a plan: all attention is dense", *lost])
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
        for rows in _runs(self.layers):
            row = rows[0]
            table.append(
                (
                    f"{row.role}.{row.layer}" + (f" and {len(rows) - 1} more" if rows[1:] else ""),
                    _when(row, single),
                    _share(row.density),
                    _share(row.block_density),
                    *((_share(row.dropped), _share(row.error)) if audited else ()),
                    str(row.sparse_calls),
                    str(row.dense_calls) + ("" if row.reason is None else f" ({row.reason})"),
                    " + ".join(f"{count} {names[own]}" for own, count in row.patterns.items()),
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
        return "\n".join([*lines, *lost])


def _when(row: LayerSummary, single: bool) -> str:
    """Phase and pass in words; ``single``: the plan has one phase."""
    words = ([] if single else [f"phase {row.phase}"]) + ([] if row.pass_ == ANY else [row.pass_])
    return " ".join(words) or "always"


def _runs(rows: tuple[LayerSummary, ...]) -> list[list[LayerSummary]]:
    """Neighbouring rows that differ in nothing but the layer."""
    out: list[list[LayerSummary]] = []
    for row in rows:
        if out and replace(row, layer="") == replace(out[-1][0], layer=""):
            out[-1].append(row)
        else:
            out.append([row])
    return out


def summary(pipe: Any) -> Summary:
    """What the layers of a pipeline or denoiser run under its plan, and have run; without a plan
    there are none."""
    models = models_of(pipe)
    found = [own for model in models.values() if (own := attached(model)) is not None]
    if not found:
        return Summary((), 0, "auto", (), None, None, None, replaced(pipe, models))
    rows = [row for own in found for row in _rows(own)]
    layouts = {str(layout) for own in found if (layout := _layout(own)) is not None}
    share, speedup = _gain(found)
    return Summary(
        layers=tuple(rows),
        dense_layers=sum(
            len(own.paths) - sum(bool(layer.table) for layer in own.layers) for own in found
        ),
        backend=found[0].backend,
        ran=tuple(sorted({name for own in found for layer in own.layers for name in layer.ran})),
        layout=", ".join(sorted(layouts)) or None,
        attention_share=share,
        most_speedup=speedup,
        replaced=replaced(pipe, models),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _layout(own: Attachment) -> TokenLayout | None:
    return TokenLayout.from_tokens(own.latest) if own.latest else own.plan.geometry


def _densities(
    layer: Layer, heads: tuple[HeadPattern, ...], layout: TokenLayout
) -> tuple[float | None, float | None]:
    """Mean density and block density of the heads of a layer. Those of a dynamic pattern are what
    it had computed; None before that."""
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


def _rows(own: Attachment) -> list[LayerSummary]:
    layout = _layout(own)
    rows = []
    for layer in own.layers:
        for memory in layer.memories.values():
            layer.warn(memory)
        for (phase, pass_), heads in layer.table.items():
            density, blocks = (None, None) if layout is None else _densities(layer, heads, layout)
            audited = missed(layer, heads)
            rows.append(
                LayerSummary(
                    role=own.role,
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


def _gain(found: list[Attachment]) -> tuple[float | None, float | None]:
    """Share of attention in the multiplications of a step, and the most that a step can gain."""
    attention = saved = linear = 0.0
    for own in found:
        layout = _layout(own)
        if layout is None:
            return None, None
        model: Any = own.model
        weights = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        linear += float(sum(weights)) * layout.length
        modules = attention_layers(model, own.family)
        widths = {path: _width(model, module) for path, module in modules.items()}
        if None in widths.values():
            return None, None
        each = {path: 2.0 * layout.length**2 * (width or 0) for path, width in widths.items()}
        attention += sum(each.values())
        for layer in own.layers:
            one = each.get(layer.path, 0.0)
            parts = [_densities(layer, heads, layout)[1] for heads in layer.table.values()]
            if not parts:  # it is observed or edited, and has no plan
                continue
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None, None
            saved += one * (1 - sum(known) / len(known))
    whole = attention + linear
    return attention / whole, whole / (whole - saved)


def _width(model: Any, module: Any) -> int | None:
    """Heads times head size of an attention module; None where nothing says it."""
    found = getattr(module, "inner_dim", getattr(getattr(module, "to_q", None), "out_features", 0))
    if isinstance(found, int) and found > 0:
        return found
    config = getattr(model, "config", None)
    heads, size = (getattr(config, own, 0) for own in ("num_attention_heads", "attention_head_dim"))
    return heads * size if isinstance(heads, int) and isinstance(size, int) and heads else None
