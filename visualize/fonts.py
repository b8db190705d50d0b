"""Choose fonts for the characters of a figure."""

import functools

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


@functools.cache
def _characters_of(font: str) -> set[str]:
    """Return the characters of a font file, an empty set if it cannot be read."""
    try:
        return set(map(chr, FT2Font(font).get_charmap()))
    except (OSError, RuntimeError):
        return set()


def _find_fonts(missing: set[str]) -> list[str]:
    """Return installed font families that cover as many characters as possible."""
    families = []
    fonts = [
        font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")
    ]

    def rank(font: font_manager.FontEntry) -> tuple:
        covered = len(missing & _characters_of(font.fname))
        return covered, font.style == "normal", font.weight == 400, "Sans" in font.name

    while missing & _characters_of((best := max(fonts, key=rank)).fname):
        families.append(best.name)
        missing = missing - _characters_of(best.fname)
    return families


def set_fonts(figure: Figure) -> None:
    """Add fonts that have the characters of a figure's texts. A $ does not begin a formula.

    matplotlib warns of a character that no font has, and draws a box.
    """
    texts = figure.findobj(Text)
    characters = set().union(*(text.get_text() for text in texts)) - {"\n"}
    font = font_manager.findfont(texts[0].get_fontproperties())
    families = _find_fonts(characters - _characters_of(font))
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily([*text.get_fontfamily(), *families])
