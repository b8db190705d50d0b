"""Write the results of a search as one HTML file with thumbnails."""

import base64
import io
import os
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from dataset.images import FORMATS
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
p, small {{ color: var(--dim); margin: 0; }}
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
<main>
{figures}
</main>
</html>
"""
FIGURE = """<figure><a href="{link}">{picture}</a>
<figcaption title="{path}"><span>{rank}. {name}</span><span>{score}</span>
<small>{folder}</small></figcaption></figure>"""


def write_page(
    path: str | Path, hits: list, total: int, text: str | None = None, image: str | None = None
) -> None:
    """Write the page of a search; nothing on it is loaded from elsewhere.

    Args:
        path: File to write.
        hits: Images with absolute path, similarity and perhaps match.
        total: Number of images in the index.
        text: Text of the query.
        image: Path of the query's example.

    Raises:
        TrainingStopped: The file cannot be written.
    """
    folders = [os.path.dirname(hit.path) for hit in hits]
    common, figures = os.path.commonpath(folders) if hits else os.sep, []
    for rank, hit in enumerate(hits, 1):
        folder, name = os.path.split(os.path.relpath(hit.path, common))
        shown = {
            "path": printable(hit.path),
            "name": printable(name),
            "folder": printable(folder),
            "link": Path(hit.path).as_uri(),
            "score": f"{hit.similarity:.3f}" if hit.match is None else f"{hit.match:.1%}",
        }
        shown = {key: escape(value) for key, value in shown.items()}
        figures.append(FIGURE.format(picture=_thumbnail(hit.path), rank=rank, **shown))
    title = text or printable(os.path.basename(image or ""))
    matched = any(hit.match is not None for hit in hits)
    ranking = "matching (ITM), then by similarity (ITC)" if matched else "similarity (ITC)"
    summary = f"{len(hits)} of {total:,} images, ranked by {ranking}, in {printable(common)}"
    page = PAGE.format(
        title=escape(title),
        example=_thumbnail(image) if image else "",
        summary=escape(summary),
        figures="\n".join(figures),
    )
    write_files({Path(path): page.encode("utf-8", "replace")})


def _thumbnail(path: str) -> str:
    """Return an image file as an <img> with embedded pixels, or a text if it is unreadable."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            image.draft("RGB", (SIDE, SIDE))  # decodes a JPEG at a reduced size
            image = ImageOps.exif_transpose(image).convert("RGB")
        image.thumbnail((SIDE, SIDE))
    except Exception:  # on a broken file Pillow raises SyntaxError, ValueError, EOFError and more
        return "cannot be read"
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    pixels = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{pixels}">'
