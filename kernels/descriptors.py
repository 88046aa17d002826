"""Tensor descriptors of keys and values, by which ``hopper.py`` copies blocks of them (TMA)."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["key_descriptor"]


def key_descriptor(
    x: torch.Tensor, block_k: int, width: int
) -> tuple[TensorDescriptor, tuple[int, int, int]]:
    """Describe keys or values as a matrix from which the copies read boxes of rows and columns.

    Args:
        x: ``[B, slots, L, D]``, float16 or bfloat16.
        block_k: rows of a box.
        width: columns of a box.

    Returns:
        The descriptor, and three steps: the number of rows from one batch item to the next, the
        number of rows from one slot to the next, and the number of columns from one slot to the
        next. The descriptor refers to a contiguous copy if copies cannot read ``x`` itself.
    """
    matrix = _matrix_of(x, width)
    if matrix is None:  # also for a contiguous tensor with a misaligned address
        matrix = _matrix_of(torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x), width)
        assert matrix is not None, "a new tensor is a matrix"
    x, rows, item, slot, column = matrix
    row_stride = x.stride(2) if x.shape[2] > 1 else x.shape[3]
    columns = row_stride if column else x.shape[3]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = TensorDescriptor(x, [rows, columns], [row_stride, 1], [block_k, width], layout)
    return descriptor, (item, slot, column)


def _matrix_of(x: torch.Tensor, width: int) -> tuple[torch.Tensor, int, int, int, int] | None:
    """Return the tensor, the number of rows, and the three steps of ``key_descriptor``; None if the
    rows of ``x`` have no common stride, or a copy cannot read them."""
    batch, slots, length, dim = x.shape
    row_stride = x.stride(2) if length > 1 else dim
    if x.data_ptr() % 16 or row_stride * x.element_size() % 16 or row_stride < dim:
        return None
    rows = batch * slots * length
    if rows >= 2**31 or x.stride(3) != 1:
        return None
    whole_items = batch == 1 or x.stride(0) == slots * length * row_stride
    if whole_items and (slots == 1 or x.stride(1) == length * row_stride):
        return x, rows, slots * length, length, 0
    adjacent_items = batch == 1 or x.stride(0) == length * row_stride
    if adjacent_items and slots * dim <= row_stride and x.stride(1) == dim and dim % width == 0:
        return x, batch * length, length, 0, dim
    return None
