"""``HeadSet``: heads of attention layers with strengths, and its JSON file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visattn._arguments import is_integer, is_number
from visattn._atomic import write_whole
from visattn._version import __version__
from visattn.plan import Denoiser
from visattn.plan import hub as store
from visattn.plan.json_format import (
    MAX_PARTS,
    Json,
    Record,
    brief,
    check_values,
    json_by_lines,
    parse_json,
    shown,
)

__all__ = ["HEADS_FILE", "SCHEMA", "HeadSet", "Heads", "Layers", "json_heads", "plain_heads"]

SCHEMA = "visattn.heads/1"
HEADS_FILE = "visattn_heads.json"
TEXTS = ("model", "objective", "policy", "target")
KEYS = ("schema", "visattn", "layers", "size", "strength", "scale", "provenance", *TEXTS)


@dataclass(frozen=True)
class HeadSet:
    """Heads with strengths, as ``search_heads`` finds them. Iteration gives (layer, head) pairs.

    Args:
        layers: strength in [0, 1] by head, by module path of the attention layer, as in
            ``{"blocks.3.attn1": {2: 1.0}}``.
        model: class name of the denoiser; empty means any.
        provenance: how the heads were found, as JSON values.
        strength: factor of the strengths of the heads, in [0, 1].
        scale: ``w`` of SoftPAG with these heads; None means the default of SoftPAG.
        policy: of SoftPAG; empty means the default.
        target: of SoftPAG; empty means the default.
        objective: name of the objective that was improved.
        size: number of attention layers of the denoiser, and of heads in each; None means any.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn import HeadSet
        >>> heads = HeadSet({"blocks.1.attn1": {0: 1.0, 3: 0.5}}, scale=3.0)
        >>> list(heads)
        [('blocks.1.attn1', 0), ('blocks.1.attn1', 3)]
        >>> heads.save("heads.json")
        >>> HeadSet.from_pretrained("heads.json") == heads
        True
    """

    layers: Mapping[str, Mapping[int, float]]
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    scale: float | None = None
    policy: str = ""
    target: str = ""
    objective: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(
                f"layers={shown(self.layers)} must map paths to heads with strengths, as in "
                "{'blocks.3.attn1': {2: 1.0}}"
            )
        layers = {path: _checked(path, heads) for path, heads in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        _check_strength("strength", self.strength)
        if self.scale is not None and not _is_finite(self.scale):
            raise ValueError(f"scale={shown(self.scale)} must be a finite number or None")
        for name in TEXTS:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={shown(getattr(self, name))} must be text")
        has_form = self.size is None or (isinstance(self.size, tuple) and len(self.size) == 2)
        if not has_form or not all(map(_is_count, self.size or ())):
            raise ValueError(
                f"size={shown(self.size)} must be (attention layers, heads of each), each from 1 "
                f"to {MAX_PARTS}"
            )
        check_values("provenance", self.provenance)

    def __len__(self) -> int:
        return sum(len(heads) for heads in self.layers.values())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Iterate over (layer, head) pairs."""
        return ((path, head) for path, heads in self.layers.items() for head in heads)

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]], strength: float = 1.0) -> HeadSet:
        """Return a set of heads with the same strength.

        Args:
            pairs: (layer, head) pairs, with module paths of layers.
            strength: of each head.
        """
        layers: dict[str, dict[int, float]] = {}
        for path, head in pairs:
            layers.setdefault(path, {})[head] = strength
        return cls(layers)

    def fits(self, denoisers: Mapping[str, Denoiser]) -> None:
        """Raise ValueError if the heads are of another model.

        Args:
            denoisers: denoisers of a pipeline, by role.
        """
        for role, denoiser in denoisers.items():
            actual = denoiser.kind if self.size is None else str(denoiser)
            expected = self.model or denoiser.kind
            if self.size is not None:
                expected = str(Denoiser(expected, *self.size))
            if expected != actual:
                raise ValueError(
                    f"heads are of another model: of {expected}, and {role} is {actual}; use heads "
                    "that were searched for this model"
                )

    def to_json(self) -> str:
        """Return the content of the file of the set: sorted keys, one layer a line. The heads of a
        layer are a list if all strengths are 1, else an object with strengths by head."""
        value: Json = {
            "schema": SCHEMA,
            "visattn": __version__,
            "layers": {path: json_heads(heads) for path, heads in self.layers.items()},
            "strength": self.strength,
            "scale": self.scale,
            "size": None if self.size is None else list(self.size),
            "provenance": dict(self.provenance),
            **{name: getattr(self, name) for name in TEXTS},
        }
        return json_by_lines(value, ("layers", "provenance"))

    @classmethod
    def from_json(cls, text: str, what: str = "the head set") -> HeadSet:
        """Read a set.

        Args:
            text: from ``to_json``.
            what: how errors name the text.

        Raises:
            ValueError: the text is no JSON, has another schema or an unknown key, or a value is out
                of range.
        """
        if not text.strip():
            raise ValueError(f"{what} is empty; a head set is a JSON object")
        value = parse_json(text, what)
        schema = value.get("schema")
        if schema != SCHEMA:
            raise ValueError(
                f"{what} has the schema {shown(schema)}; this version of visattn reads {SCHEMA!r}"
            )
        record = Record(value, what, KEYS)
        record.text("visattn")
        if "layers" not in value:
            raise ValueError(f"{what} lacks the key 'layers'")
        layers = record.mapping("layers")
        size = value.get("size")
        if size is not None and not isinstance(size, list):
            raise record.wrong("size", "a list of two: attention layers, and heads of each")
        try:
            return cls(
                layers={path: _read(heads, path, what) for path, heads in layers.items()},
                provenance=record.mapping("provenance"),
                strength=value.get("strength", 1.0),
                scale=value.get("scale"),
                size=None if size is None else tuple(size),
                **{name: record.text(name, "") or "" for name in TEXTS},
            )
        except (TypeError, ValueError) as error:
            text = brief(error)
            raise ValueError(text if what in text else f"{what}: {text}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a JSON file. After an error the former file is unchanged.

        Args:
            path: of the file.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadSet:
        """Read a JSON file.

        Args:
            path: of the file.

        Raises:
            OSError: the file does not exist.
            ValueError: it holds no head set.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"head set {str(path)!r} does not exist")
        return cls.from_json(store.load(Path(path), "head set"), f"head set {str(path)!r}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``visattn_heads.json`` into a folder.

        Args:
            folder: it is created if it does not exist.

        Raises:
            OSError: the file cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / HEADS_FILE)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> HeadSet:
        """Read a set from a file, a folder or a repository of the Hugging Face hub.

        Args:
            source: path of a JSON file, path of a folder with ``visattn_heads.json``, or a hub id.
            revision: of the repository, as in diffusers.
            token: for the hub, as in diffusers.
            local_files_only: whether only files in the cache of the hub are used.

        Raises:
            OSError: there is no such file or repository.
            ValueError: the file holds no head set.
        """
        path = store.find(
            source,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            file=HEADS_FILE,
            what="head set",
        )
        return cls.from_json(store.load(path, "head set"), f"head set {str(source)!r}")


def _checked(path: object, heads: object) -> dict[int, float]:
    """Return the checked heads of a layer with their strengths."""
    if not isinstance(path, str) or not path or not isinstance(heads, Mapping):
        raise TypeError(
            f"layers has {shown(heads)} for {shown(path)}; it must map paths to heads with "
            "strengths, as in {'blocks.3.attn1': {2: 1.0}}"
        )
    for head, strength in heads.items():
        if not is_integer(head) or not 0 <= head < MAX_PARTS:
            raise ValueError(
                f"layers[{path!r}] has head {shown(head)}; heads count from 0 and are below "
                f"{MAX_PARTS}"
            )
        _check_strength(f"layers[{path!r}][{head}]", strength)
    return {head: float(strength) for head, strength in heads.items()}


def _check_strength(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}={shown(value)} must be a strength from 0 to 1")


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < 1 << 64 and math.isfinite(value)


def _is_count(value: object) -> bool:
    return is_integer(value) and 1 <= value <= MAX_PARTS


def plain_heads(heads: Any) -> list[int] | dict[int, float] | None:
    """Return heads of a layer in their shortest form.

    Args:
        heads: strengths by head, heads, a head, or None for all.

    Returns:
        None for all; a list where all strengths are 1; else strengths by head.
    """
    if heads is None:
        return None
    if not isinstance(heads, Mapping):
        return [heads] if isinstance(heads, int) else list(heads)
    if all(strength == 1 for strength in heads.values()):
        return list(heads)
    return {head: float(strength) for head, strength in heads.items()}


def json_heads(heads: Any) -> list[int] | dict[str, float] | None:
    """Return ``plain_heads`` as JSON values, whose keys are text.

    Args:
        heads: as of ``plain_heads``.
    """
    plain = plain_heads(heads)
    return {str(head): s for head, s in plain.items()} if isinstance(plain, dict) else plain


def _read(value: object, path: str, what: str) -> dict[int, float]:
    """Return the heads of a layer from JSON values."""
    where = f"layer {shown(path)} of {what}"
    if isinstance(value, list):
        if len(value) != len({repr(head) for head in value}):
            raise ValueError(f"{where} names a head twice: {shown(value)}")
        if not all(map(is_integer, value)):
            raise ValueError(f"{where} holds {shown(value)}; heads are numbers, from 0")
        return dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} is {shown(value)}; it must be a list of heads, or an object with strengths "
            "by head"
        )
    heads: dict[int, Any] = {}
    for head, strength in value.items():
        if not (head.isascii() and head.isdecimal() and len(head) < 6 and str(int(head)) == head):
            raise ValueError(f"{where} names the head {shown(head)}; heads are numbers, from 0")
        heads[int(head)] = strength
    return heads


# Arguments of edits and guidances: layers by index or module path, and heads with strengths.
Layers = int | str | Sequence[int | str] | None
Heads = int | float | Sequence[int] | Mapping[int, float] | None
