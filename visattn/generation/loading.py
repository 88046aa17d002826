"""A diffusers pipeline, loaded as the options of ``diffusers-cli run`` say."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from visattn._arguments import is_number
from visattn.generation.checksums import check_checksums
from visattn.generation.errors import reason
from visattn.generation.silence_logs import quiet
from visattn.plan import ROLES
from visattn.runtime.processes import device_of_process, one_process, processes

__all__ = [
    "DTYPES",
    "OFFLOADS",
    "Loading",
    "Lora",
    "default_model",
    "load_pipeline",
    "lora_notes",
    "pick_device",
]

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
OFFLOADS = ("model", "group", "sequential")
INDEX = "model_index.json"
SMALL_MODEL = Path(__file__).resolve().parents[2] / "assets" / "models" / "tiny-wan"
# By its authors' advice this VAE decodes in float32 whatever the denoiser runs in.
FLOAT32_VAE = "AutoencoderKLWan"


def default_model() -> str:
    """The model of those who name none: the small one that lies in a checkout of visattn.

    Raises:
        ValueError: this is no checkout, or one without it.
    """
    if not (SMALL_MODEL / INDEX).is_file():
        raise ValueError(
            "no --model is given, and this installation has no small model of its own: give the "
            "folder or the hub id of a diffusers pipeline, or run from a checkout that has "
            "assets/models/tiny-wan"
        )
    return str(SMALL_MODEL)


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: folder, file or hub id, its weight, and names where there are several.

    ``role`` is the denoiser that it is for, such as ``"transformer_2"``. With None it is put on
    every denoiser of the pipeline: Wan 2.2 has two.
    """

    lora_id: str
    lora_scale: float = 1.0
    adapter_name: str | None = None
    weight_name: str | None = None
    role: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.lora_id, str) or not self.lora_id:
            raise ValueError(f"lora_id={self.lora_id!r} of a LoRA must be a path or a hub id")
        scale = self.lora_scale
        if not is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"lora_scale={scale!r} of a LoRA must be a finite number")
        for name in ("adapter_name", "weight_name"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name}={getattr(self, name)!r} of a LoRA must be a string")
        if self.role is not None and self.role not in ROLES:
            raise ValueError(f"role={self.role!r} of a LoRA must be one of {', '.join(ROLES)}")

    @classmethod
    def read(cls, text: str) -> Lora:
        """``"path"``, or a JSON object with ``lora_id`` and any of the other fields.

        Raises:
            ValueError: it is neither.
        """
        if not text.lstrip().startswith("{"):
            return cls(text)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"lora {text!r} is no JSON object: {error}") from None
        unknown = sorted(set(value) - set(cls.__dataclass_fields__))
        if unknown or "lora_id" not in value:
            wrong = f"has the unknown key {unknown[0]!r}" if unknown else "lacks the key 'lora_id'"
            raise ValueError(
                f"lora {text!r} {wrong}; its keys are {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**value)


@dataclass(frozen=True)
class Loading:
    """Which pipeline, and how it is loaded; the names are those of ``diffusers-cli run``.

    Args:
        model: folder or hub id of a diffusers pipeline.
        dtype: a key of ``DTYPES``, or ``"auto"``: float32 on a CPU, else bfloat16 and the VAE of
            Wan in float32.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``; None is the accelerator, or the CPU
            where there is none; ``"balanced"`` spreads the parts over all GPUs. Without an index
            each of several processes has a device of its own, by its rank on the machine.
        cpu_offload: one of ``OFFLOADS``: keep parts of the model in the memory of the CPU.
        loras: adapters, all active together.
        variant, revision, token, trust_remote_code: as diffusers takes them; the token is in no
            record.
        attention_backend: of diffusers, for whatever is dense; None leaves it.
        vae_tiling, vae_slicing: decode in parts, to save memory.
        compile: arguments of ``torch.compile`` for the repeated blocks of the denoisers; None runs
            them as they are.

    Raises:
        ValueError: an unknown dtype or offload.
    """

    model: str
    dtype: str = "auto"
    device: str | None = None
    cpu_offload: str | None = None
    loras: tuple[Lora, ...] = ()
    variant: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    attention_backend: str | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model='' must be a folder or a hub id")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be auto or one of {', '.join(DTYPES)}")
        if self.cpu_offload is not None and self.cpu_offload not in OFFLOADS:
            allowed = ", ".join(OFFLOADS)
            raise ValueError(f"cpu_offload={self.cpu_offload!r} must be one of {allowed}")
        if self.cpu_offload is not None and self.device == "balanced":
            raise ValueError("cpu_offload needs one device, not 'balanced'")
        names = self.adapters()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"adapter_name={twice!r} is that of two LoRAs; give each its own")

    def adapters(self) -> list[str]:
        """The names of the LoRAs as adapters."""
        return [own.adapter_name or f"lora_{number}" for number, own in enumerate(self.loras)]

    def record(self) -> dict[str, Any]:
        """The fields as JSON values, without the token."""
        fields = {name: value for name, value in asdict(self).items() if name != "token"}
        return {**fields, "loras": list(fields["loras"])}


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or, for None, the accelerator or else the CPU.

    Raises:
        ValueError: no such device, or it is not there.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return torch.device("cpu") if here is None else device_of_process(here)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} must be cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu":
        return device
    if here is None or device.type != here.type:
        raise ValueError(
            f"device={name!r} is not there: torch {torch.__version__} sees "
            f"{'no accelerator' if here is None else here.type}; use device='cpu'"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={name!r} is not there: torch sees {count} of that kind")
    return device_of_process(device)


def load_pipeline(loading: Loading) -> Any:
    """The diffusers pipeline, on its device and ready to run.

    Weights are read from safetensors files alone: no pickle is opened.

    Raises:
        ValueError: the model, a LoRA or the device is not there, cannot be loaded, or has no such
            option.
    """
    if loading.device == "balanced":
        one_process("a pipeline that is balanced over all devices")
        device = torch.device("cpu")
    else:
        device = pick_device(loading.device)
    if device.index is not None and processes().world > 1:
        torch.accelerator.set_device_index(device.index)  # for what names no device
    if loading.cpu_offload is not None and device.type == "cpu":
        raise ValueError("cpu_offload needs an accelerator to compute on; the device is cpu")
    if loading.loras and importlib.util.find_spec("peft") is None:
        raise ValueError("a LoRA needs the package peft: pip install peft")
    _check_model(loading.model)
    with quiet() as said:
        pipe = _from_pretrained(loading, device)
        random = next((line for line in said if "newly initialized" in line), None)
        if random is not None:
            raise ValueError(
                f"model {loading.model!r} lacks weights, which would be random: {random[:300]}"
            )
        _load_loras(pipe, loading)
        _set_options(pipe, loading)
        _place(pipe, loading, device)
    return pipe


def _check_model(model: str) -> None:
    """Refuse what is neither a pipeline's folder nor a hub id, before anything is imported."""
    if Path(model).is_dir():
        if not (Path(model) / INDEX).is_file():
            raise ValueError(f"model {model!r} has no {INDEX}; name the folder of a whole pipeline")
        check_checksums(model)
    elif Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model!r} is no folder, and no hub id such as 'user/model'")


def _from_pretrained(loading: Loading, device: torch.device) -> Any:
    from diffusers import DiffusionPipeline

    kind: Any = DiffusionPipeline
    model = loading.model
    options: dict[str, Any] = {
        "use_safetensors": True,
        "trust_remote_code": loading.trust_remote_code,
    }
    for name in ("variant", "revision", "token"):
        if getattr(loading, name) is not None:
            options[name] = getattr(loading, name)
    if loading.device == "balanced":
        options["device_map"] = "balanced"
    try:
        index = kind.load_config(
            model, **{name: options[name] for name in ("revision", "token") if name in options}
        )
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError(f"its {INDEX} names no pipeline class")
        return kind.from_pretrained(model, dtype=_dtype(loading, device, index), **options)
    except Exception as error:  # of any library that reads a part
        raise ValueError(f"model {model!r} cannot be loaded: {reason(error)}") from error


def _dtype(loading: Loading, device: torch.device, index: Mapping[str, Any]) -> Any:
    """What ``from_pretrained`` takes: one dtype, or one by part."""
    if loading.dtype != "auto":
        return DTYPES[loading.dtype]
    if device.type == "cpu" and loading.device != "balanced":
        return torch.float32
    vae = index.get("vae")
    if isinstance(vae, (list, tuple)) and vae[-1] == FLOAT32_VAE:
        return {"default": torch.bfloat16, "vae": torch.float32}
    return torch.bfloat16


def _load_loras(pipe: Any, loading: Loading) -> None:
    if not loading.loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA")
    names = loading.adapters()
    for name, lora in zip(names, loading.loras, strict=True):
        roles = _roles_of_lora(pipe, lora)
        try:
            for role in roles:
                pipe.load_lora_weights(
                    lora.lora_id,
                    adapter_name=name,
                    weight_name=lora.weight_name,
                    use_safetensors=True,
                    token=loading.token,
                    **({"load_into_transformer_2": True} if role == "transformer_2" else {}),
                )
        except Exception as error:  # of diffusers, peft or safetensors
            raise ValueError(f"lora {lora.lora_id!r} cannot be loaded: {reason(error)}") from error
        if not any(name in own for own in pipe.get_list_adapters().values()):
            raise ValueError(
                f"lora {lora.lora_id!r} holds no weights for the parts of {type(pipe).__name__}"
            )
    pipe.set_adapters(names, adapter_weights=[float(lora.lora_scale) for lora in loading.loras])


def _roles_of_lora(pipe: Any, lora: Lora) -> list[str]:
    """The denoisers that a LoRA is put on."""
    adaptable = getattr(pipe, "_lora_loadable_modules", ROLES)
    roles = [role for role in ROLES if role in adaptable and getattr(pipe, role, None) is not None]
    if lora.role is None:
        return roles
    if lora.role not in roles:
        raise ValueError(
            f"lora {lora.lora_id!r} is for role {lora.role!r}, but {type(pipe).__name__} takes a "
            f"LoRA for {' or '.join(roles) or 'none'}"
        )
    return [lora.role]


def lora_notes(pipe: Any, loading: Loading) -> list[str]:
    """A line for each LoRA that was put on several denoisers, as no role was asked for."""
    found: Mapping[str, list[str]] = pipe.get_list_adapters() if loading.loras else {}
    notes = []
    for name, lora in zip(loading.adapters(), loading.loras, strict=True):
        roles = [role for role in ROLES if name in found.get(role, ())]
        if lora.role is None and len(roles) > 1:
            notes.append(
                f"lora {lora.lora_id!r} is on {' and '.join(roles)}; its key 'role' puts it on one"
            )
    return notes


def _set_options(pipe: Any, loading: Loading) -> None:
    for option in ("tiling", "slicing"):
        if getattr(loading, f"vae_{option}"):
            enable = getattr(getattr(pipe, "vae", None), f"enable_{option}", None)
            if enable is None:
                raise ValueError(f"the VAE of {type(pipe).__name__} has no {option}")
            enable()
    denoisers = [part for name in ROLES if (part := getattr(pipe, name, None)) is not None]
    backend = loading.attention_backend
    for denoiser in denoisers if backend is not None else ():
        if not hasattr(denoiser, "set_attention_backend"):
            raise ValueError(f"{type(denoiser).__name__} has no choice of attention backends")
        try:
            denoiser.set_attention_backend(backend)
        except Exception as error:  # of the package behind the backend
            raise ValueError(
                f"attention_backend={backend!r} cannot be used: {reason(error)}"
            ) from error
    if loading.compile is None:
        return
    for denoiser in denoisers:
        try:
            if getattr(denoiser, "_repeated_blocks", None):
                denoiser.compile_repeated_blocks(**loading.compile)
            else:
                denoiser.compile(**loading.compile)
        except Exception as error:  # of torch.compile
            raise ValueError(
                f"compile={dict(loading.compile)!r} is refused: {reason(error)}"
            ) from error


def _place(pipe: Any, loading: Loading, device: torch.device) -> None:
    if loading.device == "balanced":
        return
    try:
        _move(pipe, loading, device)
    except Exception as error:  # of torch, or of accelerate's hooks
        raise ValueError(
            f"model {loading.model!r} cannot be put on {device}: {reason(error)}; --cpu-offload "
            f"keeps parts of it in the memory of the CPU"
        ) from error


def _move(pipe: Any, loading: Loading, device: torch.device) -> None:
    if loading.cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif loading.cpu_offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif loading.cpu_offload == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
        )
    else:
        pipe.to(device)
