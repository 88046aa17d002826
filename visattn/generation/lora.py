"""The options of a LoRA adapter."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from visattn._arguments import is_number
from visattn.plan import ROLES

__all__ = ["Lora"]


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter.

    Args:
        lora_id: folder, file or hub id.
        lora_scale: weight of the adapter.
        adapter_name: name of the adapter. The default is ``lora_0``, ``lora_1`` and so on.
        weight_name: file of the weights, if the folder has several.
        role: the denoiser that gets the adapter, such as ``"transformer_2"``; None for every
            denoiser (Wan 2.2 has two).

    Raises:
        ValueError: a field is invalid.

    Example:
        >>> from visattn.generation import Lora
        >>> Lora.read('{"lora_id": "user/style", "lora_scale": 0.8}').lora_scale
        0.8
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
        """Read a path or hub id, or a JSON object with ``lora_id`` and any of the other fields.

        Raises:
            ValueError: the text is neither.
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
