"""Load a diffusers pipeline with the options of ``diffusers-cli run``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from visattn.generation.checksums import check_checksums
from visattn.generation.errors import reason
from visattn.generation.lora import Lora
from visattn.generation.silence_logs import quiet
from visattn.plan import ROLES
from visattn.runtime.private_names import lora_roles, repeated_blocks
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
# The authors advise that this VAE decodes in float32, whatever the dtype of the denoiser.
FLOAT32_VAE = "AutoencoderKLWan"


def default_model() -> str:
    """Return the default model: the folder of the small model in a checkout of visattn.

    Raises:
        ValueError: visattn does not run from a checkout, or the small model is missing.

    Example:
        >>> from pathlib import Path
        >>> from visattn.generation import default_model
        >>> Path(default_model()).name
        'tiny-wan'
    """
    if not (SMALL_MODEL / INDEX).is_file():
        raise ValueError(
            "no --model is given, and this installation has no small model; give the folder or the "
            "hub id of a diffusers pipeline, or run from a checkout with assets/models/tiny-wan"
        )
    return str(SMALL_MODEL)


@dataclass(frozen=True)
class Loading:
    """A pipeline and the options for loading it, named as in ``diffusers-cli run``.

    Args:
        model: folder or hub id of a diffusers pipeline.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU,
            elsewhere bfloat16 with the VAE of Wan in float32.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; None for the accelerator, or the
            CPU if there is none; ``"balanced"`` spreads the parts over all GPUs. If several
            processes run, a device without an index is a different one for each process.
        cpu_offload: ``"model"``, ``"group"`` or ``"sequential"``, to keep parts of the model in the
            memory of the CPU; None for no offloading.
        loras: adapters, which are all active.
        variant: variant of the weights, as in ``"fp16"``.
        revision: branch, tag or commit of the model.
        token: token for the Hugging Face hub; it is not recorded.
        trust_remote_code: whether code of the model's repository may run.
        attention_backend: attention backend of diffusers for dense attention; None for the default.
        vae_tiling: whether to decode in tiles, which saves memory.
        vae_slicing: whether to decode one video after the other, which saves memory.
        compile: arguments of ``torch.compile`` for the repeated blocks of the denoisers; None for
            no compilation.

    Raises:
        ValueError: a field is invalid.

    Example:
        >>> from visattn.generation import Loading
        >>> Loading("user/model", dtype="bfloat16").record()["dtype"]
        'bfloat16'
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
            raise ValueError(f"adapter_name={twice!r} is used by two LoRAs; give each another name")

    def adapters(self) -> list[str]:
        """Return the adapter names of the LoRAs."""
        return [lora.adapter_name or f"lora_{number}" for number, lora in enumerate(self.loras)]

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values, without the token."""
        fields = {name: value for name, value in asdict(self).items() if name != "token"}
        return {**fields, "loras": list(fields["loras"])}


def pick_device(name: str | None) -> torch.device:
    """Return the device of a name; for None the accelerator, or the CPU if there is none.

    Raises:
        ValueError: the name is invalid, or there is no such device.
    """
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    if name is None:
        return torch.device("cpu") if accelerator is None else device_of_process(accelerator)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} must be cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        raise ValueError(
            f"device={name!r} is not available: torch {torch.__version__} finds "
            f"{'no accelerator' if accelerator is None else accelerator.type}; use device='cpu'"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(
            f"device={name!r} is not available: torch finds {count} devices of that type"
        )
    return device_of_process(device)


def load_pipeline(loading: Loading) -> Any:
    """Load a diffusers pipeline and move it to its device.

    Weights are read from safetensors files only; pickle files are never opened.

    Args:
        loading: the pipeline and the options.

    Returns:
        The diffusers pipeline.

    Raises:
        ValueError: the model, a LoRA or the device is missing, cannot be loaded, or does not have
            an option.

    Example:
        >>> from visattn.generation import Loading, default_model, load_pipeline
        >>> type(load_pipeline(Loading(default_model(), device="cpu"))).__name__
        'WanPipeline'
    """
    if loading.device == "balanced":
        one_process("a pipeline balanced over all devices")
        device = torch.device("cpu")
    else:
        device = pick_device(loading.device)
    if device.index is not None and processes().world > 1:
        torch.accelerator.set_device_index(device.index)  # for tensors without an explicit device
    if loading.cpu_offload is not None and device.type == "cpu":
        raise ValueError("cpu_offload needs an accelerator to compute on; the device is cpu")
    if loading.loras and importlib.util.find_spec("peft") is None:
        raise ValueError("a LoRA needs the package peft: pip install peft")
    _check_model(loading.model)
    with quiet() as log_lines:
        pipe = _from_pretrained(loading, device)
        random = next((line for line in log_lines if "newly initialized" in line), None)
        if random is not None:
            raise ValueError(
                f"model {loading.model!r} lacks weights, which would be random: {random[:300]}"
            )
        _load_loras(pipe, loading)
        _set_options(pipe, loading)
        _place(pipe, loading, device)
    return pipe


def _check_model(model: str) -> None:
    """Refuse what is neither a folder of a pipeline nor a hub id, before diffusers is imported."""
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
    except Exception as error:  # libraries raise errors of many types
        raise ValueError(f"model {model!r} cannot be loaded: {reason(error)}") from error


def _dtype(loading: Loading, device: torch.device, index: Mapping[str, Any]) -> Any:
    """Return the dtype argument of ``from_pretrained``: one dtype, or a dtype for each part."""
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
        except Exception as error:  # diffusers, peft or safetensors
            raise ValueError(f"lora {lora.lora_id!r} cannot be loaded: {reason(error)}") from error
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise ValueError(
                f"lora {lora.lora_id!r} has no weights for the parts of {type(pipe).__name__}"
            )
    pipe.set_adapters(names, adapter_weights=[float(lora.lora_scale) for lora in loading.loras])


def _roles_of_lora(pipe: Any, lora: Lora) -> list[str]:
    """Return the roles of the denoisers that get a LoRA."""
    adaptable = lora_roles(pipe, ROLES)
    roles = [role for role in ROLES if role in adaptable and getattr(pipe, role, None) is not None]
    if lora.role is None:
        return roles
    if lora.role not in roles:
        raise ValueError(
            f"lora {lora.lora_id!r} has role={lora.role!r}, but {type(pipe).__name__} takes a LoRA "
            f"for {' or '.join(roles) or 'none'}"
        )
    return [lora.role]


def lora_notes(pipe: Any, loading: Loading) -> list[str]:
    """Return a line for each LoRA without a role that is on several denoisers."""
    active: Mapping[str, list[str]] = pipe.get_list_adapters() if loading.loras else {}
    notes = []
    for name, lora in zip(loading.adapters(), loading.loras, strict=True):
        roles = [role for role in ROLES if name in active.get(role, ())]
        if lora.role is None and len(roles) > 1:
            notes.append(
                f"lora {lora.lora_id!r} is on {' and '.join(roles)}; its key 'role' selects one"
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
            raise ValueError(
                f"attention_backend={backend!r}: {type(denoiser).__name__} cannot change "
                "its attention backend; leave attention_backend out"
            )
        try:
            denoiser.set_attention_backend(backend)
        except Exception as error:  # errors of the package of the backend
            raise ValueError(
                f"attention_backend={backend!r} cannot be used: {reason(error)}"
            ) from error
    if loading.compile is None:
        return
    for denoiser in denoisers:
        try:
            if repeated_blocks(denoiser):
                denoiser.compile_repeated_blocks(**loading.compile)
            else:
                denoiser.compile(**loading.compile)
        except Exception as error:  # torch.compile raises errors of many types
            raise ValueError(
                f"compile={dict(loading.compile)!r} is refused: {reason(error)}"
            ) from error


def _place(pipe: Any, loading: Loading, device: torch.device) -> None:
    if loading.device == "balanced":
        return
    try:
        _move(pipe, loading, device)
    except Exception as error:  # torch or hooks of accelerate
        raise ValueError(
            f"model {loading.model!r} cannot be moved to {device}: {reason(error)}; --cpu-offload "
            "keeps parts of it in the memory of the CPU"
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
