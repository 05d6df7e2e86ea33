"""The picture of the method, docs/method.png: what it says fits into it, and its numbers are those of the package."""

from __future__ import annotations

import re

import torch

import stgridpool_kernels as stgp
from stgridpool_kernels.io.data import load_fixture
from tools.banner import DPI, HEIGHT, SEGMENT, WIDTH, draw, most_decided, save


def test_all_texts_are_inside_and_do_not_overlap() -> None:
    figure = draw()
    figure.draw_without_rendering()
    texts = list(figure.findobj(match=lambda artist: bool(getattr(artist, "get_text", str)())))
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 20
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= WIDTH * DPI
        assert box.y1 <= HEIGHT * DPI
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :]), texts[number].get_text()


def test_the_window_is_pooled_as_it_says() -> None:
    tokens, _, _ = load_fixture()
    x = torch.from_numpy(tokens[:SEGMENT]).float()
    frame, row, col = most_decided(stgp.token_norm(x)[:-1])
    (text,) = (text.get_text() for text in draw().texts if text.get_text().startswith("pooled token"))
    weights = torch.tensor([float(number) for number in re.findall(r"\d\.\d\d", text)])
    window = x[frame, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].flatten(0, 1)
    pooled = stgp.norm_pool(x)[frame, row, col]
    assert torch.allclose(weights @ window, pooled, rtol=0, atol=0.01 * float(window.norm(dim=-1).max()))
    assert not torch.allclose(window.mean(0), pooled, rtol=0, atol=0.01 * float(window.norm(dim=-1).max()))


def test_it_is_written_as_png(tmp_path) -> None:
    save(tmp_path / "method.png")
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")
