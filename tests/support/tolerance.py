"""Every tolerance of the suite, and how results are compared.

A result is measured against brute force in float64 that rounds nothing in between. Its largest error may be twice that
of the published formulas run op by op in x.dtype by PyTorch (`eager`), plus one ulp at the largest value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stgridpool_kernels
from tests.support import brute_force, eager

GOLDEN = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Largest relative norm of the difference to a golden value."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at `value`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(value, info.smallest_normal))[1] - 1)


def error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute error where `exact` is finite."""
    finite = exact.isfinite()
    return (result.double()[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0


def oracle(op: str, x: Tensor, **arguments: Any) -> Tensor:
    """`op` in float64 by brute force."""
    result = getattr(brute_force, op)(x.double().cpu().numpy(), **arguments)
    return torch.from_numpy(np.ascontiguousarray(result)).to(x.device)


def published_error(op: str, x: Tensor, arguments: dict[str, Any], dtype: torch.dtype, exact: Tensor) -> float:
    """The error of the published formulas in `dtype`; in float32 where they overflow in a narrower one.

    On few tokens they may be right by luck, hence the largest error over x and some inputs near x.
    """
    generator, tokens = torch.Generator().manual_seed(0), x.numel() // x.shape[-1]
    largest = 0.0
    for draw in range(min(12, 1 + 2000 // max(tokens, 1))):
        near, target = x, exact
        if draw:
            noise = torch.randn(*x.shape[:-1], 1, generator=generator, dtype=torch.float64)
            near = (x.double() * (1 + 0.05 * noise.to(x.device))).to(x.dtype)
            target = oracle(op, near, **arguments)
        result = getattr(eager, op)(near.to(dtype), **arguments)
        if not result[target.isfinite()].isfinite().all():
            result = getattr(eager, op)(near.float(), **arguments).to(dtype)
        largest = max(largest, error(result, target))
    return largest


def accuracy(
    op: str, x: Tensor, *, published_dtype: torch.dtype | None = None, **arguments: Any
) -> tuple[Tensor, float]:
    """The exact result of `op(x, **arguments)` and the largest error allowed beside one ulp.

    The norms of tokens are float32 whatever x is (float64 for float64), so they compare with float32 formulas.
    `published_dtype` asks for more than x.dtype does.
    """
    exact = oracle(op, x, **arguments)
    dtype = published_dtype or (torch.promote_types(x.dtype, torch.float32) if op == "token_norm" else x.dtype)
    return exact, 2 * published_error(op, x, arguments, dtype, exact)


def assert_accurate(result: Tensor, op: str, x: Tensor, **arguments: Any) -> None:
    """`result` of `op(x, **arguments)` is as accurate as `accuracy` has it."""
    assert_within(result, *accuracy(op, x, **arguments))


def reference_gradient(op: str, x: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    result = getattr(stgridpool_kernels, op)(leaf, backend="reference", **arguments)
    return torch.autograd.grad(result, leaf, grad)[0]


def assert_gradient_accurate(
    result: Tensor, op: str, x: Tensor, grad: Tensor, *, nearby: bool = True, **arguments: Any
) -> None:
    """`result`, the gradient of `op(x, **arguments)` for `grad`, is as accurate as it must be.

    The reference may be right by luck on few tokens, hence its largest error over x and some inputs near x; at x alone
    without `nearby`, for an x at which norms have no derivative.
    """
    wide = torch.float64
    exact = reference_gradient(op, x.to(wide), grad.to(wide), **arguments)
    generator, tokens = torch.Generator().manual_seed(0), x.numel() // x.shape[-1]
    largest = 0.0
    for draw in range(min(12, 1 + 2000 // max(tokens, 1)) if nearby else 1):
        near, target = x, exact
        if draw:
            noise = torch.randn(*x.shape[:-1], 1, generator=generator, dtype=wide)
            near = (x.to(wide) * (1 + 0.05 * noise.to(x.device))).to(x.dtype)
            target = reference_gradient(op, near.to(wide), grad.to(wide), **arguments)
        largest = max(largest, error(reference_gradient(op, near, grad, **arguments), target))
    assert_within(result, exact, 2 * largest)


def assert_within(result: Tensor, exact: Tensor, allowed: float = 0.0) -> None:
    """The largest error of `result` is at most `allowed` and one ulp at the largest value; NaN and infinities agree."""
    assert result.shape == exact.shape
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(exact))
    finite = exact[exact.isfinite()]
    if finite.numel():
        found, limit = error(result, exact), allowed + ulp(finite.abs().max().item(), result.dtype)
        assert found <= limit, f"error {found:.3g} exceeds {limit:.3g}"


def assert_rounded_once(result: Tensor, exact: Tensor) -> None:
    """`result` is `exact` rounded to its 16-bit dtype, give or take the float32 arithmetic before the rounding."""
    low, high = ((exact * (1 + sign * 1e-5) + sign * 1e-5).to(result.dtype) for sign in (-1, 1))
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    assert ((low <= result) & (result <= high)).all()


def assert_golden(result: Tensor, golden: Tensor) -> None:
    """`result` agrees with values that the published implementation computed in the same dtype."""
    difference = (result.double() - golden.double()).norm() / golden.double().norm()
    assert difference <= GOLDEN[result.dtype]


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Same shape, dtype and bits, NaN and signed zeros included."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    bits = _BITS[left.element_size()]
    assert torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
