"""The options of the commands that generate, named as ``diffusers-cli run`` names them."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from visattn.attention.choice import BACKENDS, choose_backend
from visattn.generation import Loading, Lora, default_model, shape_of
from visattn.generation.loading import pick_device
from visattn.plan import Plan, read_plan

__all__ = [
    "add_job_arguments",
    "add_model_arguments",
    "given_options",
    "job_fields",
    "read_loading",
    "read_one_plan",
]

JOB_OPTIONS = {
    "negative_prompt": (str, "TEXT", "text that describes what the video must not show"),
    "seed": (int, "N", "seed of the noise (default 0)"),
    "height": (int, "N", "pixels (default: the model's)"),
    "width": (int, "N", "pixels (default: the model's)"),
    "num_frames": (int, "N", "frames (default: the model's)"),
    "num_inference_steps": (int, "N", "denoising steps (default: the model's)"),
    "guidance_scale": (float, "X", "guidance scale (default: the model's)"),
    "guidance_scale_2": (
        float,
        "X",
        "guidance scale of the second denoiser (default: --guidance-scale)",
    ),
    "true_cfg_scale": (
        float,
        "X",
        "classifier-free guidance scale for guidance-distilled models (HunyuanVideo, Flux.1), "
        "whose --guidance-scale is an embedded input",
    ),
    "fps": (float, "X", "frames per second of an mp4 (default: the model's)"),
    "image": (str, "FILE", "the first frame, for image-to-video pipelines"),
}
MODEL_OPTIONS = {
    "model": ("-m", "MODEL", "folder or Hugging Face hub id of a diffusers pipeline"),
    "dtype": (
        None,
        "DTYPE",
        "float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)",
    ),
    "device": (None, "DEVICE", "cuda, cuda:1, mps, cpu (default: the accelerator, else the CPU)"),
    "device_map": (None, "MAP", "'balanced' over all GPUs, or a device"),
    "cpu_offload": (
        None,
        "HOW",
        "model, group or sequential: keep parts of the model in CPU memory",
    ),
    "variant": (None, "NAME", "variant of the weights, as in fp16"),
    "revision": (None, "REV", "branch, tag or commit of the model"),
    "token": (None, "TOKEN", "Hugging Face token; it is not recorded"),
    "attention_backend": (None, "NAME", "attention backend of diffusers for dense attention"),
}


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a Job."""
    group = parser.add_argument_group("options of the generation")
    group.add_argument(
        "--shape",
        metavar="NAME",
        help="named sizes, steps and guidance scales from visattn_shapes.json in the model's "
        "folder (default: 'default', if the file has it)",
    )
    for name, (kind, metavar, text) in JOB_OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the pipeline and the plan."""
    group = parser.add_argument_group("options of the pipeline")
    for name, (short, metavar, text) in MODEL_OPTIONS.items():
        group.add_argument(*filter(None, (_flag(name), short)), metavar=metavar, help=text)
    group.add_argument(
        "--lora",
        action="append",
        metavar="LORA",
        help='path or hub id, or \'{"lora_id": ..., "lora_scale": 0.8}\', with "weight_name" for a '
        'file of a folder and "role" for one of two denoisers (default: both); repeat for several',
    )
    for name, text in (
        ("trust_remote_code", "run code of the model's repository"),
        ("vae_tiling", "decode in tiles, to save memory"),
        ("vae_slicing", "decode videos one by one, to save memory"),
    ):
        group.add_argument(_flag(name), action="store_true", default=None, help=text)
    group.add_argument(
        "--compile",
        nargs="?",
        const='{"fullgraph": true}',
        metavar="JSON",
        help="torch.compile the blocks, with these arguments (default %(const)s)",
    )
    group.add_argument(
        "--plan",
        metavar="PLAN",
        help="'none' (the default: dense), 'auto' (the plan in the model's folder), a plan's file, "
        "folder or hub id, or a pattern such as 'radial(decay=0.2)'",
    )
    group.add_argument(
        "--backend", choices=BACKENDS, help="backend of sparse attention (default auto)"
    )


def given_options(args: argparse.Namespace) -> list[str]:
    """Return the flags of the groups above that were given."""
    names = (
        "shape",
        *JOB_OPTIONS,
        *MODEL_OPTIONS,
        *("lora", "trust_remote_code", "vae_tiling", "vae_slicing", "compile", "plan", "backend"),
    )
    return [_flag(name) for name in names if getattr(args, name) is not None]


def job_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a Job: those that were given, else those of the model's shape.

    Raises:
        ValueError: the model has no such shape.
    """
    given = {name: value for name in JOB_OPTIONS if (value := getattr(args, name)) is not None}
    return {**shape_of(_model(args), args.shape), **given}


def _model(args: argparse.Namespace) -> str:
    return default_model() if args.model is None else str(args.model)


def read_loading(args: argparse.Namespace) -> Loading:
    """Return the pipeline of the arguments.

    Raises:
        ValueError: an option is invalid.
    """
    if args.device is not None and args.device_map is not None:
        raise ValueError("--device and --device-map exclude each other; give one of them")
    if args.device_map is not None and args.device_map.lstrip().startswith("{"):
        raise ValueError(f"--device-map {args.device_map} must be 'balanced' or a device")
    return Loading(
        model=_model(args),
        dtype=args.dtype or "auto",
        device=args.device or args.device_map,
        cpu_offload=args.cpu_offload,
        loras=tuple(map(Lora.read, args.lora or ())),
        variant=args.variant,
        revision=args.revision,
        token=args.token,
        trust_remote_code=bool(args.trust_remote_code),
        attention_backend=args.attention_backend,
        vae_tiling=bool(args.vae_tiling),
        vae_slicing=bool(args.vae_slicing),
        compile=None if args.compile is None else _read_compile(args.compile),
    )


def read_one_plan(text: str | None, loading: Loading, backend: str) -> Plan | None:
    """Read the plan of an option, or None, and check the backend before a model is loaded.

    Raises:
        TypeError: the plan is invalid.
        ValueError: there is no such plan.
        OSError: a file cannot be read.
        BackendUnavailable: the backend cannot run on the device.
    """
    device = None if loading.device == "balanced" else loading.device
    choose_backend(backend, torch.empty(1, 1, 1, 64, device=pick_device(device)))
    if text is None:
        return None
    revision = loading.revision if text.lower() == "auto" else None  # the revision of the model
    return read_plan(text, model_path=loading.model, revision=revision, token=loading.token)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_compile(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--compile {text!r} must be a JSON object of arguments of torch.compile")
    return value
