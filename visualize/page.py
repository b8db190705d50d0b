"""Write images with captions as one HTML file with thumbnails."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dataset.images import FORMATS, turn_upright
from engine.output_dir import write_files
from utils import open_regular, printable

SIDE = 480  # pixels of a thumbnail's longer side, twice its size on most screens
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#ddd, #3a3a3a);
         --dim: light-dark(#666, #999); }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem;
        max-width: 90rem; }}
header {{ display: flex; gap: 1.25rem; align-items: center; margin-bottom: 1.5rem; }}
header img {{ max-width: 9rem; max-height: 7rem; border-radius: 6px; }}
h1 {{ font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }}
p {{ color: var(--dim); margin: 0; }}
h2 {{ font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
figure a {{ display: flex; aspect-ratio: 4 / 3; align-items: center; justify-content: center;
            background: light-dark(#f3f3f3, #1c1c1c); color: var(--dim); }}
figure img {{ width: 100%; height: 100%; object-fit: contain; }}
figcaption {{ padding: .5rem .75rem .6rem; }}
figcaption > * {{ display: block; overflow-wrap: anywhere; }}
</style>
<header>{example}<div><h1>{title}</h1><p>{summary}</p></div></header>
{body}
</html>
"""
ROW = """<h2>{heading}</h2><main>
{figures}
</main>"""
FIGURE = """<figure><a href="{link}">{picture}</a>
<figcaption title="{path}"><span>{name}</span><span>{caption}</span></figcaption></figure>"""


class Picture(NamedTuple):
    """An image file and its caption."""

    path: str
    caption: str


def write_page(
    path: str | Path,
    title: str,
    summary: Sequence[str],
    rows: Mapping[str, Sequence[Picture]],
    example: str | None = None,
) -> None:
    """Write a page with rows of pictures; nothing on it is loaded from elsewhere.

    Args:
        path: File to write.
        title: Title of the page.
        summary: Lines below the title.
        rows: Pictures by heading.
        example: Path of an image beside the title.

    Raises:
        TrainingStopped: The file cannot be written.
    """
    folders = [os.path.dirname(picture.path) for row in rows.values() for picture in row]
    common, body = os.path.commonpath(folders or [os.sep]), []
    for heading, pictures in rows.items():
        figures = "\n".join(_figure(picture, common) for picture in pictures)
        body.append(ROW.format(heading=escape(heading), figures=figures))
    page = PAGE.format(
        title=escape(title),
        example=_thumbnail(example) if example else "",
        summary="<br>".join(map(escape, summary)),
        body="\n".join(body),
    )
    write_files({Path(path): page.encode("utf-8", "replace")})


def _figure(picture: Picture, common: str) -> str:
    """Return the <figure> of an image, named by its path in the common folder."""
    return FIGURE.format(
        link=escape(Path(picture.path).as_uri()),
        picture=_thumbnail(picture.path),
        path=escape(printable(picture.path)),
        name=escape(printable(os.path.relpath(picture.path, common))),
        caption=escape(picture.caption),
    )


def _thumbnail(path: str) -> str:
    """Return an image file as an <img> with embedded pixels, or a text if it is unreadable."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            image.draft("RGB", (SIDE, SIDE))  # decodes a JPEG at a reduced size
            image = turn_upright(image).convert("RGB")
        image.thumbnail((SIDE, SIDE))
    except Exception:  # on a broken file Pillow raises SyntaxError, ValueError, EOFError and more
        return "cannot be read"
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    pixels = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{pixels}">'
