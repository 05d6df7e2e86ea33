"""Colours of the package's pictures, and checks of their file names and of matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..io.writing import refuse_existing

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILLION", "check_picture", "require_matplotlib",
]  # fmt: skip

# the palette of Okabe and Ito, whose colours colour-blind readers can distinguish
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
GREY = "#666666"


def check_picture(output: Path, force: bool) -> None:
    """Raise if a picture cannot be written to `output`. Call it before the work that the picture shows.

    Raises ValueError unless the name ends in .png, FileExistsError or another OSError as `refuse_existing`.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"the figure is a PNG: give a name that ends in .png, got {output}")
    refuse_existing(output, force)


def require_matplotlib() -> None:
    """Raise ImportError, which names the package to install, unless matplotlib and Pillow can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the figure needs matplotlib: pip install "stgridpool_kernels[demo]"', name=error.name
        ) from error
