"""Tolerances of the suite, and comparisons of results.

A result is compared with brute force in float64, without intermediate rounding. Its largest error may be twice that of
the published formulas, run op by op in x.dtype by PyTorch (`eager`), plus one ulp at the largest value.
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
"""Maximum norm of the difference to golden values, relative to their norm, by dtype."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ulp(value: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of `dtype` at `value`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(value, info.smallest_normal))[1] - 1)


def error(result: Tensor, exact: Tensor) -> float:
    """Return the largest absolute error where `exact` is finite."""
    finite = exact.isfinite()
    return (result.double()[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0


def oracle(op: str, x: Tensor, **arguments: Any) -> Tensor:
    """Return the result of `op` in float64 by brute force."""
    result = getattr(brute_force, op)(x.double().cpu().numpy(), **arguments)
    return torch.from_numpy(np.ascontiguousarray(result)).to(x.device)


def published_error(op: str, x: Tensor, arguments: dict[str, Any], dtype: torch.dtype, exact: Tensor) -> float:
    """Return the largest error of the published formulas in `dtype`, or in float32 if they overflow in `dtype`.

    On few tokens they may be accurate by chance, so it is the largest error over x and some inputs near x.
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
    """Return the exact result of `op(x, **arguments)`, and the largest error allowed in addition to one ulp.

    Norms of tokens are float32 (float64 for float64 x), so they are compared with formulas in that dtype.
    published_dtype: dtype of the published formulas, by default that of x.
    """
    exact = oracle(op, x, **arguments)
    dtype = published_dtype or (torch.promote_types(x.dtype, torch.float32) if op == "token_norm" else x.dtype)
    return exact, 2 * published_error(op, x, arguments, dtype, exact)


def assert_accurate(result: Tensor, op: str, x: Tensor, **arguments: Any) -> None:
    """Check that `result` of `op(x, **arguments)` is within the error that `accuracy` allows."""
    assert_within(result, *accuracy(op, x, **arguments))


def reference_gradient(op: str, x: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    result = getattr(stgridpool_kernels, op)(leaf, backend="reference", **arguments)
    return torch.autograd.grad(result, leaf, grad)[0]


def assert_gradient_accurate(
    result: Tensor, op: str, x: Tensor, grad: Tensor, *, nearby: bool = True, **arguments: Any
) -> None:
    """Check that `result`, the gradient of `op(x, **arguments)` for `grad`, is accurate.

    Its error may be twice the largest error of the reference in x.dtype, over x and some inputs near x, since the
    reference may be accurate by chance on few tokens. nearby: False uses x alone, where norms have no derivative.
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
    """Check that the largest error is at most `allowed` plus one ulp at the largest value; NaN and inf must agree."""
    assert result.shape == exact.shape
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(exact))
    finite = exact[exact.isfinite()]
    if finite.numel():
        found, limit = error(result, exact), allowed + ulp(finite.abs().max().item(), result.dtype)
        assert found <= limit, f"error {found:.3g} exceeds {limit:.3g}"


def assert_rounded_once(result: Tensor, exact: Tensor) -> None:
    """Check that `result` is `exact` rounded to its 16-bit dtype, up to errors of float32 arithmetic before it."""
    low, high = ((exact * (1 + sign * 1e-5) + sign * 1e-5).to(result.dtype) for sign in (-1, 1))
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    assert ((low <= result) & (result <= high)).all()


def assert_golden(result: Tensor, golden: Tensor) -> None:
    """Check that `result` agrees with values that the published implementation computed in the same dtype."""
    difference = (result.double() - golden.double()).norm() / golden.double().norm()
    assert difference <= GOLDEN[result.dtype]


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Check that shape, dtype and bits are the same, also those of NaN and signed zeros."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    bits = _BITS[left.element_size()]
    assert torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
