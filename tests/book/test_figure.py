"""Finding a paper's key figure, and scaling it down."""

import base64
from io import BytesIO
from typing import Any

import pytest
from PIL import Image, ImageChops

from wellposed.book.figure import HEIGHT, WIDTH, key_figure, lighter, thumbnail


def png(width: int, height: int, color: str, mode: str = "RGB") -> bytes:
    """A picture of one color."""
    buffer = BytesIO()
    Image.new(mode, (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def heading(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "source": text, "metadata": {}}


def drawing(picture: bytes, alt: str = "") -> dict[str, Any]:
    coded = base64.b64encode(picture).decode()
    return {
        "cell_type": "code",
        "source": "plot()",
        "metadata": {"mystnb": {"image": {"alt": alt}}} if alt else {},
        "outputs": [
            {"output_type": "stream", "name": "stdout", "text": "words"},
            {"output_type": "display_data", "data": {"image/png": [coded]}},
        ],
    }


FIRST, KEY, LATER = (png(4, 4, color) for color in ("red", "green", "blue"))


def test_the_key_figure_is_the_first_under_its_heading() -> None:
    cells = [
        heading("## The experiment"),
        drawing(FIRST),
        heading("Words.\n\n## The key figure\n\nMore words."),
        drawing(KEY, alt="A green square."),
        drawing(LATER),
    ]
    found = key_figure({"cells": cells})
    assert (found.png, found.alt) == (KEY, "A green square.")


def test_without_one_under_the_heading_it_is_the_first_of_all() -> None:
    cells = [drawing(FIRST), heading("## The key figure"), heading("## The claims"), drawing(LATER)]
    assert key_figure({"cells": cells}).png == FIRST


def test_a_notebook_without_figures_has_none() -> None:
    assert key_figure({"cells": [heading("## The key figure")]}) is None


@pytest.mark.parametrize(("width", "height"), [(1002, 397), (300, 900), (48, 20)])
def test_a_thumbnail_fills_one_frame_and_keeps_the_shape(width: int, height: int) -> None:
    with Image.open(BytesIO(thumbnail(png(width, height, "black")))) as small:
        assert (small.format, small.size) == ("WEBP", (WIDTH, HEIGHT))
        gray = small.convert("L")
    dark = gray.point(lambda value: 255 if value < 128 else 0).getbbox()
    assert dark is not None
    ratio = (dark[2] - dark[0]) / (dark[3] - dark[1])
    assert ratio == pytest.approx(width / height, rel=0.05)


def test_what_is_transparent_becomes_white() -> None:
    with Image.open(BytesIO(thumbnail(png(480, 200, "#00000000", "RGBA")))) as small:
        darkest = min(low for low, _ in small.convert("RGB").getextrema())
    assert darkest > 250


def smooth() -> bytes:
    """A picture of many thousand colors, as anti-aliased curves make them."""
    ramp = Image.linear_gradient("L").resize((300, 200))
    buffer = BytesIO()
    Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_lighter_figure_looks_the_same() -> None:
    """Fails if dithering or few colors change what is seen (tried with 8)."""
    heavy = smooth()
    light = lighter(heavy)
    before, after = (Image.open(BytesIO(data)).convert("RGB") for data in (heavy, light))
    assert before.size == after.size
    assert max(high for _, high in ImageChops.difference(before, after).getextrema()) <= 8


def test_a_figure_is_made_lighter_once() -> None:
    light = lighter(smooth())
    assert lighter(light) == light


def test_what_saves_little_is_left_alone() -> None:
    assert lighter(FIRST) == FIRST
