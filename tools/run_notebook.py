"""Runs the cells of a notebook in Jupyter's kernel, and stores what they print and draw in it.

    python -m tools.run_notebook examples/method.ipynb

`make notebook` runs this in an environment that has nbclient. Neither times nor versions are stored, so a notebook
changes where its cells or their outputs do. A cell that raises or warns leaves the notebook as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""All that a stored notebook says of the Python that ran it."""


def run(path: Path) -> None:
    """Run a notebook in the root of the tree and write it back. Raises SystemExit if a cell warned."""
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}},
        config=Config(KernelManager={"transport": "ipc"}),  # sockets of this machine alone
    ).execute()
    if warned := [output["text"] for output in _outputs(notebook) if output.get("name") == "stderr"]:
        raise SystemExit("".join(warned))
    notebook["metadata"] = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    run(parser.parse_args().notebook)


if __name__ == "__main__":
    main()
