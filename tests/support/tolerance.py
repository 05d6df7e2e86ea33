"""Tolerances of the suite, and comparisons of results.

A result is compared with brute force in extended precision, rounded to float64. Its largest error may be twice that of
the published formulas, run op by op in x.dtype by PyTorch (`eager`), plus one ulp at the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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


def relative(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the expected tensor."""
    return float((result - expected).norm() / expected.norm())


def oracle(op: str, x: Tensor, **arguments: Any) -> Tensor:
    """Return the result of `op` by brute force, rounded to float64."""
    result = getattr(brute_force, op)(x.double().cpu().numpy(), **arguments)
    return torch.from_numpy(np.ascontiguousarray(result, np.float64)).to(x.device)


def inputs_near(x: Tensor) -> Iterator[Tensor]:
    """Yield x and, if it has few tokens, inputs near it, since a result on few tokens may be accurate by chance."""
    yield x
    generator, tokens = torch.Generator().manual_seed(0), x.numel() // x.shape[-1]
    for _ in range(min(11, 2000 // max(tokens, 1))):
        noise = torch.randn(*x.shape[:-1], 1, generator=generator, dtype=torch.float64)
        yield (x.double() * (1 + 0.05 * noise.to(x.device))).to(x.dtype)


def published_errors(
    op: str, x: Tensor, arguments: dict[str, Any], exact: Tensor, dtype: torch.dtype | None = None
) -> Iterator[float]:
    """Yield the largest error of the published formulas in `dtype`, or in float32 if they overflow in it.

    Errors for some inputs near x follow that for x. The default of `dtype` is that of the result, which is x.dtype, or
    float32 for norms of tokens (float64 for float64 x).
    """
    dtype = dtype or (torch.promote_types(x.dtype, torch.float32) if op == "token_norm" else x.dtype)
    for near in inputs_near(x):
        target = exact if near is x else oracle(op, near, **arguments)
        result = getattr(eager, op)(near.to(dtype), **arguments)
        if not result[target.isfinite()].isfinite().all():
            result = getattr(eager, op)(near.float(), **arguments).to(dtype)
        yield error(result, target)


def assert_accurate(
    result: Tensor, op: str, x: Tensor, *, published_dtype: torch.dtype | None = None, **arguments: Any
) -> None:
    """Check that the error of `result` of `op(x, **arguments)` is at most twice that of the published formulas.

    published_dtype: dtype of the formulas, by default that of the result.
    """
    exact = oracle(op, x, **arguments)
    errors = published_errors(op, x, arguments, exact, published_dtype)
    assert_within(result, exact, (2 * found for found in errors))


def reference_gradient(op: str, x: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    result = getattr(stgridpool_kernels, op)(leaf, backend="reference", **arguments)
    return torch.autograd.grad(result, leaf, grad)[0]


def assert_gradient_accurate(
    result: Tensor, op: str, x: Tensor, grad: Tensor, *, nearby: bool = True, **arguments: Any
) -> None:
    """Check that `result`, the gradient of `op(x, **arguments)` for `grad`, is accurate.

    Its error may be twice the largest error of the reference in x.dtype, over x and some inputs near x. nearby: False
    uses x alone, where norms have no derivative.
    """

    def exact(near: Tensor) -> Tensor:
        return reference_gradient(op, near.double(), grad.double(), **arguments)

    def errors() -> Iterator[float]:
        for near in inputs_near(x) if nearby else (x,):
            yield error(reference_gradient(op, near, grad, **arguments), exact(near))

    assert_within(result, exact(x), (2 * found for found in errors()))


def assert_within(result: Tensor, exact: Tensor, allowed: float | Iterable[float] = 0.0) -> None:
    """Check that the largest error is at most `allowed` plus one ulp at the largest value; NaN and inf must agree.

    allowed: the largest counts if there are several. They are computed only until one is enough, to save time.
    """
    assert result.shape == exact.shape
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(exact))
    finite = exact[exact.isfinite()]
    if finite.numel():
        found, limit = error(result, exact), ulp(finite.abs().max().item(), result.dtype)
        several = iter([allowed] if isinstance(allowed, float) else allowed)
        most = 0.0
        while found > most + limit and (more := next(several, None)) is not None:
            most = max(most, more)
        assert found <= most + limit, f"error {found:.3g} exceeds {most + limit:.3g}"


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
