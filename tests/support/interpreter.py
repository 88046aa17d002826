"""Triton's interpreter without repeated work: half the time of a small launch, the same results.

At each call of a device function Triton replaces the functions of its language by interpreted ones,
although the launch has done so already. And it computes the numpy dtype of each value and the shape
of each type and tensor from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter


class NothingToRestore:
    def restore(self) -> None:
        """Leave the language as it is: the scope of the launch restores it."""


def make_interpreter_faster() -> None:
    """Let the interpreter of this process repeat no work."""
    patch_language_once_a_launch()
    remember_numpy_dtypes()
    remember_types_of_blocks()
    remember_shapes_of_tensors()


def patch_language_once_a_launch() -> None:
    """Replace the language once a launch for each module that functions come from."""
    patch_language = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the globals of modules

    def patch_once(function: FunctionType) -> Any:
        if id(function.__globals__) in patched:
            return NothingToRestore()
        patched.add(id(function.__globals__))
        return patch_language(function)

    def launch_and_forget(self: Any, *args: object, **kwargs: object) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_and_forget


def remember_numpy_dtypes() -> None:
    compute = interpreter._get_np_dtype
    dtypes: dict[str, np.dtype[Any]] = {}

    def numpy_dtype(dtype: core.dtype) -> np.dtype[Any]:
        name = dtype.element_ty.name if type(dtype) is core.block_type else dtype.name
        if name not in dtypes:
            dtypes[name] = compute(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = numpy_dtype


def remember_types_of_blocks() -> None:
    compute = core.block_type.__init__
    attributes: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init(self: core.block_type, element_ty: core.dtype, shape: Sequence[Any]) -> None:
        sizes = tuple(n.value if isinstance(n, core.constexpr) else n for n in shape)
        key = (element_ty.name, sizes)
        if key not in attributes:
            compute(self, element_ty, shape)
            attributes[key] = dict(vars(self))
        vars(self).update(attributes[key])

    core.block_type.__init__ = init


def remember_shapes_of_tensors() -> None:
    compute = core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: core.tensor, handle: Any, type: core.dtype) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            compute(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    core.tensor.__init__ = init
