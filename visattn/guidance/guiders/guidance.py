"""Guidance by a perturbed pass: ``pred = u + g (c - u) + w (c - p)``, where ``p`` is the
conditional prediction with its attention perturbed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from visattn._arguments import check_number, check_window, in_window, is_number
from visattn.guidance.edits.block_edits import BlockEdit, ShuffleTokens, SkipBlock, SkipRandomBlocks
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.pag import Perturb, Target
from visattn.guidance.edits.query_edits import INFINITE, BlurQueries, Temperature
from visattn.guidance.edits.state import Stream
from visattn.guidance.head_set import HeadSet, Layers
from visattn.plan import Denoiser

__all__ = [
    "PAG",
    "SEG",
    "SLG",
    "STG",
    "CFGZeroStar",
    "Guidance",
    "InPass",
    "Policy",
    "S2Guidance",
    "SoftPAG",
    "TemperatureGuidance",
    "TokenPerturbation",
    "towards",
]

Policy = Literal["all", "image_rows", "ii_identity", "ii_renorm"]
TARGETS: dict[str, Target] = {"value": "value", "uniform": "mean", "mean_query": "mean_query"}


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps of a guidance, from ``start`` on and up to before ``stop``: an int is a step, a
    float a share of the steps."""

    start: int | float = 0
    stop: int | float = 1.0

    def active(self, step: int | None, steps: int | None) -> bool:
        """Whether it is used at a step.

        Raises:
            ValueError: it is for some steps, and the step is not known.
        """
        if self.start == 0 and self.stop == 1.0 and isinstance(self.stop, float):
            return True
        if step is None or steps is None:
            raise ValueError(
                f"{type(self).__name__} is for some steps, and the step is not known; guide the "
                "pipeline that runs"
            )
        return in_window(self.start, self.stop, step, steps)


@dataclass(frozen=True, kw_only=True)
class Guidance(Window):
    """What perturbed guidances have in common.

    Args:
        scale: ``w``; 0 changes nothing and costs nothing. Without classifier-free guidance the
            prediction is ``c + w (c - p)``.
    """

    scale: float = 3.0

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "scale", self.scale, "a finite number")
        check_window(type(self).__name__, self.start, self.stop)
        self.edits()

    def edits(self) -> list[Edit | BlockEdit]:
        """What perturbs the pass."""
        raise NotImplementedError

    def fits(self, denoisers: Mapping[str, Denoiser]) -> None:
        """Raise ValueError when the guidance is for other denoisers than these, by role."""


class InPass(ABC):
    """A guidance inside the passes that a pipeline makes, which puts itself there."""

    @abstractmethod
    def put(self, stack: ExitStack, pipe: Any) -> Callable[[], None]:
        """Put it on a pipeline, or a denoiser of one, until the stack is closed.

        Returns:
            What is called on leaving: it raises ValueError where no attention call was changed.
        """


@dataclass(frozen=True, init=False)
class SoftPAG(Guidance):
    """Heads are moved towards the identity by a strength (SoftPAG of "Where and How to Perturb",
    Ahn et al. 2025, arXiv 2506.10978).

    Args:
        heads: a HeadSet, or heads with strengths by layer, as in ``{3: {0: 1.0, 5: 0.5}}`` or ``{3:
            [0, 5]}``; None: all heads of all layers.
        strength: multiplies the heads' own; 1 is PAG.
        scale: ``w`` of ``w (c - p)``.
        policy: of the tokens of joint attention: ``all`` (text rows too, the paper's),
            ``image_rows``, ``ii_identity`` (image rows keep the text's logits and their own),
            ``ii_renorm`` (they keep the text's weights).
        target: ``value`` (identity), ``uniform`` or ``mean_query``; the last two with the policies
            ``all`` and ``image_rows``.

    Where strength, scale, policy or target are left out, they are those of the HeadSet, or else 1,
    3, ``all`` and ``value``.

    Source:
        Ahn et al. (2025), "Where and How to Perturb", arXiv
        2506.10978. Code: github.com/cvlab-kaist/HeadHunter (commit 3828d1c).
    Default:
        code. All rows of joint attention are moved, as in the published results.
    Differences:
        - ``scale`` is that of the published results, 3; the command line of the code has 5.
    """

    heads: HeadSet | Mapping[int | str, object] | None = None
    strength: float = 1.0
    policy: Policy = "all"
    target: Literal["value", "uniform", "mean_query"] = "value"

    def __init__(
        self,
        heads: HeadSet | Mapping[int | str, object] | None = None,
        strength: float | None = None,
        scale: float | None = None,
        *,
        policy: Policy | None = None,
        target: Literal["value", "uniform", "mean_query"] | None = None,
        start: int | float = 0,
        stop: int | float = 1.0,
    ) -> None:
        own = heads if isinstance(heads, HeadSet) else HeadSet({})
        strength = own.strength if strength is None else strength
        scale = (3.0 if own.scale is None else own.scale) if scale is None else scale
        policy = own.policy or "all" if policy is None else policy  # type: ignore[assignment]
        target = own.target or "value" if target is None else target  # type: ignore[assignment]
        given = locals()
        for name in ("heads", "strength", "scale", "policy", "target", "start", "stop"):
            object.__setattr__(self, name, given[name])
        if not isinstance(heads, (HeadSet, Mapping, type(None))):
            raise TypeError(
                f"SoftPAG(heads={heads!r}) must be a HeadSet, heads by layer as in {{3: [0, 5]}}, "
                "or None"
            )
        check_number("SoftPAG", "strength", strength, "from 0 to 1", lambda own: 0 <= own <= 1)
        if policy not in ("all", "image_rows", "ii_identity", "ii_renorm"):
            raise ValueError(
                f"SoftPAG(policy={policy!r}) must be all, image_rows, ii_identity or ii_renorm"
            )
        if target not in TARGETS or (policy.startswith("ii") and target != "value"):
            raise ValueError(
                f"SoftPAG(target={target!r}, policy={policy!r}): targets are value, uniform and "
                "mean_query, the last two with the policies all and image_rows"
            )
        self.__post_init__()

    def edits(self) -> list[Edit | BlockEdit]:
        target, stream = towards(self.policy, self.target)
        out: list[Edit | BlockEdit] = []
        for layers, heads in _groups(self.heads, self.strength):
            out.append(Perturb(layers=layers, heads=heads, target=target, stream=stream))
        return out

    def fits(self, denoisers: Mapping[str, Denoiser]) -> None:
        if isinstance(self.heads, HeadSet):
            self.heads.fits(denoisers)


def towards(policy: str, target: str) -> tuple[Target, Stream]:
    """What heads are moved towards by a policy and target of SoftPAG, and in whose rows."""
    named: dict[str, Target] = {"ii_identity": "self_and_text", "ii_renorm": "self_for_image"}
    return named.get(policy, TARGETS[target]), "all" if policy == "all" else "image"


def _groups(
    heads: HeadSet | Mapping[int | str, object] | None, strength: float
) -> list[tuple[Layers, dict[int, float] | float]]:
    """Heads with strengths, layer by layer."""
    if heads is None:
        return [(None, float(strength))]
    own: Mapping[int | str, object] = heads.layers if isinstance(heads, HeadSet) else heads  # type: ignore[assignment]
    out: list[tuple[Layers, dict[int, float] | float]] = []
    for layer, chosen in own.items():
        if isinstance(chosen, Mapping):
            out.append(([layer], {n: strength * u for n, u in chosen.items()}))
        elif chosen is None:
            out.append(([layer], float(strength)))
        else:
            items = [chosen] if isinstance(chosen, int) else chosen
            if not isinstance(items, Sequence) or isinstance(items, str):
                raise TypeError(f"heads has {chosen!r} for layer {layer!r}; give numbers of heads")
            out.append(([layer], dict.fromkeys(items, strength)))
    if not out:
        raise ValueError("heads names no head; None is all of them")
    return out


@dataclass(frozen=True, kw_only=True)
class PAG(Guidance):
    """Perturbed attention guidance: the identity for whole layers (Ahn et al. 2024, arXiv
    2403.17377).

    Args:
        layers: numbers or paths of attention layers; None: all.
        policy: as of SoftPAG.

    Source:
        Ahn et al. (2024), "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
        arXiv 2403.17377. Code: github.com/huggingface/diffusers (commit ff0f7af), the attention
        processor of its pipeline for Stable Diffusion 3.
    Default:
        code. It is the only published form for joint attention; without text tokens it is the
        paper's identity.
    Differences:
        - By default all layers are perturbed; published settings name one or a few.
    """

    layers: Layers = None
    policy: Policy = "ii_identity"

    def edits(self) -> list[Edit | BlockEdit]:
        layers = self.layers
        every = [layers] if isinstance(layers, (int, str)) else layers
        if not isinstance(every, (Sequence, type(None))):
            raise TypeError(f"PAG(layers={layers!r}) must be numbers or paths of layers, or None")
        chosen = None if every is None else dict.fromkeys(every)
        return SoftPAG(chosen, policy=self.policy).edits()


@dataclass(frozen=True, kw_only=True)
class SEG(Guidance):
    """Smoothed energy guidance: blurred queries (Hong 2024, arXiv 2408.00760).

    Args:
        layers: as of PAG.
        sigma: in tokens, infinite by default: the mean query.
        whole_kernel: as of BlurQueries.

    Source:
        Hong (2024), "Smoothed Energy Guidance", arXiv 2408.00760. Code:
        github.com/SusungHong/SEG-SDXL (commit cf8256d).
    Default:
        code.
    Differences:
        - On a grid that is not square each axis limits its own taps; the code takes the width for
          both.
        - The axis of frames is blurred too; the code is for images.
    """

    layers: Layers = None
    sigma: float = INFINITE + 1
    whole_kernel: bool = False

    def edits(self) -> list[Edit | BlockEdit]:
        return [
            BlurQueries(layers=self.layers, sigma=self.sigma, whole_kernel=self.whole_kernel)
        ]


@dataclass(frozen=True, kw_only=True)
class SLG(Guidance):
    """Skip layer guidance: blocks are skipped.

    Args:
        blocks: numbers of blocks; scale, start, stop: those of SD3.5 medium by default.

    Source:
        Stability AI, the release of Stable Diffusion 3.5 medium; `skip_guidance_layers` of
        diffusers has the same rule.
    Default:
        own. There is no publication; blocks, scale and window are those of that release.
    Differences:
        none
    """

    start: int | float = 0.01
    stop: int | float = 0.2
    scale: float = 2.8
    blocks: int | Sequence[int] = (7, 8, 9)

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipBlock(blocks=self.blocks)]


@dataclass(frozen=True, kw_only=True)
class STG(Guidance):
    """Spatiotemporal skip guidance: blocks, or their attention, are skipped (Hyung et al. 2024,
    arXiv 2411.18664).

    Args:
        blocks: numbers of blocks. Those of the released pipelines, which skip whole blocks: 11 of
            CogVideoX, 2 of HunyuanVideo, 19 of LTX, 34 of Mochi.
        what: ``block`` or ``attention``.

    Source:
        Hyung et al. (2024), "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling",
        arXiv 2411.18664. Code: github.com/junhahyung/STGuidance (commit f2b7482).
    Default:
        code. The released pipelines skip whole blocks; the paper has ``attention`` too.
    Differences:
        - The code can rescale the guided prediction (0.7); this does not.
    """

    scale: float = 1.0
    blocks: int | Sequence[int] = 11
    what: Literal["attention", "block"] = "block"

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipBlock(blocks=self.blocks, what=self.what)]


@dataclass(frozen=True, kw_only=True)
class TemperatureGuidance(Guidance):
    """The perturbed pass has attention of another temperature (as the image part of entropy
    rectifying guidance, Berrada Ifriqi et al. 2025, arXiv 2504.13987).

    Args:
        layers: as of PAG; temperature: above 1 flatter, below 1 sharper.

    Source:
        Berrada Ifriqi et al. (2025), "Entropy Rectifying Guidance", arXiv 2504.13987.
    Default:
        paper. No code is known.
    Differences:
        - Only the part for the image is here; the part in the text encoder is not.
        - ``temperature`` is one for all layers and steps; the paper picks layers and a first step.
    """

    layers: Layers = None
    temperature: float = 2.0

    def edits(self) -> list[Edit | BlockEdit]:
        return [Temperature(layers=self.layers, temperature=self.temperature)]


@dataclass(frozen=True, kw_only=True)
class TokenPerturbation(Guidance):
    """Token perturbation guidance: blocks get their tokens in another order (Rajabi et al. 2025,
    arXiv 2506.10036).

    Args:
        blocks: numbers of blocks; share: of the tokens; seed: of the orders.

    Source:
        Rajabi et al. (2025), "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
    Default:
        paper. Its code was not compared with.
    Differences:
        - The paper names blocks of UNets; the first four blocks are a choice of this project.
    """

    blocks: int | Sequence[int] = (0, 1, 2, 3)
    share: float = 1.0
    seed: int = 0

    def edits(self) -> list[Edit | BlockEdit]:
        return [ShuffleTokens(blocks=self.blocks, share=self.share, seed=self.seed)]


@dataclass(frozen=True, kw_only=True)
class S2Guidance(Guidance):
    """The perturbed pass leaves out random blocks, others at every step (S2-Guidance, Chen et al.
    2025, arXiv 2508.12880).

    Args:
        share: of the blocks; seed: of the choice.

    Source:
        Chen et al. (2025), "S2-Guidance", arXiv 2508.12880.
    Default:
        paper. No code was released.
    Differences:
        - At least one block is left out.
    """

    scale: float = 1.0
    share: float = 0.1
    seed: int = 0

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipRandomBlocks(share=self.share, seed=self.seed)]


@dataclass(frozen=True)
class CFGZeroStar:
    """CFG-Zero* for flow matching (Fan et al. 2025, arXiv 2503.18886): the unconditional prediction
    is scaled by ``s = <c, u> / |u|^2``, and the first steps give 0. No further pass. With
    perturbed guidance ``w (c - p)`` is added.

    Args:
        zero_init: steps that give 0: an int counts them, a float is a share of the steps. The
            authors' ``zero_steps=n`` is ``zero_init=n + 1`` here.

    Source:
        Fan et al. (2025), "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models",
        arXiv 2503.18886. Code: github.com/WeichenFan/CFG-Zero-star (commit 3162be1).
    Default:
        code. ``zero_init=1`` is the default of its function.
    Differences:
        - Its scripts for Wan and HunyuanVideo give 0 in two steps, which is ``zero_init=2`` here.
    """

    zero_init: int | float = 1

    def __post_init__(self) -> None:
        first = self.zero_init
        if not is_number(first) or first < 0 or (isinstance(first, float) and first > 1):
            raise ValueError(
                f"CFGZeroStar(zero_init={first!r}) must be a number of steps, or a share of the "
                "steps from 0.0 to 1.0"
            )
