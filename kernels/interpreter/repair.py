"""Mends Triton 3.9's interpreter, which computes bfloat16 as if it were whole numbers and does not say so.

Mended: bfloat16 arithmetic (done in float32 and rounded to even once), conversions to and from bfloat16, float16 and
float8 (torch's own, to even, float8_e4m3fn saturating as the GPUs' conversion does), dot products (operands raised to
float32), reductions with a combine function of one's own (a tree over whole arrays; stock walks element by element),
erf (stock calls Python's for each element), and @triton.autotune, which asks for a driver: the first configuration
runs. Stock prepares the language anew for every call of every function and copies all memory behind every argument;
here it is prepared once, and kernels work on the tensors themselves.

`apply` is idempotent. tests/gpu/interpreter/test_canaries.py fails if a version of Triton makes a part of this void.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language import core  # noqa: F401
from triton.runtime import autotuner
from triton.runtime import interpreter as stock

Handle, Builder = stock.TensorHandle, stock.InterpreterBuilder
FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_applied = False


# ---- numbers -------------------------------------------------------------------------------------------------------
def to_float32(handle: Any) -> np.ndarray:
    """The numbers of a bfloat16, float16 or float8 handle in float32; other data as it is."""
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if kind == tl.float16:
        return handle.data.astype(np.float32)
    if kind in FLOAT8:
        raw = torch.from_numpy(np.ascontiguousarray(handle.data))
        return raw.view(FLOAT8[kind]).float().numpy()
    return handle.data


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to nearest even, NaN kept."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_float32(values: np.ndarray, kind: Any) -> Any:
    """A handle of a floating type with float32 numbers rounded to it once."""
    if kind == tl.bfloat16:
        return Handle(round_to_bfloat16(values), kind)
    if kind in FLOAT8:
        numbers = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        most = torch.finfo(FLOAT8[kind]).max
        numbers = torch.where(numbers.isnan(), numbers, numbers.clamp(-most, most)).to(FLOAT8[kind])
        return Handle(numbers.view(torch.uint8).numpy(), kind)
    return Handle(values.astype(stock._get_np_dtype(kind)), kind)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def raised(handle: Any) -> Any:
    return Handle(to_float32(handle), tl.float32) if is_bfloat16(handle) else handle


def in_float32(old: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method whose bfloat16 operands are raised, and whose float32 result is rounded again."""

    def method(self: Any, *operands: Any, **options: Any) -> Any:
        if not any(is_bfloat16(x) for x in operands):
            return old(self, *operands, **options)
        result = old(self, *[raised(x) for x in operands], **options)
        return from_float32(result.data, tl.bfloat16) if result.data.dtype == np.float32 else result

    return method


def binary_op(stock_op: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bfloat16(left) and not is_bfloat16(right):
            result = stock_op(self, left, right, op)
            # Stock says that a comparison has the operands' type, and makes whole numbers of it when it broadcasts it.
            return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
        values = op(to_float32(left), to_float32(right))
        return Handle(values, tl.int1) if values.dtype == np.bool_ else from_float32(values, tl.bfloat16)

    return method


def select(self: Any, condition: Any, left: Any, right: Any) -> Any:
    """Stock gives the type of the third operand; bits are chosen, whatever they mean."""
    return Handle(np.where(condition.data, left.data, right.data), left.dtype.scalar)


def dot(self: Any, left: Any, right: Any, added: Any, _precision: Any, _imprecise: Any) -> Any:
    """Sums in float32, whole numbers in int32. (A GPU would take TF32 for float32 unless told "ieee".)"""
    total = np.int32 if added.data.dtype == np.int32 else np.float32
    a, b = (np.ascontiguousarray(to_float32(x).astype(total, copy=False)) for x in (left, right))
    result = np.matmul(a, b) + added.data.astype(total, copy=False)
    return Handle(result.astype(added.data.dtype, copy=False), added.dtype.scalar)


def cast(stock_cast: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, source: Any, target: Any) -> Any:
        of, to = source.dtype.scalar, target.scalar
        if of == to:
            return Handle(source.data, to)
        if to == tl.bfloat16 or to in FLOAT8:
            return from_float32(to_float32(source).astype(np.float32), to)
        if of == tl.bfloat16 or of in FLOAT8:
            return (
                stock_cast(self, Handle(to_float32(source), tl.float32), target) if to != tl.float32 else raised(source)
            )
        return stock_cast(self, source, target)

    return method


def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    """create_fp_to_fp. Only rounding to nearest even is offered."""
    if rounding not in (None, stock._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError("the repaired interpreter rounds to nearest even only")
    return from_float32(to_float32(source).astype(np.float32), target.scalar)


def erf(self: Any, handle: Any) -> Any:
    return Handle(torch.erf(torch.from_numpy(np.ascontiguousarray(handle.data))).numpy(), handle.dtype.scalar)


# ---- reductions ----------------------------------------------------------------------------------------------------
def reduce_as_a_tree(self: Any, operands: Any) -> Any:
    """Any combine function, on halves of whole arrays: neighbours first, as stock's order for exact functions.

    The axis has a power of two of elements, as every Triton tensor.
    """
    whole = self.axis is None
    inputs, axis = self.unravel(operands, self.axis)
    kinds = [x.dtype for x in inputs]
    arrays = [np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    while arrays[0].shape[0] > 1:
        first = [self.to_tensor(np.ascontiguousarray(a[0::2]), kind) for a, kind in zip(arrays, kinds)]
        second = [self.to_tensor(np.ascontiguousarray(a[1::2]), kind) for a, kind in zip(arrays, kinds)]
        result = self.combine_fn.fn(*first, *second)
        arrays = [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]
    outputs = []
    for array, kind, operand in zip(arrays, kinds, operands):
        value = array[0]
        if self.keep_dims:
            value = value.reshape((1,) * operand.handle.data.ndim) if whole else np.expand_dims(value, axis)
        outputs.append(self.to_tensor(value.item() if value.ndim == 0 else value, kind))
    return outputs


def refuse_bfloat16(old: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, operand: Any, *args: Any, **options: Any) -> Any:
        first = operand[0] if isinstance(operand, tuple) else operand
        if first.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("a reduction of bfloat16: raise to float32 in the kernel")
        return old(self, operand, *args, **options)

    return method


# ---- launches ------------------------------------------------------------------------------------------------------
class _NoScope:
    def restore(self) -> None: ...


def prepare_once(_function: Any) -> _NoScope:
    """The language is prepared when the repair is applied, and stays so."""
    return _NoScope()


def _sees_the_language() -> None:
    """Stock prepares the modules among a function's globals: here tl and core."""


# Called before every launch with the kernel's name and its tensors, and before every program with its place: checks.py.
launch_hooks: list[Callable[[str, list[torch.Tensor]], None]] = []


def run_grid(self: Any, *args: Any, **constants: Any) -> None:
    """Run every program on the tensors themselves, which must be CPU tensors. num_warps and num_stages mean nothing."""
    names = inspect.getfullargspec(self.fn).args
    bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in constants.items() if k in names})
    tensors = [x for x in bound.values() if isinstance(x, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"the interpreter takes CPU tensors, got one on {tensor.device}")
    for hook in launch_hooks:
        hook(self.fn.__name__, tensors)
    values = {name: x if name in self.constexprs else stock._implicit_cvt(x) for name, x in bound.items()}
    grid = (*(self.grid(values) if callable(self.grid) else self.grid), 1, 1)[:3]
    stock.interpreter_builder.set_grid_dim(*grid)
    with np.errstate(all="ignore"):
        for place in np.ndindex(*grid):
            stock.interpreter_builder.set_grid_idx(*place)
            self.fn(**values)


def call_device_function(self: Any, *args: Any, **options: Any) -> Any:
    return self.rewrite()(*args, **options)


def run_first_configuration(self: Any, *args: Any, **options: Any) -> Any:
    return self.fn.run(*args, **options, **self.configs[0].all_kwargs())


def apply() -> None:
    """Repair the interpreter of this process."""
    global _applied
    if _applied:
        return
    _applied = True
    triton.knobs.runtime.interpret = True
    for name in ("unary_op", "create_rsqrt", "create_fma", "create_clampf"):
        setattr(Builder, name, in_float32(getattr(Builder, name)))
    Builder.create_erf = in_float32(erf)
    Builder.binary_op = binary_op(Builder.binary_op)
    Builder.create_select = select
    Builder.create_dot = dot
    Builder.cast_impl = cast(Builder.cast_impl)
    Builder.create_fp_to_fp = convert
    stock.interpreter_builder.codegen_fns["min_dot_size"] = lambda _left, _right: (1, 1, 16)
    stock.ReduceOps.generic_reduce = reduce_as_a_tree
    for name in ("sum", "min_max"):
        setattr(stock.ReduceOps, name, refuse_bfloat16(getattr(stock.ReduceOps, name)))
    stock._patch_lang(_sees_the_language)
    stock._patch_lang = prepare_once
    stock.GridExecutor.__call__ = run_grid
    stock.InterpretedFunction.__call__ = call_device_function
    autotuner.Autotuner.run = run_first_configuration
