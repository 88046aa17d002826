"""One generation: what it is asked for, and the frames that a pipeline makes of it."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from visattn._arguments import is_integer, is_number
from visattn._atomic import sha256_of
from visattn.generation.cut_texts import cut_texts
from visattn.generation.errors import REFUSALS, GenerationError, reason, sentence
from visattn.generation.silence_logs import quiet
from visattn.guidance.registry import guided, parse_guidances
from visattn.guidance.written_form import guidance_text
from visattn.inject.hooks.class_swap import kind_of
from visattn.inject.models.denoisers import family_of, models_of
from visattn.plan.json_format import shown
from visattn.runtime.progress import Progress

__all__ = ["FPS", "Job", "Result", "run_job"]

COUNTS = ("height", "width", "num_frames", "num_inference_steps")
# Fields of a job that go into the pipeline's call under their own names, when they are given.
SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
CALL = ("prompt", "negative_prompt", *COUNTS, *SCALES, "image")
MAX_SEED = 2**63 - 1
FPS = 16.0  # of a pipeline whose family has no rate of its own


@dataclass(frozen=True)
class Job:
    """One generation. What is None is left to the pipeline.

    Args:
        prompt, negative_prompt: text.
        seed: of a generator on the CPU, so that the noise is the same on every device; at least 0
            and below 2^63.
        height, width: in pixels; num_frames; num_inference_steps: denoising steps; each at least 1.
        guidance_scale, true_cfg_scale: finite; where a pipeline takes both, the first is what its
            model is told, and the second that of classifier-free guidance.
        guidance_scale_2: of the second denoiser, where there are two; None is ``guidance_scale``.
        image: file of the first frame, for image-to-video pipelines.
        fps: frames per second of an mp4, above 0 and at most 1000; None is that of the model.
        guidance: guidances and edits of ``visattn.guidance``, one or several, as objects or in
            their text form.

    Raises:
        TypeError, ValueError: a field is something else.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    image: str | None = None
    fps: float | None = None
    guidance: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "image"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "prompt"):
                raise TypeError(f"{name}={shown(value)} must be text")
        _check_unicode("prompt", self.prompt)
        _check_unicode("negative_prompt", self.negative_prompt or "")
        for name in (*COUNTS, "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is None and name != "seed":
                continue
            if not is_integer(value):
                raise TypeError(f"{name}={shown(value)} must be an integer")
            if not least <= value <= MAX_SEED:
                raise ValueError(f"{name}={shown(value)} must be at least {least} and below 2**63")
        for name in (*SCALES, "fps"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_number(value):
                raise TypeError(f"{name}={shown(value)} must be a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must be above 0 and at most 1000")
        object.__setattr__(self, "guidance", parse_guidances(self.guidance))
        for own in self.guidance:
            _check_unicode("guidance", guidance_text(own))

    def record(self) -> dict[str, Any]:
        """The fields as JSON values, and the hash of the image file."""
        out = asdict(replace(self, guidance=()))
        out["guidance"] = [guidance_text(own) for own in self.guidance]
        if self.image is not None:
            out["image_sha256"] = sha256_of(self.image)
        return out


def _check_unicode(name: str, text: str) -> None:
    """Refuse text that no tokenizer takes: half of a surrogate pair, and bytes that Python could
    not read as UTF-8 and keeps as such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={shown(text)} holds {text[error.start]!r}, which is no character of Unicode; "
            "write it in UTF-8"
        ) from None


@dataclass(frozen=True)
class Result:
    """What a pipeline made.

    Args:
        frames: float32 ``[T, H, W, 3]`` in [0, 1] on the CPU, before any encoding.
        seconds: of the whole call: text encoder, denoising, decoder.
        step_seconds: of each denoising step but the first, whose beginning is not seen.
        settings: the values that the call ran with, the pipeline's defaults among them, and of a
            video its frames per second.
        notes: what diffusers and visattn had to say, and what differs from what was asked for.
    """

    frames: torch.Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]


def run_job(pipe: Any, job: Job, *, progress: Progress | None = None) -> Result:
    """Run a diffusers pipeline once.

    Raises:
        TypeError, ValueError: the pipeline refuses the job, or takes no such option; its plan does
            not fit the grid; a guidance names what there is not, or changed nothing.
        OSError: the image cannot be read.
        GenerationError: the pipeline broke down, ran out of memory, or made no finite frames.
    """
    options = _call_options(pipe, job)
    settings = _settings(pipe, options)
    if "num_frames" in _parameters(pipe):
        settings["fps"] = frame_rate(pipe) if job.fps is None else job.fps
    options["generator"] = torch.Generator("cpu").manual_seed(job.seed)
    options["output_type"] = "pt"
    bars = getattr(pipe, "_progress_bar_config", None)
    with quiet() as said, cut_texts(pipe) as cut:
        started = time.perf_counter()
        ends: list[float] = []
        if "callback_on_step_end" in _parameters(pipe):
            options["callback_on_step_end"] = _watcher(ends, job, progress)
        pipe.set_progress_bar_config(disable=True)
        try:
            with guided(pipe, job.guidance):
                output = pipe(**options)
            frames = _frames(pipe, output)
        except torch.OutOfMemoryError as error:
            raise GenerationError(
                f"out of memory: {reason(error)}; use --cpu-offload model, --vae-tiling, fewer "
                f"frames or a smaller size"
            ) from error
        except REFUSALS:
            raise
        except Exception as error:  # libraries raise all kinds
            raise GenerationError(f"{type(pipe).__name__} broke down: {sentence(error)}") from error
        finally:
            pipe._progress_bar_config = bars if bars is not None else {}
        seconds = time.perf_counter() - started
    return Result(
        frames=frames,
        seconds=seconds,
        step_seconds=tuple(b - a for a, b in itertools.pairwise(ends)),
        settings=settings,
        notes=(*said, *cut, *_differences(job, frames)),
    )


def frame_rate(pipe: Any) -> float:
    """Frames per second of the videos that a pipeline makes: as its family's authors have it, and
    16 for a family that is not known."""
    families = filter(None, map(family_of, models_of(pipe).values()))
    return next((family.frame_rate(pipe) for family in families), FPS)


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind_of(pipe).__call__).parameters)


def _call_options(pipe: Any, job: Job) -> dict[str, Any]:
    """The arguments of the pipeline's call that the job gives."""
    from visattn.media.video import read_picture

    parameters, kind = _parameters(pipe), type(pipe).__name__
    options = {name: value for name in CALL if (value := getattr(job, name)) is not None}
    for name in options:
        if name not in parameters:
            remedy = "; take an image-to-video model" if name == "image" else ""
            raise ValueError(f"{kind} takes no {name}; leave it out{remedy}")
    if job.negative_prompt is not None and "true_cfg_scale" in parameters:
        scale = options.get("true_cfg_scale", parameters["true_cfg_scale"].default)
        if not scale > 1:
            raise ValueError(
                f"negative_prompt is not looked at by {kind} at true_cfg_scale={scale:g}; give a "
                "true_cfg_scale above 1, which takes a second pass, or leave negative_prompt out"
            )
    elif job.true_cfg_scale is not None and job.true_cfg_scale > 1:
        raise ValueError(
            f"true_cfg_scale={job.true_cfg_scale:g} guides away from a negative_prompt, without "
            f"which {kind} does not look at it; give negative_prompt, if only an empty one"
        )
    elif (job.negative_prompt or "").strip() and "guidance_scale" in parameters:
        scale = options.get("guidance_scale", parameters["guidance_scale"].default)
        if isinstance(scale, (int, float)) and not scale > 1:
            raise ValueError(
                f"negative_prompt is not looked at by {kind} at guidance_scale={scale:g}; give a "
                "guidance_scale above 1, which takes a second pass, or leave negative_prompt out "
                "and give --guidance \"NAG(negative_prompt='TEXT')\", which takes none"
            )
    if job.image is not None:
        options["image"] = read_picture(job.image)
    elif "image" in parameters and parameters["image"].default is inspect.Parameter.empty:
        raise ValueError(f"{kind} needs the image that it begins with; give --image FILE")
    return options


def _settings(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and the defaults of what was left out, as far as they are JSON values."""
    defaults = {
        name: parameter.default
        for name, parameter in _parameters(pipe).items()
        if isinstance(parameter.default, (int, float, str, type(None)))
    }
    given = {name: value for name, value in options.items() if name != "image"}
    names = (*CALL, "max_sequence_length", "eta", "use_dynamic_cfg")
    values = defaults | given
    return {name: values[name] for name in names if name in values and name != "image"}


def _watcher(
    ends: list[float], job: Job, progress: Progress | None
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """The callback after a denoising step; it waits for the device, so that times are true."""

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        device = torch.device(getattr(pipe, "_execution_device", None) or "cpu")
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        ends.append(time.perf_counter())
        total = getattr(pipe, "num_timesteps", None) or job.num_inference_steps or step + 1
        if progress is not None:
            mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
            left = None if mean is None else mean * (total - step - 1)
            progress("step", step + 1, total, left)
        return kwargs

    return on_step_end


def _frames(pipe: Any, output: Any) -> torch.Tensor:
    """``[T, H, W, 3]`` of the first video or image of a pipeline's output."""
    found = getattr(output, "frames", None)
    if found is None:
        found = getattr(output, "images", None)
    if not isinstance(found, torch.Tensor) or found.ndim not in (4, 5):
        raise GenerationError(f"{type(pipe).__name__} made no frames but {type(found).__name__}")
    first = found[0] if found.ndim == 5 else found[:1]  # [T, C, H, W]
    frames = first.permute(0, 2, 3, 1).float().cpu().contiguous()
    if not bool(torch.isfinite(frames).all()):
        raise GenerationError(
            f"{type(pipe).__name__} made frames that are not finite; try --dtype float32"
        )
    return frames.clamp(0, 1)


def _differences(job: Job, frames: torch.Tensor) -> list[str]:
    """Where the pipeline rounded what it was asked for."""
    made = dict(zip(("num_frames", "height", "width"), frames.shape[:3], strict=True))
    return [
        f"{name} is {value}, not the {getattr(job, name)} that was asked for"
        for name, value in made.items()
        if getattr(job, name) not in (None, value)
    ]
