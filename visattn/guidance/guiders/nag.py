"""Normalized attention guidance: attention is moved away from the attention to a negative text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import check_number, check_window
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import Steering, check_touched, enter, place
from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample
from visattn.guidance.guiders.guidance import InPass, Window
from visattn.guidance.guiders.negative_text import NegativeText, for_samples
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.hooks.run_state import Context

__all__ = ["NAG", "CrossNAG", "JointNAG"]

CHUNK = 1 << 24  # elements that are computed at a time, to limit memory
LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "scale": ("a finite number", math.isfinite),
    "tau": ("a number above 0", lambda tau: 0 < tau < math.inf),
    "alpha": ("a number from 0 to 1", lambda alpha: 0 <= alpha <= 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class NAG(Window, InPass):
    """Normalized attention guidance: every attention to text is moved away from the attention to a
    negative text (Chen et al. 2025, arXiv 2505.21179). It needs no classifier-free guidance, so it
    also works with distilled models of few steps.

    With ``z+`` and ``z-`` the attention of a token to the prompt and to the negative text, ``z+``
    becomes ``(1 - alpha) z+ + alpha c z~`` with ``z~ = s z+ - (s - 1) z-``. ``c`` limits the norm
    of ``z~``, over all heads and their channels, to ``tau`` times that of ``z+``.

    A model with cross-attention to text gets one more cross-attention, and no further pass; the
    cross-attention to an image in Wan 2.1 stays. Where text is part of the sequence, the negative
    text is run through the blocks together with the prompt, which doubles the guided pass: both
    texts share the image tokens, and each has its own text tokens. Pooled text embeddings are those
    of the prompt.

    Args:
        negative_prompt: one text, or one for each prompt; encoded when the pipeline is called.
        negative_prompt_embeds: embeddings ``[1 or prompts, tokens, C]`` instead of a text.
        scale: ``s``. The authors' scale, tau and alpha: 4, 2.5, 0.25 for Flux; 4, 2.5, 0.125 for
            SD3.5; 11, 2.5, 0.25 for Wan.
        tau: the limit of the norm, above 0.
        alpha: from 0, which changes nothing and costs nothing, to 1.
        norm: ``l2`` (the authors' code for Flux) or ``l1`` (the paper).
        formulation: ``official`` (the authors' code), or ``extrapolate`` for ``z~ = z+ + s (z+ -
            z-)``, whose scale is smaller by 1.
        passes: of ``cond`` and ``uncond``. The perturbed pass of another guidance is guided like
            the conditional one. Other edits are made before, unless NAG was added first.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``negative_prompt`` is no text.
        ValueError: an argument is out of range, or there is no negative text, or two.

    Example:
        >>> from visattn.guidance import NAG, guide
        >>> with guide(pipe, NAG("blurry, distorted", scale=11.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Chen et al. (2025), "Normalized Attention Guidance", arXiv 2505.21179. Code:
        github.com/ChenDarYen/Normalized-Attention-Guidance (commit 69159ca).
    Default:
        code. Its processor for Flux; the paper has ``norm="l1"``.
    Differences:
        - Where attention is 0 the code gives NaN, this gives 0.
    """

    negative_prompt: str | Sequence[str] | None = field(default=None, kw_only=False)
    negative_prompt_embeds: torch.Tensor | None = None
    scale: float = 4.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: Literal["l1", "l2"] = "l2"
    formulation: Literal["extrapolate", "official"] = "official"
    passes: tuple[str, ...] = ("cond",)
    example: ClassVar[str] = (
        "NAG(negative_prompt='blurry, distorted', scale=11.0, tau=2.5, alpha=0.25)"
    )

    def __post_init__(self) -> None:
        if (self.negative_prompt is None) == (self.negative_prompt_embeds is None):
            raise ValueError(
                "NAG has to be given either negative_prompt, a text, or negative_prompt_embeds"
            )
        embeds = self.negative_prompt_embeds
        if embeds is not None and (not isinstance(embeds, torch.Tensor) or embeds.ndim != 3):
            given = list(embeds.shape) if isinstance(embeds, torch.Tensor) else embeds
            raise ValueError(
                f"NAG(negative_prompt_embeds=...) is {given!r}; it must be a tensor [1 or prompts, "
                "tokens, channels]"
            )
        prompt = self.negative_prompt
        if prompt is not None and not isinstance(prompt, str):
            texts = list(prompt) if isinstance(prompt, Sequence) else []
            if not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"NAG(negative_prompt={prompt!r}) must be a text, or one or more")
            object.__setattr__(self, "negative_prompt", texts)
        for name, (meant, fine) in LIMITS.items():
            check_number("NAG", name, getattr(self, name), meant, fine)
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"NAG(norm={self.norm!r}) must be l1 or l2")
        if self.formulation not in ("extrapolate", "official"):
            raise ValueError(
                f"NAG(formulation={self.formulation!r}) must be extrapolate or official"
            )
        passes = (self.passes,) if isinstance(self.passes, str) else tuple(self.passes)
        if not passes or not set(passes) <= {"cond", "uncond"}:
            raise ValueError(f"NAG(passes={self.passes!r}) must be of cond and uncond")
        object.__setattr__(self, "passes", passes)
        check_window("NAG", self.start, self.stop)

    @property
    def gain(self) -> float:
        """``s`` of ``z+ + s (z+ - z-)``."""
        return self.scale - (self.formulation == "official")

    @property
    def guided(self) -> tuple[str, ...]:
        """The passes that are guided, perturbed ones too."""
        return (*self.passes, "perturbed") if "cond" in self.passes else self.passes

    def away(self, plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Return attention that is moved away from the attention to the negative text.

        Args:
            plus: attention to the prompt, ``[b, H, L, D]``.
            minus: attention to the negative text, ``[b, H, L, D]``.
        """
        out = torch.empty_like(plus)
        acc_dtype = torch.promote_types(plus.dtype, torch.float32)
        order = 1 if self.norm == "l1" else 2
        step = max(1, CHUNK // (plus.shape[0] * plus.shape[1] * plus.shape[3]))
        for first in range(0, plus.shape[2], step):
            rows = slice(first, first + step)
            positive, negative = plus[:, :, rows].to(acc_dtype), minus[:, :, rows].to(acc_dtype)
            moved = positive + self.gain * (positive - negative)
            length, usual = (
                torch.linalg.vector_norm(x, order, dim=(1, 3), keepdim=True)
                for x in (moved, positive)
            )
            clipped = torch.where(length > self.tau * usual, self.tau * usual / length, 1.0)
            out[:, :, rows] = torch.lerp(positive, clipped * moved, self.alpha).to(out.dtype)
        return out

    def put(self, stack: ExitStack, pipe: Any) -> Callable[[], None]:
        if self.alpha == 0 or (self.gain == 0 and self.tau >= 1):
            return _nothing
        known = known_denoisers(pipe)
        alone = isinstance(pipe, torch.nn.Module)
        for _, family in known.values():
            if family.masks_text_padding:
                raise ValueError(
                    f"NAG is not possible for {family.name}: it doubles a call for a second text, "
                    "whose length this family needs as well; use negative_prompt with "
                    "true_cfg_scale above 1"
                )
        crossed = all(family.cross for _, family in known.values())
        models = {role: model for role, (model, _) in known.items()}
        text = NegativeText(pipe, models, self.negative_prompt, self.negative_prompt_embeds)
        window: dict[str, Any] = {}
        if crossed:
            for _, family in known.values():
                if family.name != "Wan":
                    raise ValueError(
                        f"NAG cannot guide the cross-attention of {family.name}: of the families "
                        "with cross-attention it supports Wan"
                    )
            window = {"start": self.start, "stop": self.stop}
            window["passes"] = None if alone and "cond" in self.passes else self.guided
        edit = (CrossNAG if crossed else JointNAG)(nag=self, text=text, **window)
        steerings = enter(stack, pipe, place(pipe, [edit]), on=crossed)
        fronts: list[tuple[Any, Any]] = [(pipe, text)]
        if not crossed:
            for role, model in models.items():
                target = pipe if alone else getattr(pipe, role)
                fronts.insert(0, (target, _Doubled(self, text, model, steerings[role], alone)))
        for target, front in fronts:
            add_handler(target, front)
            stack.callback(remove_handler, target, front)
        return lambda: check_touched([edit], steerings.values())


def _nothing() -> None:
    """Check nothing, for a guidance that changes nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossNAG(Edit):
    """NAG at a cross-attention, which is computed once more with the negative text."""

    nag: NAG
    text: NegativeText
    attention: Literal["self", "cross"] = "cross"
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        call = state.call
        if call.masked:
            raise ValueError(
                f"NAG cannot make the attention mask of the negative text that {call.layer} needs"
            )
        k, v = self.text.keys_and_values(call.role, call.layer, state.q)
        minus, _ = call.kernel(state.part, state.q, k, v)
        state.out = self.nag.away(state.out, minus)


@dataclass(frozen=True, kw_only=True, eq=False)
class JointNAG(Edit):
    """NAG at a joint attention whose batch is doubled: with the prompt, and with the negative text.
    Rows of grids are guided, and equal in both halves."""

    nag: NAG
    text: NegativeText
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        new = state.out.clone()
        for start, grid in state.call.layout.grids:
            rows = slice(start, start + grid.numel)
            plus, minus = state.out[:, :, rows].chunk(2)
            new[:, :, rows] = self.nag.away(plus, minus).repeat(2, 1, 1, 1)
        state.out = new


class _Doubled:
    """Handles the calls of a denoiser: guided passes are run with both texts."""

    def __init__(
        self, nag: NAG, text: NegativeText, model: torch.nn.Module, steering: Steering, alone: bool
    ) -> None:
        self.nag, self.text, self.model = nag, text, model
        self.steering, self.alone = steering, alone
        before = [entry.edit for entry in steering.entries if entry.steering is not steering]
        if any(isinstance(edit, JointNAG) for edit in before):
            raise ValueError("NAG is on this pipeline already; it can be added once")

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = attached(self.model)
        assert attachment is not None
        with attachment.turn.taken():
            return self._call(attachment, inner, args, kwargs)

    def _call(
        self, attachment: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
        attachment.note(arguments)
        batch = arguments["hidden_states"].shape[0]
        passes = attachment.passes(batch) or (("cond",) if self.alone else None)
        if passes is None:
            raise ValueError(
                "NAG cannot guide, as "
                + attachment.unknown("pass", "another pipeline of the family", "guide")
            )
        guided = [pass_ for pass_ in passes if pass_ in self.nag.guided]
        step, steps = attachment.step()
        if not guided or not self.nag.active(step, steps):
            return inner(*args, **kwargs)
        each, out = batch // len(passes), None
        predictions = {}
        # the conditional pass first, as others may be scaled by it
        for pass_ in sorted(passes, key=lambda name: name != "cond"):
            first = passes.index(pass_) * each
            rows = [*range(first, first + each)] * (2 if pass_ in guided else 1)
            mine = {name: part_of(name, x, batch, rows) for name, x in arguments.items()}
            with ExitStack() as stack:
                stack.enter_context(_within(attachment, pass_, step, steps, pass_ in guided))
                if pass_ in guided:
                    stack.enter_context(self._on())
                    embeddings = self.text.embeddings(attachment.role, arguments["hidden_states"])
                    _put_text(mine, for_samples(embeddings, each))
                out = inner(**mine)
            predictions[pass_] = sample_of(out)[:each]
        attachment.note(arguments)  # as after a call with all passes
        return with_sample(out, torch.cat([predictions[pass_] for pass_ in passes]))

    @contextmanager
    def _on(self) -> Iterator[None]:
        before, self.steering.on = self.steering.on, True
        try:
            yield
        finally:
            self.steering.on = before


@contextmanager
def _within(
    attachment: Attachment, pass_: str, step: int | None, steps: int | None, doubled: bool
) -> Iterator[None]:
    """Inside, a denoiser runs one pass alone, with a cache of steps separate from that of whole
    batches."""
    before = attachment.context
    with ExitStack() as stack:
        kind: Any = type(attachment.model)
        if hasattr(kind, "cache_context"):
            name = f"{pass_} {'doubled' if doubled else 'alone'}"
            stack.enter_context(kind.cache_context(attachment.model, name))
        stack.callback(setattr, attachment, "context", before)
        attachment.context = Context(pass_, step, steps)
        yield


def _put_text(arguments: dict[str, Any], text: torch.Tensor) -> None:
    """Give the second half of a doubled batch another text."""
    prompt = arguments["encoder_hidden_states"]
    if prompt.shape[1:] != text.shape[1:]:
        raise ValueError(
            f"the negative text of NAG has the shape {list(text.shape[1:])}, and the prompt "
            f"{list(prompt.shape[1:])}; encode both with the same max_sequence_length"
        )
    arguments["encoder_hidden_states"] = torch.cat([prompt[: len(text)], text.to(prompt.dtype)])
