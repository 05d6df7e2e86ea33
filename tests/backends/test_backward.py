"""Gradients of every backend against float64, and properties of them that hold exactly.

A gradient is measured against that of the reference in float64, which rounds nothing and which `test_ops` checks by
finite differences. Its largest error may be twice the reference's own in x.dtype, plus one ulp at the largest value.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import stgridpool_kernels
from stgridpool_kernels.backends import reference
from tests.support.cases import LAYOUTS, Arguments, Size, laid_out, run, tokens
from tests.support.strategies import (
    gridding_arguments,
    inputs,
    norm_arguments,
    packings,
    temperatures,
    window_arguments,
)
from tests.support.tolerance import assert_gradient_accurate, assert_same_bits
from tests.support.triples import KERNEL_DTYPES, KERNELS, each, only, pairs

CALLS: dict[str, tuple[str, Arguments]] = {
    "grid_pool-published": ("grid_pool", {}),
    "grid_pool-ceil": ("grid_pool", {"ceil_mode": True}),
    "grid_pool-first": ("grid_pool", {"sampling": "first"}),
    "grid_pool-paper": ("grid_pool", {"sampling": "first", "resize": "bilinear", "normalize_norm": False}),
    "grid_pool-overlapping": (
        "grid_pool",
        {"frame_strides": (1, 3), "grid_shape": (1, 2, 3, 1), "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "grid_pool-every-frame": ("grid_pool", {"frame_strides": (1, 2, 1), "temperature": -2.0, "norm_type": 1.0}),
    "grid_pool-gaps": ("grid_pool", {"frame_strides": (1,), "kernel_size": 1, "stride": (2, 3), "norm_type": 3.0}),
    "grid_pool-adaptive": ("grid_pool", {"frame_strides": (1, 2), "output_size": (2, 3), "norm_type": math.inf}),
    "temporal_grid-published": ("temporal_grid", {}),
    "temporal_grid-mixed": ("temporal_grid", {"frame_strides": (2, 1, 3), "grid_shape": (2, 1, 3, 2, 1, 1)}),
    "temporal_grid-off": ("temporal_grid", {"frame_strides": ()}),
    "norm_pool-published": ("norm_pool", {}),
    "norm_pool-padding": ("norm_pool", {"kernel_size": 2, "padding": 1, "norm_type": 0.5, "temperature": 4.0}),
    "norm_pool-exclude_pad": (
        "norm_pool",
        {"kernel_size": (3, 2), "stride": 1, "padding": 1, "count_include_pad": False, "norm_type": 1.0},
    ),
    "grid_pool-norm_channels": ("grid_pool", {"frame_strides": (1, 2), "ceil_mode": True, "norm_channels": 3}),
    "norm_pool-norm_channels": ("norm_pool", {"output_size": 2, "norm_type": math.inf, "norm_channels": 4}),
    "token_norm-norm_channels": ("token_norm", {"norm_channels": 3}),
    "token_norm-published": ("token_norm", {}),
}
EVERY_CALL = {"op, arguments": CALLS}
FEWER = settings(max_examples=settings.default.max_examples // 3)
"""A random gradient takes as long as three random calls: its oracle is a backward in float64."""


def gradient(backend: str, op: str, x: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    """Return the gradient of `op(x, **arguments)` in x on `backend`, where `grad` is that of the result."""
    leaf = x.detach().requires_grad_()
    result = run(backend, op, leaf, **arguments)
    (found,) = torch.autograd.grad(result, leaf, grad)
    assert found.dtype == x.dtype
    return found


def like_result(op: str, x: Tensor, seed: int = 1, **arguments: Any) -> Tensor:
    """Random numbers in the shape and dtype of `op(x, **arguments)`."""
    with torch.no_grad():
        result = getattr(stgridpool_kernels, op)(x.to("meta"), **arguments)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(result.shape, generator=generator, dtype=torch.float64).to(x.device, result.dtype)


# ---- accuracy ----


@each(EVERY_CALL)
@only(*KERNEL_DTYPES)
def test_gradient(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    for content in ("usual", "outlier"):
        x = tokens(*size, 11, content=content, dtype=dtype, device=device)
        grad = like_result(op, x, **arguments)
        assert_gradient_accurate(gradient(backend, op, x, grad, **arguments), op, x, grad, **arguments)


NORMS: dict[str, Arguments] = {
    "l2": {},
    "l1": {"norm_type": 1.0},
    "max": {"norm_type": math.inf},
    "p3": {"norm_type": 3.0},
}
WINDOWS: dict[str, Arguments] = {"fused": {"ceil_mode": True}, "general": {"output_size": 2}}


@each({"windows": WINDOWS, "norm": NORMS, "norm_channels": [13, 16, 1]})
def test_norm_gives_other_channels_no_gradient(
    windows: Arguments,
    norm: Arguments,
    norm_channels: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    size: Size,
) -> None:
    """Channels that the norm does not run over get α g alone, even if the norm's part of the gradient is NaN."""
    x = tokens(*size, 70, dtype=dtype, device=device)
    x[..., 30] = math.nan  # in the products of tokens and upstream gradients, but not in the norms
    arguments = {**windows, **norm, "norm_channels": norm_channels}
    grad = like_result("norm_pool", x, **arguments)
    found = gradient(backend, "norm_pool", x, grad, **arguments)
    assert found[..., :norm_channels].isnan().any()
    assert found[..., norm_channels:].isfinite().all()
    finite = x.nan_to_num(0)
    expected = gradient(backend, "norm_pool", finite, grad, **arguments)
    assert_same_bits(found[..., norm_channels:], expected[..., norm_channels:])


@only(*KERNEL_DTYPES)
@FEWER
@given(data=st.data())
def test_random_gradient_of_grid_pool(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x)) | data.draw(norm_arguments(x.shape[-1]))
    arguments |= data.draw(window_arguments(*x.shape[-3:-1])) | {"temperature": data.draw(temperatures)}
    grad = laid_out(like_result("grid_pool", x, **arguments), data.draw(st.sampled_from(LAYOUTS)))
    assert_gradient_accurate(gradient(backend, "grid_pool", x, grad, **arguments), "grid_pool", x, grad, **arguments)


@only(*KERNEL_DTYPES)
@FEWER
@given(data=st.data())
def test_random_gradient_at_the_published_windows(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    """The fused kernels take 2 × 2 windows and grids, any strides and any norm."""
    x = data.draw(inputs(dtype, device, size))
    H, W = x.shape[-3:-1]
    arguments = (
        data.draw(packings(x)) | data.draw(norm_arguments(x.shape[-1])) | {"temperature": data.draw(temperatures)}
    )
    arguments |= {"sampling": data.draw(st.sampled_from(["last", "first"])), "ceil_mode": min(H, W) < 2}
    arguments["ceil_mode"] |= data.draw(st.booleans())
    arguments["frame_strides"] = data.draw(st.lists(st.sampled_from([1, 2, 4, 3]), max_size=3))
    if min(H, W) < 2:
        arguments["output_size"] = None
        arguments["kernel_size"] = (min(H, 2), min(W, 2))
    grad = laid_out(like_result("grid_pool", x, **arguments), data.draw(st.sampled_from(LAYOUTS)))
    assert_gradient_accurate(gradient(backend, "grid_pool", x, grad, **arguments), "grid_pool", x, grad, **arguments)


@only(*KERNEL_DTYPES)
@FEWER
@given(data=st.data())
def test_random_gradient_of_temporal_grid(
    data: st.DataObject, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = data.draw(inputs(dtype, device, size))
    arguments = data.draw(gridding_arguments()) | data.draw(packings(x))
    grad = laid_out(like_result("temporal_grid", x, **arguments), data.draw(st.sampled_from(LAYOUTS)))
    assert_gradient_accurate(
        gradient(backend, "temporal_grid", x, grad, **arguments), "temporal_grid", x, grad, **arguments
    )


@pytest.mark.slow_interpreted
@pairs({"shape": [(8, 5, 7, 3584), (16, 9, 9, 100)]})
@only(torch.bfloat16, torch.float16)
def test_realistic_tokens(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = tokens(*shape, dtype=dtype, device=device)
    arguments = {"frame_strides": (1, 2), "ceil_mode": True}
    grad = like_result("grid_pool", x, **arguments)
    assert_gradient_accurate(gradient(backend, "grid_pool", x, grad, **arguments), "grid_pool", x, grad, **arguments)


# ---- where norms have no derivative ----

WINDOWS: dict[str, Arguments] = {"fused": {}, "general": {"kernel_size": 3, "stride": 1}}


@pairs({"norm_type": [0.5, 1.0, 1.5, 2.0, 3.0, math.inf], "windows": WINDOWS})
@only(*KERNEL_DTYPES)
def test_subgradients(
    windows: Arguments, norm_type: float, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Zero tokens, zero elements, and tokens that are equal or have several largest elements."""
    x = tokens(4, 4, 6, 12, dtype=dtype, device=device)
    x[0] = 0
    x[1, 1] = 0
    x[2, :, :, ::2] = 0
    x[3] = x[3, 0, 0]
    x[3, ..., 2:8] = x[3].abs().max() * 1.5
    x[3, ..., 3:8:2] *= -1
    arguments = {"norm_type": norm_type, **windows}
    grad = like_result("norm_pool", x, **arguments)
    found = gradient(backend, "norm_pool", x, grad, **arguments)
    assert found.isfinite().all()
    assert_gradient_accurate(found, "norm_pool", x, grad, nearby=False, **arguments)


# ---- what holds exactly ----


@pairs({"size": {"fused": 2, "general": 4}, "C": [24, 3600], "norm_type": [1.0, 1.5, 2.0, math.inf]})
@only(*KERNEL_DTYPES)
def test_a_token_with_all_the_weight(
    size: int, C: int, norm_type: float, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """It gets the gradient of its window as it is: g·t − Σ α g·t is 0 then, with no rounding left for τ to magnify."""
    x = tokens(6, size, size, C, dtype=dtype, device=device)
    x[:, 1, 0] *= 50
    arguments = {"kernel_size": size, "norm_type": norm_type, "temperature": 40.0, "normalize_norm": False}
    grad = like_result("norm_pool", x, **arguments)
    expected = torch.zeros_like(x)
    expected[:, 1, 0] = grad[:, 0, 0]
    torch.testing.assert_close(gradient(backend, "norm_pool", x, grad, **arguments), expected, rtol=0, atol=0)


@only(backends=KERNELS)
@pytest.mark.parametrize("windows", [{"kernel_size": 3, "stride": 2}, {"kernel_size": (5, 4), "stride": 1}], ids=str)
def test_equal_tokens(windows: Arguments, backend: str, device: torch.device) -> None:
    """Their g·t are equal: what is left of g·t − Σ α g·t by rounding is not there for τ to magnify.

    PyTorch's softmax, which the reference takes, leaves something.
    """
    token = tokens(1, 1, 1, 11, device=device)
    x = token.expand(3, 6, 7, -1).contiguous()
    grad = like_result("norm_pool", x, **windows)
    expected, found = (
        gradient(backend, "norm_pool", x, grad, temperature=temperature, **windows) for temperature in (0.0, 1e6)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow_interpreted  # one thread runs one program after the other there
@each(EVERY_CALL)
@only(*KERNEL_DTYPES)
def test_repeatable(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(*size, 24, dtype=dtype, device=device)
    grad = like_result(op, x, **arguments)
    first = gradient(backend, op, x, grad, **arguments)
    x_before, grad_before = x.clone(), grad.clone()
    for _ in range(3):
        assert_same_bits(gradient(backend, op, x, grad, **arguments), first)
    assert_same_bits(x, x_before)
    assert_same_bits(grad, grad_before)


@each(EVERY_CALL)
@only(*KERNEL_DTYPES)
def test_packed_and_batched_videos_are_alone(
    op: str, arguments: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    T = size[0]
    x = tokens(2 * T + 3, *size[1:], 24, dtype=dtype, device=device)
    grad = like_result(op, x, **arguments)
    counts = [T, 3, T]
    alone = [
        gradient(backend, op, video, of_video, **arguments)
        for video, of_video in zip(x.split(counts), grad.split(counts), strict=True)
    ]
    if op in ("grid_pool", "temporal_grid"):
        assert_same_bits(gradient(backend, op, x, grad, frame_counts=counts, **arguments), torch.cat(alone))
    batch, of_batch = (torch.stack((t[:T], t[-T:])) for t in (x, grad))
    assert_same_bits(gradient(backend, op, batch, of_batch, **arguments), torch.stack((alone[0], alone[2])))


@each(EVERY_CALL | {"layout": LAYOUTS})
def test_layouts(op: str, arguments: Arguments, layout: str, backend: str, device: torch.device, size: Size) -> None:
    """The gradient of a contiguous x, up to the order of sums over channels, whatever the layout of x and of grad."""
    x = tokens(*size, 24, dtype=torch.float32, device=device)
    grad = like_result(op, x, **arguments)
    expected = gradient(backend, op, x, grad, **arguments)
    found = gradient(backend, op, laid_out(x, layout), grad, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if op != "token_norm":  # the layouts are of tokens
        found = gradient(backend, op, x, laid_out(grad, layout), **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_expanded_gradient(backend: str, device: torch.device, size: Size) -> None:
    """The gradient of a sum has one element in memory for all."""
    x = tokens(*size, 24, device=device)
    grad = torch.ones((), device=device).expand(like_result("grid_pool", x).shape)
    assert_same_bits(gradient(backend, "grid_pool", x, grad), gradient(backend, "grid_pool", x, grad.contiguous()))


@each(EVERY_CALL)
def test_frames_without_influence_get_zero(
    op: str, arguments: Arguments, backend: str, device: torch.device, size: Size
) -> None:
    """NaN where nothing looks: an overwritten frame that no level samples, tokens that no window covers."""
    x = tokens(*size, 16, device=device)
    grad = like_result(op, x, **arguments)
    exact = gradient("reference", op, x, grad, **arguments)
    untouched = (exact == 0).all(-1)
    x[untouched] = math.nan
    found = gradient(backend, op, x, grad, **arguments)
    assert found.isfinite().all()
    assert (found[untouched] == 0).all()


@each({"windows": WINDOWS, "norm": NORMS})
@only(*KERNEL_DTYPES)
def test_norm_pool_is_grid_pool_without_levels(
    windows: Arguments, norm: Arguments, dtype: torch.dtype, backend: str, device: torch.device, size: Size
) -> None:
    x = tokens(*size, 13, dtype=dtype, device=device)
    arguments = {"temperature": 0.7, **norm, **windows}
    grad = like_result("norm_pool", x, **arguments)
    gridded = gradient(backend, "grid_pool", x, grad, frame_strides=(), **arguments)
    assert_same_bits(gradient(backend, "norm_pool", x, grad, **arguments), gridded)


# ---- who computes it ----


@only(backends=KERNELS)
def test_kernels_have_a_backward_of_their_own(
    backend: str, device: torch.device, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(*size, 16, device=device)
    ops = ("grid_pool", "norm_pool", "temporal_grid")
    expected = [gradient(backend, op, x, like_result(op, x)) for op in ops]
    for name in ("grid_pool", "temporal_grid", "_norm"):
        monkeypatch.setattr(reference, name, None)
    for op, of_op in zip(ops, expected, strict=True):
        assert_same_bits(gradient(backend, op, x, like_result(op, x)), of_op)


# ---- in a training step ----


class Step(torch.nn.Module):
    """A projector, the pooling, and something that its tokens go into."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.projector, self.head = torch.nn.Linear(C, C), torch.nn.Linear(C, 3)

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        def pooled(x: Tensor) -> Tensor:
            return torch.ops.stgp.grid_pool(self.projector(x))

        tokens = checkpoint(pooled, x, use_reentrant=False) if checkpointed else pooled(x)
        return self.head(tokens).square().mean()


def parameter_gradients(step: Step) -> list[Tensor]:
    found = [parameter.grad for parameter in step.parameters()]
    step.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def test_training_step(backend: str, device: torch.device, size: Size) -> None:
    """Compiled, and with activations that are computed again, it learns what it learns plainly."""
    torch.manual_seed(0)
    step, x = Step(16).to(device), tokens(*size, 16, device=device)
    with stgridpool_kernels.use_backend(backend):
        step(x).backward()
        expected = parameter_gradients(step)
        assert len(expected) == 4
        step(x, checkpointed=True).backward()
        for found, plain in zip(parameter_gradients(step), expected, strict=True):
            assert_same_bits(found, plain)
        torch.compile(step, fullgraph=True, backend="aot_eager")(x).backward()
        for found, plain in zip(parameter_gradients(step), expected, strict=True):
            torch.testing.assert_close(found, plain)
    with stgridpool_kernels.use_backend("reference"):
        step(x).backward()
    for found, plain in zip(parameter_gradients(step), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_nothing_is_saved_besides_x(backend: str, device: torch.device, size: Size) -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = tokens(*size, 16, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(backend, "grid_pool", x)
    assert sorted(tensor.numel() for tensor in saved) == [1, x.numel()]
    assert max(saved, key=torch.numel).data_ptr() == x.data_ptr()
