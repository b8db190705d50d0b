"""Files of the data set: vocabulary, images and annotations."""

import itertools
import json
import pickle
import random
import re
import shutil
import string
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.pool import in_processes, process_count
from utils import InputError, atomic_write

from . import attributes, captions, grounding, nlvr, relevance, ve, vqa
from .scenes import BACKGROUNDS, SHAPES, SPLITS, Scene, Scenes, combination_of, draw_scene, render
from .words import NUMBERS, TABLES, WORDS, plural

VERSION = 7  # version of the generator; data of another version is replaced
TASKS = (captions, vqa, ve, nlvr, grounding, attributes, relevance)
RANGES = {"train": (2, 999_999), "noise": (0, 1), "image_size": (48, 1024), "captions": (1, 20)}
SCENES = tuple(f"scenes_{split}.json" for split in SPLITS)


def vocabulary() -> list[str]:
    """Return the WordPiece vocabulary of the data set.

    It has special tokens, words and single characters, so that no text is unknown.
    """
    nouns = [plural(noun) for shape in SHAPES for noun in WORDS.get(shape, (shape,))]
    texts = [
        *TABLES.values(),
        BACKGROUNDS,
        *WORDS.values(),
        nouns,
        NUMBERS,
        *(task.TEXTS for task in TASKS),
    ]
    words = {
        word
        for text in itertools.chain(*texts)
        for word in re.findall("[a-z]{2,}", re.sub("{.*?}", "", text))
    }
    characters = string.digits + string.ascii_lowercase
    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *string.punctuation,
        *characters,
        *(f"##{c}" for c in characters),
        *sorted(words),
    ]


def draw_split(
    split: str, count: int, image_size: int, *, per_image: int, noise: float, seed: int
) -> list[Scene]:
    """Draw the scenes of a split, with image path, captions and curtain.

    Combinations repeat in train only.

    Args:
        split: The split.
        count: Number of scenes.
        image_size: Side of the images in pixels.
        per_image: Number of captions of a scene.
        noise: Share of wrong captions in train.
        seed: Random seed.
    """
    scenes, taken = [], set()
    for i in range(count):
        scene = draw_scene(random.Random(f"{seed}/{split}/{i}"), split, image_size, taken)
        scenes.append({"image": f"images/{split}/{i:06d}.jpg", **scene})
        if split != "train":
            taken.add(combination_of(scene))
    for i, scene in enumerate(scenes):
        rng = random.Random(f"{seed}/{split}/{i}/captions")
        scene["captions"] = captions.write_captions(
            rng, scene, split, count=per_image, noise=noise, others=scenes
        )
        scene["covered"] = ve.draw_cover(random.Random(f"{seed}/{split}/{i}/cover"), scene)
    return scenes


def save_image(job: tuple) -> None:
    """Write a JPEG file. job: path, function that returns an image, its arguments."""
    path, draw, *arguments = job
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(*arguments).save(path, quality=90)


def save(path: Path, content: Any) -> None:
    """Write text, a pickle like REFER's (*.p), or JSON, a list with one entry a line."""
    if path.suffix == ".p":
        content = pickle.dumps(content, protocol=2)
    elif isinstance(content, list):
        content = ("[" + ",\n".join(map(json.dumps, content)) + "]\n").encode()
    else:
        content = (content if isinstance(content, str) else json.dumps(content) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)


def clear(output: Path) -> None:
    """Remove the files of an earlier call from the folder."""
    for name in (*SCENES, *(name for task in TASKS for name in task.FILES)):
        (output / name).unlink(missing_ok=True)
    if (output / "images").exists():
        shutil.rmtree(output / "images")


def _check_ranges(arguments: dict[str, Any]) -> None:
    """Raise InputError if an argument is out of range."""
    for name, value in arguments.items():
        low, high = RANGES.get(name, RANGES["train"])
        if not low <= value <= high:
            raise InputError(
                f"--{name} {value} is out of range; it must lie between {low} and {high}"
            )


def _is_complete(output: Path, arguments: dict[str, Any], overwrite: bool) -> bool:
    """Return whether a folder holds the data set made with these arguments.

    Raises InputError if it holds other files, or another data set without `overwrite`.
    """
    marker = output / "shapes.json"
    made = json.loads(marker.read_bytes()) if marker.is_file() else {}
    if "complete" not in made:
        if any(output.glob("*")):
            raise InputError(
                f"{output}: holds files but no data set of shapes; choose another --output"
            )
        return False
    other = ", ".join(key for key, value in arguments.items() if made.get(key) != value)
    if made["complete"] and other and not overwrite:
        raise InputError(
            f"{output}: holds a data set made with other values of {other}; choose another"
            " --output, or pass --overwrite"
        )
    return made["complete"] and not other


def _write_images(output: Path, scenes: Scenes, seed: int) -> None:
    """Render the images of all scenes, covered copies and sheets in worker processes."""
    jobs: list[tuple] = [
        (output / s["image"], render, s) for of_split in scenes.values() for s in of_split
    ]
    for path, _, scene in list(jobs):
        if cover := scene["covered"]:
            jobs.append((Path(ve.covered_image(str(path))), render, scene, cover))
    for name, pictures in attributes.draw_sheets(scenes, seed).items():
        jobs.append((output / name, attributes.render_sheet, *pictures))
    with in_processes(process_count(len(jobs))) as run:
        images = run(save_image, jobs)
        for _ in tqdm(images, total=len(jobs), desc="shapes", unit="image", disable=None):
            pass


def write_dataset(
    output: Path | str,
    *,
    train: int = 16000,
    val: int = 500,
    test: int = 500,
    noise: float = 0.05,
    seed: int = 0,
    image_size: int = 96,
    captions: int = 4,
    overwrite: bool = False,
) -> bool:
    """Write the data set to a folder, unless it holds the same one.

    The same arguments give the same bytes, on any number of processes.

    Args:
        output: The folder.
        train: Number of training scenes.
        val: Number of validation scenes.
        test: Number of test scenes.
        noise: Share of wrong captions in pretrain.json.
        seed: Random seed.
        image_size: Side of the images in pixels.
        captions: Number of captions of an image.
        overwrite: Whether to replace a data set that was made with other arguments.

    Returns:
        Whether the data set was written, False if it exists already.

    Raises:
        InputError: An argument is out of range, the folder has other files or cannot be written, or
            it holds another data set and `overwrite` is not set.
    """
    counts = {"train": train, "val": val, "test": test}
    arguments = {**counts, "noise": noise, "image_size": image_size, "captions": captions}
    _check_ranges(arguments)
    arguments.update(seed=seed, version=VERSION)
    try:
        if _is_complete(Path(output), arguments, overwrite):
            return False
        _write(Path(output), arguments)
    except OSError as error:
        raise InputError(
            f"{error.filename or output}: {error.strerror}; choose another --output"
        ) from None
    return True


def _write(output: Path, arguments: dict[str, Any]) -> None:
    """Write the data set with these arguments of `write_dataset`.

    The files are images/{split}/*.jpg, images/{split}_covered/*.jpg, images/attributes/*.jpg,
    vocab.txt, scenes_{split}.json, the FILES of each task, and shapes.json with the arguments.
    """
    marker, seed = output / "shapes.json", arguments["seed"]
    save(marker, json.dumps({**arguments, "complete": False}))
    clear(output)
    scenes = {
        split: draw_split(
            split,
            arguments[split],
            arguments["image_size"],
            per_image=arguments["captions"],
            noise=arguments["noise"],
            seed=seed,
        )
        for split in SPLITS
    }
    _write_images(output, scenes, seed)
    save(output / "vocab.txt", "\n".join(vocabulary()) + "\n")
    for name, content in zip(SCENES, scenes.values(), strict=True):
        save(output / name, content)
    for task in TASKS:
        for name, content in zip(task.FILES, task.annotations(scenes, seed), strict=True):
            save(output / name, content)
    save(marker, json.dumps({**arguments, "complete": True}))
