"""Prompts for regions of an image or video (regional prompting, Chen et al. 2024, arXiv
2411.02395)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import adaptive_avg_pool3d

from visattn._arguments import check_number, check_window, in_window
from visattn.geometry.layout import Grid
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import attend
from visattn.guidance.edits.label_bias import RegionMask
from visattn.guidance.edits.state import State, Stream
from visattn.guidance.edits.steer import steer
from visattn.guidance.head_set import Layers
from visattn.inject.hooks.class_swap import kind_of
from visattn.inject.models.denoisers import attention_layers, cross_layers, known_denoisers
from visattn.runtime.torch_settings import lasting

__all__ = ["MixBase", "RegionBits", "regional"]

FAMILIES = ("Wan", "CogVideoX", "Flux", "Stable Diffusion 3")
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
MOST = 60  # regions: a bit each, of 64


class RegionBits:
    """Which tokens see each other: bits for ``RegionMask`` in calls whose text is that of the base
    prompt and, behind it, that of each region, all of one length.

    A row of the image sees the text of its regions, of several where they overlap, or the base text
    where it is in none; where text is part of the sequence it sees the image of its regions, or of
    the background. The text of a region sees itself and its region's image, the base text itself
    and all of the image. For the *base attention* all rows of the image are as the base text.

    Args:
        masks: of the regions, ``[height, width]`` or ``[frames, height, width]`` of any size: a
            token is in a region that covers at least half of it.
        length: tokens of each text.
        numbers: of the layers that have regions; in others attention is the base attention.
        start, stop: the steps that have them, as for an ``Edit``.
    """

    def __init__(
        self,
        masks: Sequence[torch.Tensor],
        length: int,
        numbers: frozenset[int],
        start: int | float = 0,
        stop: int | float = 1.0,
    ) -> None:
        self.masks, self.length, self.numbers = tuple(masks), length, numbers
        self.start, self.stop = start, stop
        self.background, self.base = (1 << (len(self.masks) + n) for n in (0, 1))
        self._image = functools.lru_cache(maxsize=8)(self._image_of)

    def has_regions(self, state: State) -> bool:
        """Whether regions are seen in a call."""
        call = state.call
        if state.pass_ is None:
            raise ValueError(
                f"regions are for the cond pass, and the pass of this call of {call.role} is not "
                "known; give the pipeline that runs"
            )
        if state.pass_ == "uncond" or call.number not in self.numbers:
            return False
        if self.start == 0 and self.stop == 1.0 and isinstance(self.stop, float):
            return True
        if call.step is None or call.steps is None:
            raise ValueError(
                f"regions are for some steps, and the step of this call of {call.role} is not "
                "known; give the pipeline that runs"
            )
        return in_window(self.start, self.stop, call.step, call.steps)

    def queries(self, state: State, base: bool = False) -> torch.Tensor:
        """Bits of the queries ``[Lq]``; ``base``: those of the base attention."""
        bits = torch.full((state.q.shape[2],), self.base)
        if not base and self.has_regions(state):
            bits[state.image] = self._image(state.call.layout.grids[0][1])
        if state.call.kind != "cross":
            self._text(state, bits, self.base)
        return bits

    def keys(self, state: State) -> torch.Tensor:
        """Bits of the keys ``[Lk]``."""
        bits = torch.full((state.k.shape[2],), 2 * self.base - 1)
        if state.call.kind != "cross":
            bits[state.image] = self._image(state.call.layout.grids[0][1]) | self.base
        self._text(state, bits, self.background | self.base)
        return bits

    def _text(self, state: State, bits: torch.Tensor, base: int) -> None:
        """Write the bits of the text tokens."""
        own = torch.tensor([base, *(1 << n for n in range(len(self.masks)))])
        places = torch.cat([torch.arange(first, end) for first, end in state.texts])
        if len(places) != len(own) * self.length:
            raise ValueError(
                f"{state.call.layer} has {len(places)} text tokens, and {len(own)} texts of "
                f"{self.length} are given"
            )
        bits[places] = own.repeat_interleave(self.length)

    @lasting
    def _image_of(self, grid: Grid) -> torch.Tensor:
        """Bits of the tokens of a grid."""
        bits = torch.zeros(grid.numel, dtype=torch.int64)
        for number, mask in enumerate(self.masks):
            whole = mask.detach().cpu().float().reshape(1, -1, *mask.shape[-2:])
            inside = adaptive_avg_pool3d(whole, grid.shape).flatten() >= 0.5
            if not bool(inside.any()):
                raise ValueError(
                    f"regions[{number}] has a mask of the shape {list(mask.shape)} that covers no "
                    f"token of the grid {grid.shape}; give a larger region"
                )
            bits |= inside.to(torch.int64) << number
        return torch.where(bits == 0, self.background, bits)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixBase(Edit):
    """Rows of the image are ``(1 - b) O + b O_base``, where ``O_base`` is the base attention, which
    is computed besides, within the plan's pattern; without the biases of other edits.

    Args:
        bits: of the regions.
        ratio: ``b``, from 0, which changes nothing, to 1.
    """

    bits: RegionBits
    ratio: float
    stream: Stream = "image"
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.ratio == 0 or not self.bits.has_regions(state):
            return
        other = State(state.call, state.part, state.pass_, state.q, state.k, state.v)
        other.gains = state.gains
        queries = functools.partial(self.bits.queries, base=True)
        mask = RegionMask(q_bits=queries, k_bits=self.bits.keys, attention=self.attention)
        mask.apply(other, torch.ones_like(strength))
        new, _ = attend(other, needs_lse=False, again=True)
        self.change(state, "out", new, strength * self.ratio)


@torch.no_grad()
def regional(
    pipe: Any,
    prompt: str,
    regions: Sequence[tuple[str, torch.Tensor]],
    *,
    base_ratio: float = 0.0,
    layers: Layers = None,
    start: int | float = 0,
    stop: int | float = 1.0,
    **call: Any,
) -> Any:
    """Generate by a base prompt and prompts of regions.

    Args:
        pipe: a pipeline of Wan, CogVideoX, Flux.1 or Stable Diffusion 3; with a plan, ``steer`` or
            ``guide`` or without. What a sparse pattern leaves out stays out.
        prompt: the base prompt, that of the background.
        regions: of each the prompt and the mask, bool or from 0 to 1, ``[height, width]`` for all
            frames or ``[frames, height, width]``, of any size: a token of the latents is in a
            region that covers at least half of it. Regions may overlap.
        base_ratio: ``b``: rows of the image are ``(1 - b)`` of what they get by regions and ``b``
            of what they would get by the base prompt, at the cost of a second attention; 0: by
            regions alone, 1: by the base prompt alone. The paper has 0.1 to 0.2.
        layers: that have regions, numbers or paths as for an ``Edit`` (in Wan of its
            cross-attention); default: all.
        start, stop: the steps that have them, as for an ``Edit``; elsewhere only the base prompt is
            seen. But for Wan, regions do not see each other's image either, so that some steps at
            the beginning are best (the paper has 5 to 10, for Flux), or a base ratio.
        call: arguments of the pipeline, such as its size, steps and ``negative_prompt``.

    Returns:
        What the pipeline gives. Texts are encoded each for itself and joined, the base prompt
        first; other edits count text tokens in this order. The pooled text embeddings that Flux and
        Stable Diffusion 3 have are those of the base prompt. The further attention that Stable
        Diffusion 3.5 medium has for the image alone stays as it is. Where CogVideoX adds positions
        to its tokens, as its 2B does, each text has those of a text alone.

    Raises:
        TypeError, ValueError: the pipeline or an argument is something else, or a mask covers no
            token. The pipeline is then as it was.

    Source:
        Chen et al. (2024), "Training-free Regional Prompting for Diffusion Transformers", arXiv
        2411.02395.
    Default:
        paper.
    Differences:
        - The base prompt is part of the sequence; in the paper it is a stream of its own.
        - By default all layers and steps have regions and ``base_ratio`` is 0.
    """
    model, family = _check(pipe, prompt, regions, call)
    wanted = "from 0 to 1; 0 is by regions alone"
    check_number("regional", "base_ratio", base_ratio, wanted, lambda own: 0 <= own <= 1)
    check_window("regional", start, stop)
    attention: Literal["self", "cross"] = "cross" if family.cross else "self"
    paths = tuple((cross_layers if family.cross else attention_layers)(model, family))
    chosen = Edit(layers=layers, attention=attention).place(paths, 1).strengths
    given, length = _encoded(pipe, family.name, [prompt, *(text for text, _ in regions)], call)
    numbers = frozenset(paths.index(path) for path in chosen)
    bits = RegionBits([mask for _, mask in regions], length, numbers, start, stop)
    passes = ("cond", "perturbed")
    edits: list[Edit] = [
        RegionMask(
            q_bits=bits.queries,
            k_bits=bits.keys,
            attention=attention,
            # where guidance doubles the batch, one call has the text of all passes
            passes=None if family.cfg_batch_order else passes,
        )
    ]
    if base_ratio:
        edits.append(MixBase(bits=bits, ratio=base_ratio, attention=attention, passes=passes))
    with _room(model, family.name, length, len(regions)), steer(pipe, edits):
        return pipe(**given)


def _check(
    pipe: Any, prompt: str, regions: Sequence[tuple[str, torch.Tensor]], call: Mapping[str, Any]
) -> tuple[Any, Any]:
    """A denoiser and its family, if all arguments are what they must be."""
    (model, family), *_ = known_denoisers(pipe).values()
    if family.name not in FAMILIES or not hasattr(pipe, "encode_prompt"):
        raise TypeError(
            f"pipe={type(pipe).__name__} must be a pipeline of {', '.join(FAMILIES)}: regional "
            "joins several texts, which others have no room for"
        )
    if getattr(model.config, "added_kv_proj_dim", None) is not None and family.cross:
        raise TypeError(
            f"pipe={type(pipe).__name__} has an image before its text, so that texts cannot be "
            "joined; take a model without image embeddings"
        )
    if not isinstance(prompt, str):
        raise TypeError(f"prompt={prompt!r} must be one text, the base prompt")
    if not isinstance(regions, Sequence) or isinstance(regions, str) or not regions:
        raise ValueError(f"regions={regions!r} must be pairs of prompt and mask, at least one")
    if len(regions) > MOST:
        raise ValueError(f"regions has {len(regions)} regions; there may be {MOST}")
    for number, pair in enumerate(regions):
        fine = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
        if not fine or not isinstance(pair[1], torch.Tensor):
            raise TypeError(f"regions[{number}] must be a prompt and its mask, a tensor")
        mask = pair[1]
        if mask.ndim not in (2, 3) or not mask.numel() or mask.is_complex():
            raise ValueError(
                f"regions[{number}] has a mask of the shape {list(mask.shape)}; it must be "
                "[height, width] or [frames, height, width]"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"regions[{number}] has a mask with values outside 0 to 1")
    mine = [name for name in call if name.startswith("prompt") or name.endswith("prompt_embeds")]
    if mine:
        raise ValueError(
            f"{mine[0]}=... is not taken: texts are encoded from prompt, regions and "
            "negative_prompt"
        )
    return model, family


def _encoded(
    pipe: Any, name: str, texts: list[str], call: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Arguments of the pipeline with the joined texts, and the number of tokens of each."""
    given = dict(call)
    own = inspect.signature(kind_of(pipe).__call__).parameters
    count = 1
    for key in COUNTS:
        count = given.pop(key, None) or count
    options = {
        "max_sequence_length": given.get("max_sequence_length", own["max_sequence_length"].default)
    }
    negative = given.get("negative_prompt")
    if isinstance(negative, str) and count > 1:
        given["negative_prompt"] = [negative] * count
    if name == "Wan":
        found = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **options)
        given["prompt_embeds"] = _joined(found[0], count)
        return given, found[0].shape[1]
    if name == "Flux":
        found = pipe.encode_prompt(texts, None, **options)
        given["prompt_embeds"] = _joined(found[0], count)
        given["pooled_prompt_embeds"] = found[1][:1].repeat(count, 1)
        return given, found[0].shape[1]
    options["do_classifier_free_guidance"] = False
    minus = _negative(given, count)
    if name == "CogVideoX":
        found, away = (pipe.encode_prompt(own, **options) for own in (texts, minus))
    else:
        options["clip_skip"] = given.get("clip_skip")
        found, away = (pipe.encode_prompt(own, None, None, **options) for own in (texts, minus))
        given["pooled_prompt_embeds"] = found[2][:1].repeat(count, 1)
        given["negative_pooled_prompt_embeds"] = away[2].repeat(count // len(minus), 1)
    given["prompt_embeds"] = _joined(found[0], count)
    # its copies beside the regions' texts are not seen
    given["negative_prompt_embeds"] = away[0].repeat(count // len(minus), len(texts), 1)
    return given, found[0].shape[1]


def _negative(given: dict[str, Any], count: int) -> list[str]:
    """The negative prompts, one or one for each of ``count`` images, taken out of the arguments."""
    every = [given.pop(f"negative_prompt{end}", None) or "" for end in ("", "_2", "_3")]
    if any(every[1:]):
        raise ValueError("negative_prompt_2 and _3 are not taken; give negative_prompt")
    minus: list[str] = [every[0]] if isinstance(every[0], str) else list(every[0])
    if len(minus) not in (1, count):
        raise ValueError(f"negative_prompt has {len(minus)} texts for {count} images; give one")
    return minus


def _joined(texts: torch.Tensor, count: int) -> torch.Tensor:
    """Texts ``[n, L, C]`` in one sequence, ``[count, n L, C]``."""
    return texts.flatten(0, 1)[None].repeat(count, 1, 1)


@contextmanager
def _room(model: Any, name: str, length: int, regions: int) -> Iterator[None]:
    """Room for the texts of regions in the positions that some CogVideoX add to their tokens: those
    of the text once more for each region."""
    embed: Any = model.patch_embed if name == "CogVideoX" else None
    if not hasattr(embed, "pos_embedding"):
        yield
        return
    own, most = embed.pos_embedding, embed.max_text_seq_length
    if length != most:
        raise ValueError(
            f"max_sequence_length={length} must be {most}, the length of text that this "
            f"{type(model).__name__} has positions for"
        )
    embed.pos_embedding = torch.cat([own[:, :most].repeat(1, 1 + regions, 1), own[:, most:]], 1)
    embed.max_text_seq_length = most * (1 + regions)
    try:
        yield
    finally:
        embed.pos_embedding = own.to(embed.pos_embedding.device)
        embed.max_text_seq_length = most
