"""What pooling saves downstream: python -m benchmarks.prefill. Exits with 0 if every result was right.

A decoder of the shape of Qwen2, with random weights, runs over the visual tokens of a video and a short text: one
forward that fills the KV cache and ends in the logits of the last position, as generation begins. That takes the same
time whatever the weights are; answers would mean nothing. Every pooling is compared with its definition before it is
timed, on the tokens that it is timed on. The variants take turns; a turn is one pooling and the prefill of what it
made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import devices, results
from benchmarks.machine import ROOT, describe, memory_bytes
from benchmarks.measure import new_run
from benchmarks.providers import Provider, mismatch, providers
from benchmarks.report import QUIET_CORES, machine_line, show_number, show_ratio, show_time
from benchmarks.results import Run
from benchmarks.workloads import Workload, random_tokens
from stgridpool_kernels.backends import choose_backend
from stgridpool_kernels.cli.picture import require_matplotlib
from stgridpool_kernels.io.writing import atomic_write

RESULTS = ROOT / "benchmarks" / "results"
SIZE = 27
"""Rows and columns of a frame's tokens: SigLIP's 384 pixels in patches of 14."""

TEXT_TOKENS = 64

BUDGETS = (0.5, 0.3)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Found = TypeVar("Found")


class Refused(Exception):
    """What was asked for cannot be measured here."""


# ---- decoders ----


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder. tied: input and output embeddings are one matrix."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def kv_width(self) -> int:
        """Keys, or values, of a token in one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def parameters(self) -> int:
        h, kv = self.hidden, self.kv_width
        attention = 2 * h * h + 2 * h * kv + h + 2 * kv  # queries, keys and values have a bias
        layer = attention + 3 * h * self.intermediate + 2 * h
        return (1 if self.tied else 2) * self.vocabulary * h + self.layers * layer + h

    def needed_bytes(self, frames: int, itemsize: int) -> dict[str, int]:
        """Memory that the longest prompt takes, about: what a layer holds at once is counted, fragments are not."""
        visual = frames * SIZE * SIZE
        prompt = visual + TEXT_TOKENS
        values = {
            "weights": self.parameters,
            "tokens": (visual + prompt) * self.hidden,
            "KV cache": 2 * self.layers * self.kv_width * prompt,
            "activations": prompt * (4 * self.hidden + 3 * self.intermediate),
            "logits": self.vocabulary,
        }
        return {name: number * itemsize for name, number in values.items()}


DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder("tiny", 64, 2, 4, 2, 128, 256, tied=True),  # for tests
        Decoder("0.5b", 896, 24, 14, 2, 4864, 151_936, tied=True),
        Decoder("7b", 3584, 28, 28, 4, 18_944, 152_064, tied=False),
    )
}


def transformers() -> Any:
    """The package that the decoder comes from; raises Refused without it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise Refused(f"the decoder comes from transformers ({error}): pip install transformers") from error


def build(decoder: Decoder, dtype: torch.dtype, device: str) -> Any:
    """The decoder with random weights."""
    config = transformers().Qwen2Config(
        vocab_size=decoder.vocabulary,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=decoder.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        # its own attention would hold all scores
        model = transformers().AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


@contextmanager
def without_score_matrix() -> Iterator[None]:
    """Attention by kernels that never hold all L × L scores, which would be most of the memory of a prefill."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    try:
        with sdpa_kernel(kernels):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise Refused("torch has no attention here that does without all L × L scores: try another --dtype") from error


def check_memory(decoder: Decoder, frames: int, dtype: torch.dtype, device: str, free: int | None) -> None:
    """Raises Refused if the longest prompt needs more than what is free, where that is known."""
    needed = decoder.needed_bytes(frames, dtype.itemsize)
    if free is None or sum(needed.values()) <= free:
        return
    parts = ", ".join(f"{name} {number / 2**30:.1f}" for name, number in needed.items())
    raise Refused(
        f"{decoder.name} in {_name(dtype)} with {frames} frames needs about {sum(needed.values()) / 2**30:.1f} GiB "
        f"({parts}), {device} has {free / 2**30:.1f} GiB free: fewer --frames, or a smaller --model"
    )


def free_bytes(device: str) -> int | None:
    return memory_bytes("MemAvailable") if device == "cpu" else torch.cuda.mem_get_info(device)[0]


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies matrices of it natively."""
    # With AVX512-BF16, torch multiplies matrices 4 to 5 times as fast as in float32; whatever has AMX has that too.
    # Without, it converts every operand, and float32 is the faster.
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    native = device != "cpu" or capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- poolings ----


@dataclass(frozen=True)
class Variant:
    """A pooling of SIZE × SIZE tokens to `grid`; provider: its name there, before a colon; "" does not pool.

    budget: the share of the tokens that was asked for, where the grid comes from that.
    """

    name: str
    grid: tuple[int, int]
    provider: str = ""
    ceil_mode: bool = False
    output_size: tuple[int, int] | None = None
    budget: float | None = None


def side_of(budget: float, size: int = SIZE) -> int:
    """Rows and columns of the square of tokens that is closest to a share of size × size."""
    return min(range(1, size + 1), key=lambda side: abs(side * side - budget * size * size))


def variants() -> list[Variant]:
    """From the most tokens to the fewest."""
    floor, ceil = (SIZE // 2, SIZE // 2), (-(-SIZE // 2), -(-SIZE // 2))
    squares = [(budget, (side_of(budget), side_of(budget))) for budget in BUDGETS]
    return [
        Variant("unpooled", (SIZE, SIZE)),
        *(
            Variant(f"grid_pool(output_size={square})", square, "grid_pool", output_size=square, budget=budget)
            for budget, square in squares
        ),
        Variant("llava_bilinear_pool", ceil, "llava_bilinear_pool", ceil_mode=True),
        Variant("grid_pool(ceil_mode=True)", ceil, "grid_pool", ceil_mode=True),
        Variant("llava_avg_pool", floor, "llava_avg_pool"),
        Variant("grid_pool()", floor, "grid_pool"),
    ]


def provider_of(variant: Variant, x: Tensor) -> Provider | None:
    """Who pools x as the variant says: of `grid_pool` the backend that a call without a name would take."""
    if not variant.provider:
        return None
    workload = Workload(
        variant.name,
        (len(x),),
        channels=x.shape[3],
        dtype=x.dtype,
        ceil_mode=variant.ceil_mode,
        output_size=variant.output_size,
    )
    name = variant.provider
    if name == "grid_pool":
        name += f":{choose_backend(x, workload.plan('grid_pool')).name}"
    found = next((each for each in providers(workload, x.device.type) if each.name == name), None)
    if found is None:
        raise Refused(f"{name} is not timed on {x.device.type}")
    return found


def check(provider: Provider, x: Tensor, grid: tuple[int, int]) -> str:
    """ "ok", or why what it makes of x is wrong."""
    pooled = provider.call(x)
    assert tuple(pooled.shape[1:3]) == grid
    reason = mismatch(pooled, provider.definition(x), provider.ulps)
    return "ok" if reason is None else f"wrong: {reason}"


# ---- timing ----


@dataclass(eq=False)
class Prefill:
    """What was found for one variant; None where it was not measured or has no meaning.

    provider: of `providers.py`, "" without pooling. check: "ok", or "wrong: …", and then there are no times.
    share_of_tokens: that are left; budget: that were asked for. pool_…_us, prefill_…_us: quantiles of the time of a
    pooling and of a prefill, in µs. total_us: both medians together; share_of_pooling: the pooling's part of it.
    relative_to_unpooled: the total over that without pooling; speedup_over_unpooled: its inverse.
    extra_peak_bytes: GPU memory in use at most during the prefill, beyond the weights and the tokens before pooling.
    others_cores: CPU cores that other processes and the hypervisor used during the most disturbed prefill.
    """

    run: str
    variant: str
    provider: str
    grid: tuple[int, int]
    frames: int
    visual_tokens: int
    prompt_tokens: int
    share_of_tokens: float
    budget: float | None = None
    check: str = "ok"
    samples: int | None = None
    pool_p20_us: float | None = None
    pool_p50_us: float | None = None
    pool_p80_us: float | None = None
    prefill_p20_us: float | None = None
    prefill_p50_us: float | None = None
    prefill_p80_us: float | None = None
    total_us: float | None = None
    share_of_pooling: float | None = None
    relative_to_unpooled: float | None = None
    speedup_over_unpooled: float | None = None
    extra_peak_bytes: int | None = None
    others_cores: float | None = None

    @staticmethod
    def of(variant: Variant, provider: Provider | None, run: str, frames: int) -> Prefill:
        rows, cols = variant.grid
        return Prefill(
            run=run,
            variant=variant.name,
            provider=provider.name if provider else "",
            grid=variant.grid,
            frames=frames,
            visual_tokens=frames * rows * cols,
            prompt_tokens=frames * rows * cols + TEXT_TOKENS,
            share_of_tokens=rows * cols / SIZE**2,
            budget=variant.budget,
        )

    def add_times(self, pool_us: Sequence[float], prefill_us: Sequence[float]) -> None:
        """pool_us is empty where nothing is pooled."""
        self.samples = len(prefill_us)
        self.prefill_p20_us, self.prefill_p50_us, self.prefill_p80_us = _quantiles(prefill_us)
        self.total_us = self.prefill_p50_us
        if pool_us:
            self.pool_p20_us, self.pool_p50_us, self.pool_p80_us = _quantiles(pool_us)
            self.total_us += self.pool_p50_us
            self.share_of_pooling = self.pool_p50_us / self.total_us


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    p20, p50, p80 = (round(float(np.quantile(samples, q)), 2) for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def compare(rows: Sequence[Prefill]) -> None:
    """Sets every total's relation to the unpooled one."""
    unpooled = next((row.total_us for row in rows if row.variant == "unpooled"), None)
    for row in rows:
        if unpooled and row.total_us:
            row.relative_to_unpooled = row.total_us / unpooled
            row.speedup_over_unpooled = unpooled / row.total_us


def timed(call: Callable[[], Found], device: str) -> tuple[Found, float]:
    """What a call returns, and its time in µs; on a GPU between events, with nothing left to do before the first."""
    if device == "cpu":
        begin = time.perf_counter()
        result = call()
        return result, (time.perf_counter() - begin) * 1e6
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, float(start.elapsed_time(end)) * 1e3


@torch.inference_mode()
def measure(
    decoder: Decoder,
    dtype: torch.dtype,
    device: str,
    frames: int,
    repeats: int,
    run: str = "",
    show: Callable[[str, int, int], None] = lambda text, done, of: None,
) -> list[Prefill]:
    """A row for every variant. show(what is done next, steps done, steps in all) is called meanwhile.

    Raises:
        Refused: there is no transformers, or no attention that does without all scores.
    """
    asked = variants()
    show("checking", 0, len(asked) * (repeats + 1))
    x = random_tokens((frames, SIZE, SIZE, decoder.hidden), dtype, device, seed=0)
    text = random_tokens((TEXT_TOKENS, decoder.hidden), dtype, device, seed=1)
    poolings, rows = {}, []
    for variant in asked:
        poolings[variant.name] = provider = provider_of(variant, x)
        row = Prefill.of(variant, provider, run, frames)
        if provider is not None:
            row.check = check(provider, x, variant.grid)
        rows.append(row)
    if device != "cpu":
        torch.cuda.empty_cache()  # what the definitions took
    show("building the decoder", 0, len(asked) * (repeats + 1))
    model = build(decoder, dtype, device)

    racing = [row for row in rows if row.check == "ok"]
    times: dict[str, tuple[list[float], list[float]]] = {row.variant: ([], []) for row in racing}
    for turn in range(repeats + 1):
        for i, row in enumerate(racing):
            turns = "warming up" if turn == 0 else f"turn {turn} of {repeats}"
            show(f"{turns}: {row.variant}", turn * len(racing) + i, (repeats + 1) * len(racing))
            before = 0 if device == "cpu" else torch.cuda.memory_allocated(device)
            provider = poolings[row.variant]
            pooled, pool_us = timed(partial(provider.call, x), device) if provider is not None else (x, None)
            prompt = torch.cat([pooled.flatten(0, 2), text])[None]
            del pooled  # an engine does not keep it either
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
            begin = devices.cpu_seconds()
            prefill_us = _prefill(model, prompt, device)
            wall, own, busy = (b - a for a, b in zip(begin, devices.cpu_seconds(), strict=True))
            del prompt
            if turn == 0:
                continue  # compiles kernels, chooses algorithms, takes memory from the system
            times[row.variant][1].append(prefill_us)
            if pool_us is not None:
                times[row.variant][0].append(pool_us)
            if device == "cpu" and wall >= 0.1:  # the system counts in steps of 10 ms
                row.others_cores = round(max(row.others_cores or 0.0, (busy - own) / wall), 3)
            if device != "cpu":
                row.extra_peak_bytes = torch.cuda.max_memory_allocated(device) - before
    for row in racing:
        row.add_times(*times[row.variant])
    compare(rows)
    return rows


def _prefill(model: Any, prompt: Tensor, device: str) -> float:
    """The time in µs of one forward over a prompt (1, L, C) that fills a new KV cache."""
    with without_score_matrix():
        result, spent = timed(partial(model, inputs_embeds=prompt, use_cache=True, logits_to_keep=1), device)
    assert result.logits.shape[1] == 1
    assert result.past_key_values.get_seq_length() == prompt.shape[1]
    return spent


# ---- results ----


def load(path: Path) -> list[tuple[Run, list[Prefill]]]:
    """All runs in a file and what they found, oldest first. Lines that are cut or of another kind are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no run.
    """
    found: dict[str, tuple[Run, list[Prefill]]] = {each.run.run: (each.run, []) for each in results.load(path)}
    known = {each.name for each in fields(Prefill)}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and values.get("kind") == "prefill" and values.get("run") in found:
            row = Prefill(**{name: value for name, value in values.items() if name in known})
            found[row.run][1].append(replace(row, grid=cast(tuple[int, int], tuple(row.grid))))
    return list(found.values())


def save(run: Run, rows: Sequence[Prefill], path: Path) -> None:
    """Appends a run and what it found."""
    writer = results.Writer(path)
    for line in (run, *rows):
        writer.write(line)
    writer.close()


def describe_run(run: Run, rows: Sequence[Prefill]) -> str:
    """What was measured, and where."""
    s = run.settings
    others = max((row.others_cores or 0.0 for row in rows), default=0.0)
    return (
        f"A decoder of Qwen2's shape with random weights ({s['model']}: {s['parameters'] / 1e9:.2f} × 10⁹ "
        f"parameters, {s['dtype']}), {s['frames']} frames of {SIZE} × {SIZE} tokens, {s['text_tokens']} tokens of "
        f"text; medians of {s['repeats']}. {machine_line(run)}, transformers {run.versions['transformers']}."
        + (f" Other processes used up to {others:.1f} cores meanwhile." if others >= QUIET_CORES else "")
    )


def show_seconds(us: float) -> str:
    return f"{show_number(us / 1e6)} s" if us >= 1e6 else show_time(us)


def show_share(share: float | None) -> str:
    return "-" if share is None else f"{show_number(100 * share)} %"


def terminal_table(rows: Sequence[Prefill]) -> Table:
    """Two lines for every variant: medians, and below a time the quantiles of 20 % and 80 %."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("variant\ngrid, share of tokens", no_wrap=True)
    peaks = any(row.extra_peak_bytes is not None for row in rows)
    names = ["visual\nprompt", "pooling", "prefill", "pooling's\nshare", "total\nspeed-up"]
    for name in [*names, *(["peak\nGiB"] if peaks else [])]:
        table.add_column(name, justify="right", no_wrap=True)

    def spread(p20: float | None, p50: float | None, p80: float | None) -> str:
        if p20 is None or p50 is None or p80 is None:
            return "-"
        scale = 1e6 if p50 >= 1e6 else 1e3 if p50 >= 1e3 else 1.0
        return f"{show_seconds(p50)}\n{show_number(p20 / scale)}–{show_number(p80 / scale)}"

    for row in rows:
        asked = "" if row.budget is None else f", asked {100 * row.budget:.0f} %"
        what = f"{row.variant}\n{row.grid[0]} × {row.grid[1]}, {show_share(row.share_of_tokens)}{asked}"
        tokens = f"{row.visual_tokens:,}\n{row.prompt_tokens:,}"
        if row.check != "ok":
            table.add_row(f"{what}\n{row.check}", tokens)
            continue
        cells = [
            spread(row.pool_p20_us, row.pool_p50_us, row.pool_p80_us),
            spread(row.prefill_p20_us, row.prefill_p50_us, row.prefill_p80_us),
            show_share(row.share_of_pooling),
            f"{show_share(row.relative_to_unpooled)}\n{show_speedup(row)}",
        ]
        if peaks:
            cells.append("-" if row.extra_peak_bytes is None else f"{row.extra_peak_bytes / 2**30:.2f}")
        table.add_row(what, tokens, *cells)
    return table


def show_speedup(row: Prefill) -> str:
    return "-" if row.speedup_over_unpooled is None else f"{show_ratio(row.speedup_over_unpooled)} ×"


def markdown(run: Run, rows: Sequence[Prefill]) -> str:
    """A table for the documentation, one line per variant, and what was measured."""
    lines = [
        "| pooled by | grid | visual tokens | of all | pooling | prefill | both faster by | pooling's share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "none" if row.variant == "unpooled" else f"`{row.variant}`"
        cells = [name, f"{row.grid[0]} × {row.grid[1]}", f"{row.visual_tokens:,}", show_share(row.share_of_tokens)]
        if row.check == "ok":
            cells += ["-" if us is None else show_seconds(us) for us in (row.pool_p50_us, row.prefill_p50_us)]
            cells += [show_speedup(row), show_share(row.share_of_pooling)]
        else:
            cells += [row.check, "-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", textwrap.fill(describe_run(run, rows), 120)])


# Okabe and Ito's palette, which colour-blind readers can tell apart, as in the other pictures of results.
_COLOURS = {"": "#A8A8A8", "grid_pool": "#0072B2", "llava": "#CC79A7"}
_POOLING = "#D55E00"


def plot(run: Run, rows: Sequence[Prefill], path: Path) -> None:
    """A PNG: a bar for every variant, its prefill and then its pooling, labelled with the visual tokens.

    Raises ImportError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [(row, row.total_us / 1e6) for row in rows if row.check == "ok" and row.total_us is not None]
    figure = Figure(figsize=(9, 1.9 + 0.5 * len(shown)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (row, total) in enumerate(shown):
        pooling = (row.pool_p50_us or 0.0) / 1e6
        colour = next(colour for name, colour in reversed(_COLOURS.items()) if row.provider.startswith(name))
        axes.barh(i, total - pooling, color=colour, height=0.62)
        axes.barh(i, pooling, left=total - pooling, color=_POOLING, height=0.62)
        facts = show_seconds(total * 1e6)
        if row.pool_p50_us is not None:
            facts += f", {show_speedup(row)} as fast; pooling is {show_share(row.share_of_pooling)} of it"
        axes.annotate(facts, (total, i), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(
        range(len(shown)),
        [f"{row.variant}\n{row.visual_tokens:,} tokens, {show_share(row.share_of_tokens)}" for row, _ in shown],
        fontsize=8.5,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max((total for _, total in shown), default=1.0))
    axes.set_xlabel("pooling and prefill, s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.grid(True, color="#E4E4E4")
    axes.set_axisbelow(True)
    keys = {
        "prefill, unpooled": _COLOURS[""],
        "prefill after grid_pool": _COLOURS["grid_pool"],
        "prefill after LLaVA's pooling": _COLOURS["llava"],
        "pooling, at the end of the bar": _POOLING,
    }
    handles = [Patch(color=colour, label=label) for label, colour in keys.items()]
    axes.legend(handles=handles, loc="lower right", fontsize=8.5, frameon=False)
    figure.suptitle("What pooling saves of the prefill", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(textwrap.fill(describe_run(run, rows), 135), fontsize=7.5, color="#666666", x=0.01, ha="left")
    with atomic_write(path, force=True) as file:
        figure.savefig(file, format="png")


# ---- command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", choices=DECODERS, help="size of the decoder; 7b on a GPU, 0.5b on a CPU")
    parser.add_argument("--frames", type=int, help="64 on a GPU, 8 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16, or float32 on a CPU that is not made for that")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; a GPU if there is one")
    parser.add_argument("--repeats", type=int, help="turns of every variant; 10 on a GPU, 3 on a CPU")
    parser.add_argument("--threads", type=int, help="of a CPU; as many as torch takes")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="of JSON lines (.jsonl) to append to")
    parser.add_argument("--no-save", action="store_true", help="write no file")
    parser.add_argument("--quick", action="store_true", help="2 frames and 1 turn, to try it; no file unless -o")
    given = parser.parse_args(arguments)
    for name in ("frames", "repeats", "threads"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.output is not None and given.output.suffix != ".jsonl":
        parser.error(f"--output must end in .jsonl, got {given.output}")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:1, got {device!r}")
    index = 0 if kind == "cpu" else torch.device(device).index or 0
    if kind == "cuda" and index >= torch.cuda.device_count():
        parser.error(f"--device {device}: torch finds {torch.cuda.device_count()} GPUs")
    device = "cpu" if kind == "cpu" else device
    gpu = kind == "cuda"
    decoder = DECODERS[given.model or ("7b" if gpu else "0.5b")]
    frames = given.frames or (2 if given.quick else 64 if gpu else 8)
    repeats = given.repeats or (1 if given.quick else 10 if gpu else 3)
    dtype = DTYPES[given.dtype] if given.dtype else default_dtype(device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if gpu:
        torch.cuda.set_device(index)  # events are recorded there
    try:
        check_memory(decoder, frames, dtype, device, free_bytes(device))
        run, rows = _run(decoder, dtype, device, frames, repeats)
    except Refused as refused:
        parser.error(str(refused))
    except torch.OutOfMemoryError as error:
        parser.error(f"{device} has too little memory for {frames} frames of {decoder.name}: {str(error).strip()}")
    if not given.no_save and (given.output is not None or not given.quick):
        path = given.output or RESULTS / f"prefill-{results.file_name(run.device)}"
        save(run, rows, path)
        Console().print(f"appended to {path}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(row.check == "ok" for row in rows) else 1


def _run(decoder: Decoder, dtype: torch.dtype, device: str, frames: int, repeats: int) -> tuple[Run, list[Prefill]]:
    """Measures, with progress on the terminal, and prints a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    about = describe(device, torch.get_num_threads())
    about["versions"] |= {"transformers": transformers().__version__}
    settings = {
        "model": decoder.name,
        "parameters": decoder.parameters,
        "dtype": _name(dtype),
        "frames": frames,
        "text_tokens": TEXT_TOKENS,
        "repeats": repeats,
    }
    run = new_run(about, settings, {})
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # refreshing by a thread of its own would take a core from what is timed
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=None)

        def show(text: str, done: int, of: int) -> None:
            progress.update(task, description=text, completed=done, total=of, refresh=True)

        rows = measure(decoder, dtype, device, frames, repeats, run.run, show)
    console.print(terminal_table(rows))
    console.print(describe_run(run, rows), markup=False, highlight=False)
    console.print("The weights are random: times mean something, answers would not.")
    return run, rows


if __name__ == "__main__":
    sys.exit(main())
