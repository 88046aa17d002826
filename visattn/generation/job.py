"""One generation: its prompt and options, and the frames that a pipeline makes."""

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
from visattn.runtime.private_names import (
    execution_device,
    progress_bar_settings,
    set_progress_bar_settings,
)
from visattn.runtime.progress import Progress

__all__ = ["FPS", "Job", "Result", "run_job"]

COUNTS = ("height", "width", "num_frames", "num_inference_steps")
SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
# Fields of a job that are passed to the pipeline's call under the same names if they are given.
CALL = ("prompt", "negative_prompt", *COUNTS, *SCALES, "image")
MAX_SEED = 2**63 - 1
FPS = 16.0  # frames per second for pipelines of unknown families


@dataclass(frozen=True)
class Job:
    """One generation. Fields that are None use the default of the pipeline.

    Args:
        prompt: the prompt.
        negative_prompt: the negative prompt.
        seed: seed of the noise, at least 0 and below 2^63. The generator is on the CPU, so that the
            noise is the same on every device.
        height: height in pixels, at least 1.
        width: width in pixels, at least 1.
        num_frames: number of frames, at least 1.
        num_inference_steps: number of denoising steps, at least 1.
        guidance_scale: scale of classifier-free guidance. For guidance-distilled models
            (HunyuanVideo, Flux.1) it is an embedded input of the model.
        guidance_scale_2: guidance scale of the second denoiser, if there are two. The default is
            ``guidance_scale``.
        true_cfg_scale: scale of classifier-free guidance for guidance-distilled models.
        image: file of the first frame, for image-to-video pipelines.
        fps: frames per second of an mp4, above 0 and at most 1000. The default is that of the
            model.
        guidance: guidances and edits of ``visattn.guidance``, as objects or in written form.

    Raises:
        TypeError: a field has another type.
        ValueError: a field is out of its range.

    Example:
        >>> from visattn.generation import Job
        >>> Job("a cat", seed=7, num_frames=9).record()["num_frames"]
        9
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
        for guidance in self.guidance:
            _check_unicode("guidance", guidance_text(guidance))

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the hash of the image file."""
        out = asdict(replace(self, guidance=()))
        out["guidance"] = [guidance_text(guidance) for guidance in self.guidance]
        if self.image is not None:
            out["image_sha256"] = sha256_of(self.image)
        return out


def _check_unicode(name: str, text: str) -> None:
    """Refuse text that tokenizers cannot encode: unpaired surrogates, which Python also uses for
    bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={shown(text)} contains {text[error.start]!r}, which is no Unicode character; "
            "write it in UTF-8"
        ) from None


@dataclass(frozen=True)
class Result:
    """The frames of a generation, with times and notes.

    Attributes:
        frames: float32 ``[T, H, W, 3]`` in [0, 1] on the CPU, before any encoding.
        seconds: time of the whole call: text encoder, denoising, decoder.
        step_seconds: time of each denoising step except the first, whose start is not observed.
        settings: the arguments of the call, with the defaults of the pipeline, and the frames per
            second of a video.
        notes: warnings of diffusers and visattn, and differences from the requested sizes.

    Example:
        >>> from visattn.generation import Job, run_job
        >>> job = Job("a cat", height=32, width=32, num_frames=5, num_inference_steps=2)
        >>> result = run_job(pipe, job)
        >>> len(result.step_seconds), result.settings["num_inference_steps"]
        (1, 2)
    """

    frames: torch.Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]


def run_job(pipe: Any, job: Job, *, progress: Progress | None = None) -> Result:
    """Run a diffusers pipeline once.

    Args:
        pipe: the pipeline.
        job: the prompt and its options.
        progress: called after each denoising step.

    Returns:
        The frames, with times and notes.

    Raises:
        TypeError: the pipeline refuses an argument.
        ValueError: the pipeline refuses an argument or does not have it, its plan does not fit the
            grid, or a guidance does not fit the model or was never applied.
        OSError: the image cannot be read.
        GenerationError: the pipeline failed, ran out of memory, or made frames that are not finite.

    Example:
        >>> from visattn.generation import Job, run_job
        >>> job = Job("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        >>> run_job(pipe, job).frames.shape
        torch.Size([5, 32, 32, 3])
    """
    options = _call_options(pipe, job)
    settings = _settings(pipe, options)
    if "num_frames" in _parameters(pipe):
        settings["fps"] = frame_rate(pipe) if job.fps is None else job.fps
    options["generator"] = torch.Generator("cpu").manual_seed(job.seed)
    options["output_type"] = "pt"
    bars = progress_bar_settings(pipe)
    with quiet() as log_lines, cut_texts(pipe) as cut:
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
        except Exception as error:  # libraries raise errors of many types
            raise GenerationError(f"{type(pipe).__name__} failed: {sentence(error)}") from error
        finally:
            set_progress_bar_settings(pipe, bars)
        seconds = time.perf_counter() - started
    return Result(
        frames=frames,
        seconds=seconds,
        step_seconds=tuple(b - a for a, b in itertools.pairwise(ends)),
        settings=settings,
        notes=(*log_lines, *cut, *_differences(job, frames)),
    )


def frame_rate(pipe: Any) -> float:
    """Return the frames per second of the videos of a pipeline: those of its family, or 16 if the
    family is not known."""
    families = filter(None, map(family_of, models_of(pipe).values()))
    return next((family.frame_rate(pipe) for family in families), FPS)


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind_of(pipe).__call__).parameters)


def _call_options(pipe: Any, job: Job) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that the job has."""
    from visattn.media.video import read_picture

    parameters, kind = _parameters(pipe), type(pipe).__name__
    options = {name: value for name in CALL if (value := getattr(job, name)) is not None}
    for name in options:
        if name not in parameters:
            remedy = "; or use an image-to-video model" if name == "image" else ""
            raise ValueError(f"{kind} takes no {name}; leave it out{remedy}")
    if job.negative_prompt is not None and "true_cfg_scale" in parameters:
        scale = options.get("true_cfg_scale", parameters["true_cfg_scale"].default)
        if not scale > 1:
            raise ValueError(
                f"{kind} ignores negative_prompt at true_cfg_scale={scale:g}; give a "
                "true_cfg_scale above 1, which runs a second pass, or leave negative_prompt out"
            )
    elif job.true_cfg_scale is not None and job.true_cfg_scale > 1:
        raise ValueError(
            f"{kind} ignores true_cfg_scale={job.true_cfg_scale:g} without a negative_prompt; give "
            "a negative_prompt, which may be empty"
        )
    elif (job.negative_prompt or "").strip() and "guidance_scale" in parameters:
        scale = options.get("guidance_scale", parameters["guidance_scale"].default)
        if isinstance(scale, (int, float)) and not scale > 1:
            raise ValueError(
                f"{kind} ignores negative_prompt at guidance_scale={scale:g}; give a "
                "guidance_scale above 1, which runs a second pass, or use --guidance "
                "\"NAG(negative_prompt='TEXT')\", which runs none, instead of negative_prompt"
            )
    if job.image is not None:
        options["image"] = read_picture(job.image)
    elif "image" in parameters and parameters["image"].default is inspect.Parameter.empty:
        raise ValueError(f"{kind} needs an image for the first frame; give --image FILE")
    return options


def _settings(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments and the defaults of those not given, as far as they are JSON values."""
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
    """Return the callback after a denoising step. It waits for the device, so that the times are
    correct."""

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        device = torch.device(execution_device(pipe) or "cpu")
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        ends.append(time.perf_counter())
        total = getattr(pipe, "num_timesteps", None) or job.num_inference_steps or step + 1
        if progress is not None:
            mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
            seconds_left = None if mean is None else mean * (total - step - 1)
            progress("step", step + 1, total, seconds_left)
        return kwargs

    return on_step_end


def _frames(pipe: Any, output: Any) -> torch.Tensor:
    """Return the frames ``[T, H, W, 3]`` of the first video or image of a pipeline's output."""
    videos = getattr(output, "frames", None)
    if videos is None:
        videos = getattr(output, "images", None)
    if not isinstance(videos, torch.Tensor) or videos.ndim not in (4, 5):
        raise GenerationError(f"{type(pipe).__name__} made no frames but {type(videos).__name__}")
    first = videos[0] if videos.ndim == 5 else videos[:1]  # [T, C, H, W]
    frames = first.permute(0, 2, 3, 1).float().cpu().contiguous()
    if not bool(torch.isfinite(frames).all()):
        raise GenerationError(
            f"{type(pipe).__name__} made frames that are not finite; try --dtype float32"
        )
    return frames.clamp(0, 1)


def _differences(job: Job, frames: torch.Tensor) -> list[str]:
    """Return a note for each size that the pipeline rounded."""
    made = dict(zip(("num_frames", "height", "width"), frames.shape[:3], strict=True))
    return [
        f"{name} is {value} instead of the requested {getattr(job, name)}"
        for name, value in made.items()
        if getattr(job, name) not in (None, value)
    ]
