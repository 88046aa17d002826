"""Different prompts for regions of an image or video (regional prompting, Chen et al. 2024, arXiv
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
MAX_REGIONS = 60  # each has one of 64 bits


class RegionBits:
    """Bits for ``RegionMask`` in calls whose text is the base prompt followed by the prompts of the
    regions, all with the same number of tokens.

    An image row sees the text of its regions (several if they overlap), or the base text if it is
    in none. If text is part of the sequence, it also sees the image tokens of its regions, or of
    the background. The text of a region sees itself and the image tokens of its region, the base
    text sees itself and the whole image. In the *base attention* all image rows see what the base
    text sees.

    Args:
        masks: masks of the regions, ``[height, width]`` or ``[frames, height, width]``, of any
            size. A token is in a region that covers at least half of it.
        length: number of tokens of each text.
        numbers: indices of the layers with regions. All other layers compute the base attention.
        start: the first step with regions, as in ``Edit``.
        stop: the step after the last one with regions, as in ``Edit``.
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
        """Return whether a call has regions.

        Args:
            state: the call.

        Raises:
            ValueError: the pass or the step of the call is not known.
        """
        call = state.call
        if state.pass_ is None:
            raise ValueError(
                f"regions are limited to the cond pass, and the pass of this call of {call.role} "
                "is not known; give the pipeline that runs"
            )
        if state.pass_ == "uncond" or call.number not in self.numbers:
            return False
        if self.start == 0 and self.stop == 1.0 and isinstance(self.stop, float):
            return True
        if call.step is None or call.steps is None:
            raise ValueError(
                f"regions are limited to some steps, and the step of this call of {call.role} is "
                "not known; give the pipeline that runs"
            )
        return in_window(self.start, self.stop, call.step, call.steps)

    def queries(self, state: State, base: bool = False) -> torch.Tensor:
        """Return the bits of the queries, int64 ``[Lq]``.

        Args:
            state: the call.
            base: whether to return those of the base attention.
        """
        bits = torch.full((state.q.shape[2],), self.base)
        if not base and self.has_regions(state):
            bits[state.image] = self._image(state.call.layout.grids[0][1])
        if state.call.kind != "cross":
            self._text(state, bits, self.base)
        return bits

    def keys(self, state: State) -> torch.Tensor:
        """Return the bits of the keys, int64 ``[Lk]``.

        Args:
            state: the call.
        """
        bits = torch.full((state.k.shape[2],), 2 * self.base - 1)
        if state.call.kind != "cross":
            bits[state.image] = self._image(state.call.layout.grids[0][1]) | self.base
        self._text(state, bits, self.background | self.base)
        return bits

    def _text(self, state: State, bits: torch.Tensor, base: int) -> None:
        """Write the bits of the text tokens into ``bits``; those of the base text are ``base``."""
        text_bits = torch.tensor([base, *(1 << n for n in range(len(self.masks)))])
        positions = torch.cat([torch.arange(first, end) for first, end in state.texts])
        if len(positions) != len(text_bits) * self.length:
            raise ValueError(
                f"{state.call.layer} has {len(positions)} text tokens, and there are "
                f"{len(text_bits)} texts of {self.length}"
            )
        bits[positions] = text_bits.repeat_interleave(self.length)

    @lasting
    def _image_of(self, grid: Grid) -> torch.Tensor:
        """Return the bits of the image tokens of a grid."""
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
    """Mix the base attention into the image rows: ``(1 - b) O + b O_base``. ``O_base`` is an
    additional attention with the pattern of the plan, and without the biases of other edits.

    Args:
        bits: the bits of the regions.
        ratio: ``b``, from 0 (nothing changes) to 1.
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
    """Generate from a base prompt and prompts of regions.

    Each text is encoded separately, and the texts are joined with the base prompt first. Other
    edits count text tokens in this order. The pooled text embeddings of Flux and Stable Diffusion 3
    are those of the base prompt. The second attention of Stable Diffusion 3.5 medium, which has
    image tokens only, does not change. In CogVideoX-2B, which adds positions to its tokens, each
    text has the positions of a single text.

    Args:
        pipe: a pipeline of Wan, CogVideoX, Flux.1 or Stable Diffusion 3, with a plan, ``steer`` or
            ``guide`` or without. Pairs that a sparse pattern drops stay dropped.
        prompt: the base prompt, for the background.
        regions: pairs of a prompt and a mask. A mask is bool or from 0 to 1, ``[height, width]``
            for all frames or ``[frames, height, width]``, of any size. A token of the latents is in
            a region that covers at least half of it. Regions may overlap.
        base_ratio: ``b``: image rows are ``(1 - b)`` times the attention with regions plus ``b``
            times the attention to the base prompt alone, which costs a second attention. 0 means
            regions alone. The paper uses 0.1 to 0.2.
        layers: layers with regions, as in ``Edit`` (in Wan, cross-attention layers). None means
            all.
        start: the first step with regions, as in ``Edit``. The other steps use the base prompt
            alone.
        stop: the step after the last one with regions, as in ``Edit``. Except in Wan, regions do
            not see each other's image tokens either, so a few steps at the start (5 to 10 for Flux
            in the paper) or a base ratio work best.
        call: arguments of the pipeline, such as its size, steps and ``negative_prompt``.

    Returns:
        The output of the pipeline.

    Raises:
        TypeError: the pipeline or an argument has the wrong type.
        ValueError: an argument is out of range, or a mask covers no token. After an error the
            pipeline computes what it did before.

    Example:
        >>> import torch
        >>> from visattn.guidance import regional
        >>> left = torch.tensor([[1.0, 0.0]])  # a mask of the left half
        >>> video = regional(
        ...     pipe, "a room", [("a red square", left), ("a blue circle", 1 - left)],
        ...     base_ratio=0.1, height=16, width=32, num_frames=5, num_inference_steps=1,
        ... )

    Source:
        Chen et al. (2024), "Training-free Regional Prompting for Diffusion Transformers", arXiv
        2411.02395.
    Default:
        paper.
    Differences:
        - The base prompt is part of the sequence; in the paper it is a separate stream.
        - By default all layers and steps have regions and ``base_ratio`` is 0.
    """
    model, family = _check(pipe, prompt, regions, call)
    allowed = "from 0 to 1; 0 means regions alone"
    check_number("regional", "base_ratio", base_ratio, allowed, lambda ratio: 0 <= ratio <= 1)
    check_window("regional", start, stop)
    attention: Literal["self", "cross"] = "cross" if family.cross else "self"
    paths = tuple((cross_layers if family.cross else attention_layers)(model, family))
    chosen = Edit(layers=layers, attention=attention).place(paths, 1).strengths
    arguments, length = _encoded(pipe, family.name, [prompt, *(text for text, _ in regions)], call)
    numbers = frozenset(paths.index(path) for path in chosen)
    bits = RegionBits([mask for _, mask in regions], length, numbers, start, stop)
    passes = ("cond", "perturbed")
    edits: list[Edit] = [
        RegionMask(
            q_bits=bits.queries,
            k_bits=bits.keys,
            attention=attention,
            # if guidance doubles the batch, one call has the texts of all passes
            passes=None if family.cfg_batch_order else passes,
        )
    ]
    if base_ratio:
        edits.append(MixBase(bits=bits, ratio=base_ratio, attention=attention, passes=passes))
    with _more_text_positions(model, family.name, length, len(regions)), steer(pipe, edits):
        return pipe(**arguments)


def _check(
    pipe: Any, prompt: str, regions: Sequence[tuple[str, torch.Tensor]], call: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Check the arguments of ``regional``, and return the denoiser and its family."""
    (model, family), *_ = known_denoisers(pipe).values()
    if family.name not in FAMILIES or not hasattr(pipe, "encode_prompt"):
        raise TypeError(
            f"pipe={type(pipe).__name__} must be a pipeline of {', '.join(FAMILIES)}: regional "
            "joins several texts, which other models do not support"
        )
    if getattr(model.config, "added_kv_proj_dim", None) is not None and family.cross:
        raise TypeError(
            f"pipe={type(pipe).__name__} has image embeddings before its text, so that texts "
            "cannot be joined; use a model without image embeddings"
        )
    if not isinstance(prompt, str):
        raise TypeError(f"prompt={prompt!r} must be one text, the base prompt")
    if not isinstance(regions, Sequence) or isinstance(regions, str) or not regions:
        raise ValueError(f"regions={regions!r} must be pairs of prompt and mask, at least one")
    if len(regions) > MAX_REGIONS:
        raise ValueError(f"regions has {len(regions)} regions; at most {MAX_REGIONS} are allowed")
    for number, pair in enumerate(regions):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or not isinstance(pair[1], torch.Tensor):
            raise TypeError(f"regions[{number}] must be a prompt and its mask, a tensor")
        mask = pair[1]
        if mask.ndim not in (2, 3) or not mask.numel() or mask.is_complex():
            raise ValueError(
                f"regions[{number}] has a mask of the shape {list(mask.shape)}; it must be "
                "[height, width] or [frames, height, width]"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"regions[{number}] has a mask with values outside 0 to 1")
    texts = [name for name in call if name.startswith("prompt") or name.endswith("prompt_embeds")]
    if texts:
        raise ValueError(
            f"{texts[0]}=... is not allowed; give the texts in prompt, regions and negative_prompt"
        )
    return model, family


def _encoded(
    pipe: Any, name: str, texts: list[str], call: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Return the arguments of the pipeline with the joined texts, and the number of tokens of each
    text."""
    arguments = dict(call)
    parameters = inspect.signature(kind_of(pipe).__call__).parameters
    count = 1
    for key in COUNTS:
        count = arguments.pop(key, None) or count
    default = parameters["max_sequence_length"].default
    options = {"max_sequence_length": arguments.get("max_sequence_length", default)}
    negative = arguments.get("negative_prompt")
    if isinstance(negative, str) and count > 1:
        arguments["negative_prompt"] = [negative] * count
    if name == "Wan":
        encoded = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **options)
        arguments["prompt_embeds"] = _joined(encoded[0], count)
        return arguments, encoded[0].shape[1]
    if name == "Flux":
        encoded = pipe.encode_prompt(texts, None, **options)
        arguments["prompt_embeds"] = _joined(encoded[0], count)
        arguments["pooled_prompt_embeds"] = encoded[1][:1].repeat(count, 1)
        return arguments, encoded[0].shape[1]
    options["do_classifier_free_guidance"] = False
    negatives = _negative(arguments, count)
    if name == "CogVideoX":
        encoded, encoded_negative = (
            pipe.encode_prompt(prompts, **options) for prompts in (texts, negatives)
        )
    else:
        options["clip_skip"] = arguments.get("clip_skip")
        encoded, encoded_negative = (
            pipe.encode_prompt(prompts, None, None, **options) for prompts in (texts, negatives)
        )
        arguments["pooled_prompt_embeds"] = encoded[2][:1].repeat(count, 1)
        arguments["negative_pooled_prompt_embeds"] = encoded_negative[2].repeat(
            count // len(negatives), 1
        )
    arguments["prompt_embeds"] = _joined(encoded[0], count)
    # repeated to the length of the joined texts; no query sees the copies
    arguments["negative_prompt_embeds"] = encoded_negative[0].repeat(
        count // len(negatives), len(texts), 1
    )
    return arguments, encoded[0].shape[1]


def _negative(arguments: dict[str, Any], count: int) -> list[str]:
    """Take the negative prompts out of the arguments, and return one, or one for each of ``count``
    images."""
    texts = [arguments.pop(f"negative_prompt{end}", None) or "" for end in ("", "_2", "_3")]
    if any(texts[1:]):
        raise ValueError(
            "negative_prompt_2 and negative_prompt_3 are not allowed; give negative_prompt"
        )
    negatives: list[str] = [texts[0]] if isinstance(texts[0], str) else list(texts[0])
    if len(negatives) not in (1, count):
        raise ValueError(f"negative_prompt has {len(negatives)} texts for {count} images; give one")
    return negatives


def _joined(texts: torch.Tensor, count: int) -> torch.Tensor:
    """Return texts ``[n, L, C]`` as one sequence, repeated ``count`` times: ``[count, n L, C]``."""
    return texts.flatten(0, 1)[None].repeat(count, 1, 1)


@contextmanager
def _more_text_positions(model: Any, name: str, length: int, regions: int) -> Iterator[None]:
    """Inside the ``with`` block, repeat the position embeddings of the text for each region, in
    CogVideoX models that add positions to their tokens.

    Args:
        model: the denoiser.
        name: name of its family.
        length: number of tokens of each text.
        regions: number of regions.
    """
    embed: Any = model.patch_embed if name == "CogVideoX" else None
    if not hasattr(embed, "pos_embedding"):
        yield
        return
    embedding, text_length = embed.pos_embedding, embed.max_text_seq_length
    if length != text_length:
        raise ValueError(
            f"max_sequence_length={length} must be {text_length}, the text length of the position "
            f"embedding of this {type(model).__name__}"
        )
    text, image = embedding[:, :text_length], embedding[:, text_length:]
    embed.pos_embedding = torch.cat([text.repeat(1, 1 + regions, 1), image], 1)
    embed.max_text_seq_length = text_length * (1 + regions)
    try:
        yield
    finally:
        embed.pos_embedding = embedding.to(embed.pos_embedding.device)
        embed.max_text_seq_length = text_length
