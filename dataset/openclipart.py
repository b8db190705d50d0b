"""Real, noisy image-text pairs: Debian's openclipart packages -> JPEG files and caption annotations.

    python -m dataset.openclipart --output data/openclipart

The packages openclipart-png and openclipart-svg hold the same public-domain drawings, by many hands; the RDF in
the SVG files has titles, descriptions and keywords. Much of that is not about the drawing: titles that name a
whole collection, place-holders such as HASH(0x8a4caac), stamps and authors in file names. Near-duplicates
(numbered variants, repeated drawings) stay on one side of the train / val / test split.
"""

import functools
import html
import itertools
import json
import random
import re
import subprocess
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from configs.flags import Flags
from dataset.workers import in_processes
from utils import InputError, atomic_write, run_script

PACKAGES = ("openclipart-png", "openclipart-svg")
WORKERS = 2  # a drawing of 89 million pixels (Pillow's limit) takes half a gigabyte while it is read
TRAIN_WORDS = 30  # what pre-training keeps of a caption
TEST_WORDS = 25
HASH_SIZE = 16
SAME_PICTURE = 0.02  # squared distance over the product of norms; beyond it, distinct flags and icons merge
SERIES_LIMIT = 32  # 1,375 of the drawings are one program's stars: a series must not fill the training batches
HELD_OUT_SERIES = 4  # larger series stay in training, since all but one member of a held-out one go unused

SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"}
PLACEHOLDERS = {"hash", "magick", "unsorted", "special", "examples", "clipart", "various cliparts", "r16 sibmission"}
CLEANING = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), replacement) for pattern, replacement in (
    (r"(?:<!--.*?-->|<[^>]*>|[\x00-\x1f\x7f-\x9f\ufffd]|\s)+", " "),  # markup, control characters
    (r"[(\[]?(?:https?://|www\.)[^\s\])]+[\])]?|\S+@\S+|\b(?:e-?mail|contact)\s*:", " "),
    (r"\((?:mon|tue|wed|thu|fri|sat|sun) [^)]*\)|\b(?:hash ?\()?0x[0-9a-f]{5,}\b\)?|\bdata from\s*:.*", " "),
    (r"\b(?:(?:this (?:work|image|file) is|made [^.]*?\.) )?(?:hereby )?(?:released (?:in|und)|dedicat)\w+ "
     r"(?:to )?(?:the )?public domain.*", " "),
    (r"\beps converted from\b|\bpart of (?:the )?|\b(?:by |from )?(?:the )?open ?clip ?art(?: library)?\b|\bwmf2svg\b", " "),
    (r",? ?(?:and )?\b(?:created?|made|drawn|converted to [\w ]+?) (?:with|in) (?:the )?(?:inkscape|sodipodi)\b"
     r"(?: with the new trace tool)?|\bexploring inkscape capabilities\b", " "),
    (r"(?-i:(?<=[a-z]{2})(?=[A-Z][a-z]))", " "),  # FlowerAndPot
    (r"(?<![\d.])0\d+\b", " "),  # the counter of "Woman Police 01"
    (r"(?-i:(?<=[a-z]{4}))\d\b", " "),  # motorcycle1
    (r"\b(?:b and w|bw)\b", "black and white"),
    (r"\b(\w+)(?:\W+\1\b)+", r"\1"),  # repeated words
    (r"\s+", " "))]
BY_AUTHOR = re.compile(r"^clip ?art by .*? - ", re.IGNORECASE)


class Drawing(NamedTuple):
    """What the metadata say about a drawing. `key` is its path below the package's folder, without suffix."""

    key: str
    title: str = ""
    description: str = ""
    keywords: tuple = ()
    creator: str = ""


def clean_text(text, creator=""):
    """Remove markup, addresses, file stamps, tool boilerplate, repeated words and the author's name from a text."""
    text = html.unescape(html.unescape(text))  # some were escaped twice
    # Some UTF-8 was taken for Latin-1: "L\xc3\xa9zard".
    text = re.sub("[\xc2-\xc3][\x80-\xbf]", lambda match: match[0].encode("latin-1").decode(), text).replace("_", " ")
    if " " in creator:  # a single word may be an ordinary one
        text = re.sub(rf"(?:\bby )?{re.escape(creator)}", " ", text, flags=re.IGNORECASE)
    for pattern, replacement in CLEANING:
        text = pattern.sub(replacement, text)
    text = text.strip(" -,.;:!#*/\"'")
    return "" if text.lower() in PLACEHOLDERS or not re.search(r"\w", text) else text


def clean_file_name(stem, creator=""):
    """Return the words of a file name without counters ("_01", "1-4") and the (often cut) name of its author."""
    card = re.fullmatch(r"[a-z]+_([cdhs])_(\d+|[ajqk])", stem)
    if card:
        return f"{RANKS.get(card[2], card[2])} of {SUITS[card[1]]}"
    stem = re.sub(r"(?:^|(?<=_))jk(?=_)", "joker", stem)
    stem = re.sub(r"(?:[_\-\s]*\d+[a-z]?)+$|_r?$", "", stem)
    author = re.sub(r"[\W_]+", "_", creator.lower())
    for match in re.finditer(r"_", stem):
        tail = re.sub(r"[\W_]+", "_", stem[match.end():].lower())
        if len(tail) > 2 and (author.startswith(tail) or author.endswith("_" + tail)):
            stem = stem[:match.start()]
            break
    stem = re.sub(r"^star_0?(\d+)pt0?(\d+)step$", r"star with \1 points, step \2", stem)
    return clean_text(re.sub(r"[_\-.\s]+", " ", stem))


def parse_metadata(key, svg):
    """Read a drawing's metadata as they stand in the RDF of its SVG file; empty if the file is broken."""
    try:
        root = ElementTree.parse(svg).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError):  # LookupError: an unknown encoding
        return Drawing(key)
    work = next(root.iterfind(".//{*}Work"), root)

    def first(tag, parent):
        texts = (" ".join("".join(found.itertext()).split()) for found in parent.iterfind("{*}" + tag))
        return next(filter(None, texts), "")

    keywords = tuple(item.text.strip() for item in work.iterfind("{*}subject//{*}li") if item.text)
    return Drawing(key, first("title", work) or first("title", root), first("description", work) or first("desc", root),
                   keywords, first("creator", work))


def words(text):
    """Split a text into lower-case words without punctuation: what a caption clean-up leaves."""
    return re.findall(r"[^\W_]+", text.lower())


def singulars(text):
    """Return the different words of a text, plurals as singulars, or nearly so."""
    return {word.rstrip("s") for word in words(text)}


def cut(text, max_words):
    """Return the first words of a text, without punctuation left dangling at the end."""
    return " ".join(text.split()[:max_words]).rstrip(" ,:;-(")


def categories(key):
    """Return the folder names of a drawing, the most specific first: animals/big_cats/x -> big cats, animals."""
    return list(filter(None, (clean_text(re.sub(r"^\d+_|[_\-]+", " ", folder)) for folder in key.split("/")[-2::-1])))


def name_and_collection(drawing, title_count):
    """Return what a drawing shows, and the collection it belongs to, perhaps "".

    A title that several drawings share names a collection ("Lemon SVG theme") or another drawing ("Clipart by
    ... - pear", on an orange), and the file name tells what is shown, unless the two agree.
    """
    by_author = BY_AUTHOR.match(drawing.title)
    title = clean_text(BY_AUTHOR.sub("", drawing.title), drawing.creator)
    stem = drawing.key.rpartition("/")[2]
    file_name = clean_file_name(stem, drawing.creator)
    agreeing = sum(word in words(f"{file_name} {re.sub(r'[0-9]+', ' ', stem)}") for word in words(title))
    if title and (title_count == 1 or (not by_author and 2 * agreeing > len(words(title)))):
        return title, ""
    collection = title if title_count > 2 and not by_author else ""
    short = collection and file_name and re.fullmatch(r"[^\W\d]{2,}", stem)  # "tv", but not "sm_006"
    if short or re.search(r"[^\W\d_]{3}", file_name):
        return file_name, collection
    return next(filter(None, ["" if by_author else title, *categories(drawing.key)]), ""), ""


def captions(drawing, title_count, keyword_counts):
    """Return a drawing's name, its training captions and its one test caption; no captions if nothing is known about it.

    The test caption holds all that is known: name, collection, keywords from rare to frequent, category and
    description. The training captions are different views: name, name and category, all but the description,
    name and description.
    """
    name, collection = name_and_collection(drawing, title_count)
    folders = categories(drawing.key)
    description = clean_text(drawing.description, drawing.creator)
    keywords = sorted({clean_text(keyword.lower(), drawing.creator.lower()) for keyword in drawing.keywords},
                      key=lambda keyword: (keyword_counts[keyword], keyword))
    parts, seen = [name], singulars(name)
    for part in (collection, *keywords[:8], *folders):  # only what adds a word, other than a number or a plural
        new = {word for word in singulars(part) if not word.isdigit()} - seen
        if new:
            parts.append(part)
            seen |= new
    everything = ", ".join(parts)
    views = [name, f"a drawing of {', '.join([name, *folders[:2]])}", everything]
    if not singulars(description) <= seen:
        views.append(f"{name}. {description}")
        everything = f"{everything}. {description}"
    distinct = {}
    for view in views if words(name) else ():
        distinct.setdefault(" ".join(words(view)), cut(view, TRAIN_WORDS))
    return name, list(distinct.values()), cut(everything, TEST_WORDS)


def render(paths, image_res):
    """Write a PNG as a square JPEG with sides of `image_res` pixels, centered on white; paths are (png, jpeg).

    Return its ink (255 - value) on a 16x16 grid, uint8 [16, 16, 3], or None if it cannot be read or is empty.
    """
    png, jpeg = paths
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(png, formats=["PNG"]) as image:
                image = image.convert("RGBA")
            image = image.crop(image.getbbox())  # a transparent margin belongs to the page, not to the drawing
            image = ImageOps.contain(image, (image_res, image_res), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, ArithmeticError, RuntimeWarning, Image.DecompressionBombError):
        return None
    canvas = Image.new("RGB", (image_res, image_res), "white")
    canvas.paste(image, ((image_res - image.width) // 2, (image_res - image.height) // 2), image)
    if min(low for low, _ in canvas.getextrema()) > 250:
        return None
    jpeg.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(jpeg, quality=90)
    return 255 - np.asarray(canvas.resize((HASH_SIZE, HASH_SIZE), Image.Resampling.BOX))


def duplicate_groups(inks, series):
    """Label drawings [N, ...] that have nearly the same picture or the same series name alike; returns N labels."""
    first = {}
    edges = [[(i, first.setdefault(name, i)) for i, name in enumerate(series)]]
    flat = inks.reshape(len(inks), -1).astype(np.float32)
    norm = np.maximum(np.linalg.norm(flat, axis=1), 1e-6)
    for start in range(0, len(flat), 1024):  # blocks bound the memory of the N x N distances
        block = slice(start, start + 1024)
        ratio = norm[block, None] / norm
        distance = ratio + 1 / ratio - 2 * (flat[block] / norm[block, None]) @ (flat / norm[:, None]).T
        edges.append(np.argwhere(distance < SAME_PICTURE) + [start, 0])
    a, b = np.concatenate(edges).T
    labels, before = np.arange(len(series)), None
    while not np.array_equal(labels, before):  # every drawing takes the lowest label of those like it
        before = labels.copy()
        np.minimum.at(labels, a, before[b])
        np.minimum.at(labels, b, before[a])
    return labels.tolist()


def series_name(key, name):
    """Return a name that is the same for the variants of a drawing in a folder: "Pear", "Pear 2", "Pear (sliced)"."""
    name = re.sub(r"\(.*?\)|black and white", " ", name.lower())
    return key.rpartition("/")[0] + "/" + " ".join(re.findall(r"[^\W\d_]+|^\d+ of", name))


def split_groups(groups, test_captions, sizes, seed):
    """Return the indices of each split: "test", "val" of the given sizes, one drawing per group, no caption twice; "train".

    The other members of a held-out group, and those beyond SERIES_LIMIT of a training group, are in no split.
    Raises InputError if there are too few groups.
    """
    rng = random.Random(seed)
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    rest = list(members.values())
    rng.shuffle(rest)
    splits = {"test": [], "val": [], "train": []}
    for split in ("test", "val"):
        remaining, seen = [], set()
        for group in rest:
            chosen = rng.choice(group)
            caption = " ".join(words(test_captions[chosen]))
            if len(splits[split]) < sizes[split] and len(group) <= HELD_OUT_SERIES and caption not in seen:
                splits[split].append(chosen)
                seen.add(caption)
            else:
                remaining.append(group)
        if len(splits[split]) < sizes[split]:
            raise InputError(f"--{split} {sizes[split]}: there are only {len(splits[split])}; ask for fewer")
        rest = remaining
    for group in rest:
        splits["train"] += rng.sample(group, min(len(group), SERIES_LIMIT))
    return {split: sorted(indices) for split, indices in splits.items()}


def fetch_packages(folder):
    """Download the Debian packages to `folder`, unless they are there, and unpack them below it. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        try:
            if not list(folder.glob(f"{package}_*.deb")):
                subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True)
            deb = max(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} is missing: install Debian's apt tools, or pass "
                             f"--packages with the folders of unpacked {' and '.join(PACKAGES)}") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{error.cmd[0]} failed on {package} ({reason}): run `apt-get update`, remove "
                             f"broken .deb files from {folder}, or pass --packages") from None
    return [folder / package for package in PACKAGES]


def find_drawings(folders):
    """Return (png, svg) of every drawing that has both, by key, without links, which repeat drawings. Raises InputError."""
    found = {"png": {}, "svg": {}}
    for folder, kind in itertools.product(folders, found):
        if not folder.is_dir():
            raise InputError(f"--packages {folder}: no such folder; give the folders that `dpkg-deb -x` wrote")
        for path in folder.rglob(f"*.{kind}"):
            key = path.relative_to(folder).with_suffix("").as_posix().rpartition(f"openclipart/{kind}/")[2]
            if kind == "svg" or not path.is_symlink():
                found[kind][key] = path
    keys = sorted(found["png"].keys() & found["svg"].keys())
    if not keys:
        raise InputError(f"--packages {' '.join(map(str, folders))}: no drawing has both openclipart/png/*.png "
                         "and openclipart/svg/*.svg; give the folders of both unpacked packages")
    return {key: (found["png"][key], found["svg"][key]) for key in keys}


def image_names(keys):
    """Return unique ASCII names images/<folders>/<name>.jpg, unique also where a file system ignores case."""
    names, used = [], set()
    for key in keys:
        name = base = re.sub(r"[^A-Za-z0-9_/\-]+", "_", key)
        while name.lower() in used:
            name = f"{base}_{len(used)}"
        used.add(name.lower())
        names.append(f"images/{name}.jpg")
    return names


def write_json(path, content):
    """Write JSON as UTF-8, in one step."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=0).encode())


def prepare(output, folders, image_res, sizes, seed):
    """Write images and annotations below `output` and return counts for the summary. Raises InputError."""
    paths = find_drawings(folders)
    drawings = [parse_metadata(key, svg) for key, (_, svg) in paths.items()]
    titles = [clean_text(drawing.title).lower() for drawing in drawings]
    title_counts = Counter(titles)
    keyword_counts = Counter(clean_text(word.lower()) for drawing in drawings for word in set(drawing.keywords))
    texts = [captions(drawing, title_counts[title], keyword_counts) for drawing, title in zip(drawings, titles)]
    images = image_names(paths)
    jobs = [(png, output / image) for (png, _), image in zip(paths.values(), images)]
    with in_processes(WORKERS) as run:
        inks = run(functools.partial(render, image_res=image_res), jobs)
        inks = list(tqdm(inks, total=len(jobs), desc="drawings", unit="img"))
    kept = [(*row, *text, ink) for *row, text, ink in zip(paths, images, texts, inks) if ink is not None and text[1]]
    if not kept:
        raise InputError(f"{folders[0]}: no drawing of {len(paths)} can be read; unpack the packages again")
    keys, images, names, train, test, inks = zip(*kept)
    groups = duplicate_groups(np.stack(inks), list(map(series_name, keys, names)))
    annotations = {split: [{"image": images[i], "caption": train[i] if split == "train" else [test[i]]} for i in indices]
                   for split, indices in split_groups(groups, test, sizes, seed).items()}
    for split, annotation in annotations.items():
        write_json(output / f"{split}.json", annotation)
    lengths = [len(words(caption)) for entry in annotations["train"] for caption in entry["caption"]]
    return {"drawings": len(paths), "skipped": len(paths) - len(kept), "groups": len(set(groups)),
            "left out": len(kept) - sum(map(len, annotations.values())),
            **{split: len(annotation) for split, annotation in annotations.items()},
            "captions in train": len(lengths), "words a caption": round(sum(lengths) / max(len(lengths), 1), 1)}


def main():
    """Prepare the data set from the command line."""
    flags = Flags(__doc__.splitlines()[0])
    flags.add_argument("--output", type=Path, default=Path("data/openclipart"), help="the configs' image_root")
    flags.add_argument("--packages", type=Path, nargs="+", metavar="DIR", help="folders of unpacked packages")
    flags.add_argument("--image_res", type=int, default=256, help="side of the images in pixels")
    flags.add_argument("--test", type=int, default=500, help="held-out drawings for the test")
    flags.add_argument("--val", type=int, default=500, help="held-out drawings for validation")
    flags.add_argument("--seed", type=int, default=0, help="of the split")
    args = flags.parse_args()
    if args.image_res < HASH_SIZE:
        flags.error(f"--image_res must be at least {HASH_SIZE}")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "packages")}
    summary = args.output / "summary.json"
    try:
        complete = all((args.output / f"{name}.json").is_file() for name in ("train", "val", "test", "summary"))
        if complete and json.loads(summary.read_text())["settings"] == settings:
            print(f"{args.output} is complete; remove {summary} to prepare it again")
            return
        args.output.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)
        folders = args.packages or fetch_packages(args.output / "packages")
        counts = prepare(args.output, folders, args.image_res, {"test": args.test, "val": args.val}, args.seed)
        write_json(summary, {"settings": settings, "counts": counts})
    except OSError as error:
        raise InputError(str(error)) from None
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    run_script(main)
