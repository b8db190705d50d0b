"""What became of every tensor of a weight file and of the model that it was loaded into, in a few
lines.
"""

import re
from os.path import commonprefix
from typing import NamedTuple


class Record(NamedTuple):
    """What became of a tensor of the model, or of one of the file that the model has no place for."""

    name: str  # in the model, "" for one that is ignored
    in_file: str  # name of the tensor in the file that it is, "" for one that is new
    # loaded; copied: a momentum weight, from the base; new: left at its initialization; ignored
    outcome: str
    resized: bool = False  # a position embedding, interpolated to another image_res
    cast: str = ""  # the precision in the file, if it is another


class LoadReport(NamedTuple):
    """What became of every tensor; printed, it is a line for each kind."""

    source: str
    records: list

    loaded = property(lambda self: self._names("loaded"))
    copied = property(lambda self: self._names("copied"))
    new = property(lambda self: self._names("new"))
    ignored = property(lambda self: [r.in_file for r in self.records if r.outcome == "ignored"])
    resized = property(lambda self: [r.name for r in self.records if r.resized])
    cast = property(lambda self: [f"{r.name} ({r.cast})" for r in self.records if r.cast])

    @property
    def converted(self):
        """The tensors that are loaded under another name than in the file, as "name in file -> name
        in model".
        """
        return [
            f"{r.in_file} -> {r.name}"
            for r in self.records
            if r.outcome == "loaded" and r.in_file != r.name
        ]

    def _names(self, outcome):
        return [r.name for r in self.records if r.outcome == outcome]

    def __str__(self):
        of_model, of_file = (
            [r.name for r in self.records if r.name],
            [r.in_file for r in self.records if r.in_file],
        )
        lines = [f"{self.source}: {len(self.loaded)} of {len(of_model)} tensors loaded"]
        for kind, names, short in (
            ("converted", self.converted, condense(map(common_rename, self.converted))),
            ("resized", self.resized, shorten(self.resized, of_model)),
            ("cast", self.cast, sorted({f"from {r.cast}" for r in self.records if r.cast})),
            ("copied from the base", self.copied, shorten(self.copied, of_model)),
            ("new", self.new, shorten(self.new, of_model)),
            ("ignored", self.ignored, shorten(self.ignored, of_file)),
        ):
            if names:
                lines.append(f"  {kind}: {listed(short)} ({len(names)})")
        return "\n".join(lines)


def shorten(names, among):
    """Return names in fewer words:

    "a.*" if all among the others that begin with "a." are names; the rest as condense does.
    """

    def beginnings(name):
        return [name[: dot.start()] for dot in re.finditer(r"\.", name)]

    mixed = {beginning for name in set(among) - set(names) for beginning in beginnings(name)}
    groups = {}
    for name in names:
        groups.setdefault(
            next((beginning for beginning in beginnings(name) if beginning not in mixed), name), []
        ).append(name)
    return condense(
        group[0] if len(group) == 1 else f"{beginning}.*" for beginning, group in groups.items()
    )


def common_rename(rename):
    """Return "old -> new" with the part that both end with as a star: text_encoder.bert.* ->
    text_encoder.*.
    """
    old, new = (name.split(".")[::-1] for name in rename.split(" -> "))
    same = len(commonprefix([old, new]))
    return " -> ".join(".".join((["*"] * (same > 0) + name[same:])[::-1]) for name in (old, new))


def condense(names):
    """Merge names that differ only in numbers into a.{0-11}.b, and names of base and momentum into
    a[_m].b.
    """
    alike, pairs = {}, {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "#", name), []).append(map(int, re.findall(r"\d+", name)))
    for pattern, numbers in alike.items():
        for column in map(sorted, map(set, zip(*numbers))):
            first, last = column[0], column[-1]
            span = (
                f"{first}-{last}" if last - first + 1 == len(column) else ",".join(map(str, column))
            )
            pattern = pattern.replace("#", f"{{{span}}}" if len(column) > 1 else str(first), 1)
        pairs.setdefault(re.sub(r"_m\b", "", pattern), []).append(pattern)
    return [
        name[0] if len(name) == 1 else re.sub(r"_m\b", "[_m]", max(name, key=len))
        for name in pairs.values()
    ]


def listed(names, most=10):
    """Return the first of a list of names for a message."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
