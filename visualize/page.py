"""Write the results of a search or groups of near-copies as one HTML file with thumbnails."""

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.images import FORMATS, turn_upright
from engine.output_dir import write_files
from utils import open_regular, percent, printable

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
p, small {{ color: var(--dim); margin: 0; }}
h2 {{ font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
figure a {{ display: flex; aspect-ratio: 4 / 3; align-items: center; justify-content: center;
            background: light-dark(#f3f3f3, #1c1c1c); color: var(--dim); }}
figure img {{ width: 100%; height: 100%; object-fit: contain; }}
figcaption {{ padding: .5rem .75rem .6rem; display: grid; grid-template-columns: 1fr auto;
              column-gap: .5rem; }}
figcaption > * {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
</style>
<header>{example}<div><h1>{title}</h1><p>{summary}</p></div></header>
{body}
</html>
"""
ROW = """{heading}<main>
{figures}
</main>"""
FIGURE = """<figure><a href="{link}">{picture}</a>
<figcaption title="{path}"><span>{rank}. {name}</span><span>{score}</span>
<small>{folder}</small><small>{more}</small></figcaption></figure>"""


def write_page(
    path: str | Path,
    hits: Sequence[Any],
    about: Sequence[str],
    text: str | None = None,
    image: str | None = None,
) -> None:
    """Write the page of a search; nothing on it is loaded from elsewhere.

    Args:
        path: File to write.
        hits: Hits of `inference.index.search`.
        about: Lines on their scores, from `inference.index.describe_scores`.
        text: Text of the query.
        image: Path of the query's example.

    Raises:
        TrainingStopped: The file cannot be written.
    """
    common = _common_folder(hits)
    figures = [
        _figure(hit.path, common, rank, *_scores(hit.match, hit.itc))
        for rank, hit in enumerate(hits, 1)
    ]
    title = text or printable(os.path.basename(image or ""))
    summary = [f"{len(hits)} images in {printable(common)}", *about]
    _write(path, title, summary, ROW.format(heading="", figures="\n".join(figures)), image)


def _scores(match: float | None, itc: float) -> tuple[str, str]:
    """Return the score that ranks a hit, and the other one if there is one."""
    by_itc = f"ITC {percent(itc)}"
    return (by_itc, "") if match is None else (f"ITM {percent(match)}", by_itc)


def write_groups(path: str | Path, groups: Sequence[Sequence[Any]], total: int) -> None:
    """Write the page of near-copies, a row of pictures for each group.

    Args:
        path: File to write.
        groups: Groups of `inference.index.near_copies`.
        total: Number of images in the index.

    Raises:
        TrainingStopped: The file cannot be written.
    """
    copies = [copy for group in groups for copy in group]
    common, rows = _common_folder(copies), []
    for number, group in enumerate(groups, 1):
        heading = f"<h2>Group {number}, {len(group)} images</h2>\n"
        figures = [
            _figure(copy.path, common, rank, f"{copy.likeness:.1%}")
            for rank, copy in enumerate(group, 1)
        ]
        rows.append(ROW.format(heading=heading, figures="\n".join(figures)))
    summary = [
        f"{len(groups)} groups with {len(copies)} of the {total:,} images in {printable(common)}",
        "share of hash bits in which an image equals an earlier image of its group",
    ]
    _write(path, "Near-copies", summary, "\n".join(rows))


def _common_folder(images: Sequence[Any]) -> str:
    """Return the deepest folder that has all images."""
    return os.path.commonpath([os.path.dirname(image.path) for image in images] or [os.sep])


def _figure(path: str, common: str, rank: int, score: str, more: str = "") -> str:
    """Return the <figure> of an image, with its place below the common folder and its scores."""
    folder, name = os.path.split(os.path.relpath(path, common))
    shown = {
        "path": printable(path),
        "name": printable(name),
        "folder": printable(folder),
        "link": Path(path).as_uri(),
        "score": score,
        "more": more,
    }
    shown = {key: escape(value) for key, value in shown.items()}
    return FIGURE.format(picture=_thumbnail(path), rank=rank, **shown)


def _write(
    path: str | Path, title: str, summary: Sequence[str], body: str, image: str | None = None
) -> None:
    page = PAGE.format(
        title=escape(title),
        example=_thumbnail(image) if image else "",
        summary="<br>".join(map(escape, summary)),
        body=body,
    )
    write_files({Path(path): page.encode("utf-8", "replace")})


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
