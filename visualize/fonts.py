"""Choose fonts for the characters of a figure."""

import functools
import unicodedata
from collections.abc import Iterable

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


def _find_fonts(characters: Iterable[str]) -> list[str]:
    """Return installed font families that cover as many characters as possible."""
    families, missing = [], set(characters)
    fonts = [
        font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")
    ]

    def rank(font: font_manager.FontEntry) -> tuple:
        covered = len(missing & _characters_of(font.fname))
        return covered, font.style == "normal", font.weight == 400, "Sans" in font.name

    while missing & _characters_of((best := max(fonts, key=rank)).fname):
        families.append(best.name)
        missing -= _characters_of(best.fname)
    return families


def _set_font(text: Text) -> set[str]:
    """Choose the fonts of a text and return the characters that no font has.

    A box replaces each of these characters. A $ does not begin a formula.
    """
    text.set_parse_math(False)
    font = font_manager.findfont(text.get_fontproperties())
    missing = set(text.get_text()) - {"\n"} - _characters_of(font)
    for family in _find_fonts(missing) if missing else ():
        properties = text.get_fontproperties().copy()
        text.set_fontfamily([*text.get_fontfamily(), family])
        properties.set_family(family)
        missing -= _characters_of(font_manager.findfont(properties))
    shown = ("□" if c in missing and c.isprintable() else c for c in text.get_text())
    text.set_text("".join(" " if c in missing else c for c in shown))
    return {c for c in missing if c.isprintable()}


def set_fonts(figure: Figure) -> str:
    """Choose the fonts of all texts of a figure.

    Returns:
        The scripts that no installed font has, "" if there are none.
    """
    missing = set().union(*map(_set_font, figure.findobj(Text)))
    scripts = {
        unicodedata.name(c, "unknown").split()[0] if c.isalpha() else "symbols" for c in missing
    }
    return f"{', '.join(sorted(scripts))}, such as {min(missing)}" if missing else ""
