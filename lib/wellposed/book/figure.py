"""A paper's key figure, and the small copy of it that the gallery shows."""

import base64
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from wellposed.book.notebook import Notebook

HEADING = "## The key figure"
WIDTH, HEIGHT = 480, 200
"""The size of a thumbnail in pixels: a tile's, on a screen of double density."""


@dataclass(frozen=True)
class Figure:
    """A figure among a notebook's outputs: the file's bytes, and its alternative text."""

    png: bytes
    alt: str


def key_figure(notebook: Notebook) -> Figure | None:
    """The first figure under the heading of the key figure; without one, the first of all."""
    under, first = False, None
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            headings = [line for line in cell["source"].splitlines() if line.startswith("## ")]
            under = headings[-1].startswith(HEADING) if headings else under
            continue
        for output in cell.get("outputs", []):
            coded = output.get("data", {}).get("image/png")
            if coded is None:
                continue
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            found = Figure(base64.b64decode("".join(coded)), alt)
            if under:
                return found
            first = first or found
    return first


def thumbnail(png: bytes) -> bytes:
    """A figure scaled down into the frame of a tile, centered on white, as WebP.

    All thumbnails have the same size, so that a page knows it before they are loaded.
    """
    with Image.open(BytesIO(png)) as figure:
        scaled = figure.convert("RGBA")
    scaled.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    frame = Image.new("RGB", (WIDTH, HEIGHT), "white")
    corner = ((WIDTH - scaled.width) // 2, (HEIGHT - scaled.height) // 2)
    frame.paste(scaled, corner, mask=scaled)
    buffer = BytesIO()
    frame.save(buffer, "WEBP", quality=60)
    return buffer.getvalue()


def lighter(png: bytes) -> bytes:
    """A figure with at most 256 colors, if that makes its file smaller by a fifth or more.

    Curves, bands and color maps look the same; their files shrink to about a third.
    """
    with Image.open(BytesIO(png)) as figure:
        if figure.mode == "P":
            return png
        few = figure.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue() if buffer.tell() < 0.8 * len(png) else png
