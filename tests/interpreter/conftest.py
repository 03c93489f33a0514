"""Make Triton's interpreter compute in bf16, work with numpy ≥ 2.4, and waste less time.

The interpreter keeps bf16 as raw uint16: it multiplies those integers, and truncates when it casts from fp32. It looks
for builtins to replace at every call of a function by a kernel, where it has replaced them for the kernel. And it works
out for every sum and product of integers whether it overflows, a third of its time, to assert it only when debugging.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def _is_bf16(handle: TensorHandle) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def _to_fp32(handle: TensorHandle) -> TensorHandle:
        if not _is_bf16(handle):
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _to_bf16(values: Any) -> TensorHandle:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest_even), tl.bfloat16)

    def _create_dot(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> Any:
            return original(self, _to_fp32(a), _to_fp32(b), *rest)

        return create_dot

    def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
        def cast(self: Any, src: TensorHandle, dst: Any, *rest: Any) -> Any:
            if src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16:
                return _to_bf16(src.data)
            return original(self, src, dst, *rest)

        return cast

    def _binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
        def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> Any:
            if not _is_bf16(lhs):
                return original(self, lhs, rhs, op)
            result = op(_to_fp32(lhs).data, _to_fp32(rhs).data)
            return TensorHandle(result, tl.int1) if result.dtype == bool else _to_bf16(result)

        return binary_op

    def _patch_lang_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
        def patch_lang_tensor(tensor: Any, scope: Any) -> None:
            original(tensor, scope)
            # numpy ≥ 2.4 refuses int() of a one-element array, which is how a runtime `range` reads its bounds
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        return patch_lang_tensor

    @functools.cache
    def _a_builtin(package: Any) -> str:
        return next(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))

    def _patch_builtin(original: Callable[..., Any]) -> Callable[..., Any]:
        def patch_builtin(package: Any, *rest: Any) -> None:
            if tl.core.is_builtin(getattr(package, _a_builtin(package))):
                original(package, *rest)

        return patch_builtin

    InterpreterBuilder.create_dot = _create_dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.binary_op = _binary_op(InterpreterBuilder.binary_op)
    interpreter._patch_builtin = _patch_builtin(interpreter._patch_builtin)
    interpreter._patch_lang_tensor = _patch_lang_tensor(interpreter._patch_lang_tensor)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, or a number no count is, so that an element which no program writes is seen."""
    import torch

    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = empty(*args, **kwargs)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
