"""Writing the data set: vocabulary, images and annotation files."""

import itertools
import json
import pickle
import random
import re
import shutil
import string
from pathlib import Path

from tqdm import tqdm

from dataset.pool import in_processes, process_count
from utils import InputError, atomic_write, read_regular

from . import attributes, captions, grounding, nlvr, relevance, ve, vqa
from .scenes import BACKGROUNDS, SHAPES, SPLITS, combination_of, draw_scene, render
from .words import NUMBERS, TABLES, WORDS, plural

VERSION = 6  # of the generator: data made by another version is made anew
TASKS = {
    "retrieval": captions,
    "VQA": vqa,
    "VE": ve,
    "NLVR2": nlvr,
    "grounding": grounding,
    "attributes": attributes,
    "relevance": relevance,
}
SCENES = tuple(f"scenes_{split}.json" for split in SPLITS)


def vocabulary():
    """Return the WordPiece vocabulary: special tokens, characters (so that no text is unknown), all
    words said here.
    """
    nouns = [plural(noun) for shape in SHAPES for noun in WORDS.get(shape, (shape,))]
    texts = [
        *TABLES.values(),
        BACKGROUNDS,
        *WORDS.values(),
        nouns,
        NUMBERS,
        *(task.TEXTS for task in TASKS.values()),
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


def draw_split(split, count, image_size, per_image, noise, seed):
    """Draw the scenes of a split, with image path, captions and curtain; combinations repeat in
    train only.
    """
    scenes, taken = [], set()
    for i in range(count):
        scene = draw_scene(random.Random(f"{seed}/{split}/{i}"), split, image_size, taken)
        scenes.append({"image": f"images/{split}/{i:06d}.jpg", **scene})
        if split != "train":
            taken.add(combination_of(scene))
    for i, scene in enumerate(scenes):
        rng = random.Random(f"{seed}/{split}/{i}/captions")
        scene["captions"] = captions.write_captions(rng, scene, split, per_image, noise, scenes)
        covered, _ = ve.plan(split, i, seed)
        scene["covered"] = (
            ve.draw_cover(random.Random(f"{seed}/{split}/{i}/cover"), scene) if covered else None
        )
    return scenes


def save_image(job):
    """Draw a JPEG file; job: (path, a function that gives an image, its arguments)."""
    path, draw, *arguments = job
    draw(*arguments).save(path, quality=90)


def save(path, content):
    """Write a file in one step: a string as it is, a pickle as REFER's (*.p), or JSON, a list with
    one entry per line.
    """
    if path.suffix == ".p":
        content = pickle.dumps(content, protocol=2)
    elif isinstance(content, list):
        content = ("[" + ",\n".join(map(json.dumps, content)) + "]\n").encode()
    else:
        content = (content if isinstance(content, str) else json.dumps(content) + "\n").encode()
    with atomic_write(path) as file:
        file.write(content)


def clear(output):
    """Remove what an earlier call has written to the folder, and make its folders."""
    for name in (*SCENES, *(name for task in TASKS.values() for name in task.FILES)):
        (output / name).unlink(missing_ok=True)
    if (output / "images").exists():
        shutil.rmtree(output / "images")
    (output / "refcoco+").mkdir(exist_ok=True)
    for split in SPLITS:
        (output / "images" / split).mkdir(parents=True)
        (output / "images" / f"{split}_covered").mkdir()
    (output / "images" / attributes.FOLDER).mkdir()


def _read_marker(path):
    """Return the arguments of the data set in a folder and whether it is complete, None if the file
    is missing or another.
    """
    try:
        made = json.loads(read_regular(path))
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) and "complete" in made else None


def write_dataset(
    output,
    train=16000,
    val=500,
    test=500,
    noise=0.05,
    seed=0,
    image_size=96,
    captions=4,
    progress=False,
    overwrite=False,
):
    """Write the data set to the folder `output`; a finished one, made with the same arguments, is
    left alone.

    train, val and test are numbers of scenes, noise the share of corrupted captions in
    pretrain.json, image_size the side in pixels, captions the number per image; progress shows a
    bar. Same arguments, same bytes, on any number of processes. Writes images/{split}/*.jpg,
    images/{split}_covered/*.jpg, images/attributes/*.jpg, vocab.txt, and only then
    scenes_{split}.json (everything known), the FILES of each task, and shapes.json (the arguments).
    Returns False if the data set already exists. Raises InputError for arguments out of range, for
    a folder that has other files or cannot be written and, without `overwrite`, for a finished data
    set that was made with other arguments: a run may be reading it.
    """
    output, counts = Path(output), dict(zip(SPLITS, (train, val, test)))
    arguments = {**counts, "noise": noise, "image_size": image_size, "captions": captions}
    for (name, value), (low, high) in zip(
        arguments.items(), [(2, 999_999)] * 3 + [(0, 1), (48, 1024), (1, 20)]
    ):
        if not low <= value <= high:
            raise InputError(f"--{name} {value}: must lie between {low} and {high}")
    arguments.update(seed=seed, version=VERSION)
    marker, finished = output / "shapes.json", json.dumps({**arguments, "complete": True})
    try:
        made = _read_marker(marker)
        if made == json.loads(finished):
            return False
        if made is None and output.is_dir() and any(output.iterdir()):
            raise InputError(
                f"{output}: holds other files and no data set of shapes: choose another --output"
            )
        if made and made["complete"] and not overwrite:
            other = ", ".join(key for key, value in arguments.items() if made.get(key) != value)
            raise InputError(
                f"{output}: holds the data set of another {other}: choose another --output, or pass --overwrite"
            )
        output.mkdir(parents=True, exist_ok=True)
        save(marker, json.dumps({**arguments, "complete": False}))
        clear(output)
        scenes = {
            split: draw_split(split, n, image_size, captions, noise, seed)
            for split, n in counts.items()
        }
        every = [scene for split in SPLITS for scene in scenes[split]]
        jobs = [(output / s["image"], render, s) for s in every]
        jobs += [
            (output / ve.covered_image(s["image"]), render, s, s["covered"])
            for s in every
            if s["covered"]
        ]
        sheets = attributes.draw_sheets(scenes, seed)
        jobs += [
            (output / name, attributes.render_sheet, *pictures) for name, pictures in sheets.items()
        ]
        with in_processes(process_count(len(jobs))) as run:
            for _ in tqdm(
                run(save_image, jobs),
                total=len(jobs),
                desc="shapes",
                unit="image",
                disable=not progress,
            ):
                pass
        save(output / "vocab.txt", "\n".join(vocabulary()) + "\n")
        for name, content in zip(SCENES, scenes.values()):
            save(output / name, content)
        for task in TASKS.values():
            for name, content in zip(task.FILES, task.annotations(scenes, seed)):
                save(output / name, content)
        save(marker, finished)
    except OSError as error:
        raise InputError(
            f"{error.filename or output}: {error.strerror}: choose another --output"
        ) from None
    return True
