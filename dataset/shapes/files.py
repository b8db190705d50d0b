"""Writing the data set: vocabulary, images and annotation files."""
import json
import os
import pickle
import random
import re
import shutil
import string
from collections import Counter

from tqdm import tqdm

from dataset.workers import in_processes
from utils import InputError, atomic_write

from .captions import GROUNDS, JUNK, NUMBERS, OPENINGS, UNNAMED, plural, write_captions
from .scenes import (BACKGROUNDS, COLORS, FILLS, POSITIONS, RELATIONS, SHAPES, SIZES, SPLITS, combination_of, draw_cover,
                     draw_scene, render)
from .tasks import (MISTAKEN, annotate, answer_type, ask, detect, hypothesis, index_scenes, plan_entailment, ref_split,
                    refer, said_texts, state)

CHUNK = 32          # images that a process draws at a time
VERSION = 4         # of the generator: data made by another version is made anew
QUESTIONS = {"train": 3, "val": 2, "test": 2}       # a scene
STATEMENTS = {"train": 2, "val": 1, "test": 1}      # a scene of its number, each once true and once false
REFS = 2                                            # objects of a scene that are referred to, at most
NLVR_SPLITS = {"train": "train", "val": "dev", "test": "test"}      # as the files are called
SCENES = tuple(f"scenes_{split}.json" for split in SPLITS)
RETRIEVAL = ("pretrain.json", "retrieval_train.json", "val.json", "test.json")
TASKS = {
    "VQA": (*(f"vqa_{split}.json" for split in SPLITS), "answer_list.json"),
    "VE": tuple(f"ve_{split}.json" for split in SPLITS),
    "NLVR2": tuple(f"nlvr_{name}.json" for name in NLVR_SPLITS.values()),
    "grounding": ("grounding_train.json", "grounding_test.json", "refcoco+/refs(unc).p", "refcoco+/instances.json",
                  "refcoco+/dets.json")}


def vocabulary():
    """The WordPiece vocabulary: special tokens, characters (so that no text is unknown), all words said here."""
    tables = (SHAPES, COLORS, SIZES, FILLS, BACKGROUNDS, POSITIONS, RELATIONS)
    said = [text for table in tables for texts in table.values() for text in texts]
    nouns = [noun for words in SHAPES.values() for noun in words] + [UNNAMED["shape"]]
    said += [*map(plural, nouns), *UNNAMED.values(), *OPENINGS, *GROUNDS, *NUMBERS, *JUNK, "a an the and with are in"]
    words = {word for text in said + said_texts() for word in re.findall("[a-z]{2,}", re.sub("{.*?}", "", text))}
    characters = string.digits + string.ascii_lowercase
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *characters,
            *(f"##{c}" for c in characters), *sorted(words)]


def draw_split(split, count, image_size, captions, noise, seed):
    """The scenes of a split, with image path, captions and curtain; combinations repeat in train only."""
    scenes, taken = [], set()
    for i in range(count):
        scene = draw_scene(random.Random(f"{seed}/{split}/{i}"), split, image_size, taken)
        scenes.append({"image": f"images/{split}/{i:06d}.jpg", **scene})
        if split != "train":
            taken.add(combination_of(scene))
    for i, scene in enumerate(scenes):
        rng = random.Random(f"{seed}/{split}/{i}/captions")
        scene["captions"] = write_captions(rng, scene, split, captions, noise, scenes)
        covered, _ = premise(split, i, seed)
        scene["covered"] = draw_cover(random.Random(f"{seed}/{split}/{i}/cover"), scene) if covered else None
    return scenes


def premise(split, i, seed):
    """Whether a scene is covered in entailment, and its two hypotheses as (label, positive)."""
    return plan_entailment(random.Random(f"{seed}/{split}/{i // 6}/entailment"))[i % 6]


def covered_image(path):
    """The path of an image's copy with a curtain: images/train_covered/000000.jpg for images/train/000000.jpg."""
    return "{}_covered/{}".format(*path.rsplit("/", 1))


def save_images(jobs):
    """Render scenes to JPEG files; each job is (path, scene, cover). Returns how many."""
    for path, scene, cover in jobs:
        render(scene, cover).save(path, quality=90)
    return len(jobs)


def save_text(path, text):
    """Write a text file in one step."""
    with atomic_write(path, "w") as file:
        file.write(text)


def save_annotations(path, content):
    """Write an annotation file: a pickle as REFER's (path ends in .p), else JSON, a list with a line for each entry."""
    if path.endswith(".p"):
        with atomic_write(path) as file:
            pickle.dump(content, file, protocol=2)
    elif isinstance(content, list):
        save_text(path, "[" + ",\n".join(map(json.dumps, content)) + "]\n")
    else:
        save_text(path, json.dumps(content) + "\n")


def prepare(output, arguments):
    """True if the folder holds the finished data set of these arguments; else empty it and mark it unfinished."""
    marker = os.path.join(output, "shapes.json")
    if os.path.exists(marker):
        with open(marker, encoding="utf-8") as f:
            if f.read() == json.dumps({**arguments, "complete": True}):
                return True
    elif os.path.isdir(output) and os.listdir(output):
        raise InputError(f"{output}: holds other files and no shapes.json: choose another --output")
    os.makedirs(output, exist_ok=True)
    save_text(marker, json.dumps({**arguments, "complete": False}))
    for name in (*SCENES, *RETRIEVAL, *(name for names in TASKS.values() for name in names)):
        path = os.path.join(output, name)
        if os.path.exists(path):
            os.remove(path)
    if os.path.exists(os.path.join(output, "images")):
        shutil.rmtree(os.path.join(output, "images"))
    for split in SPLITS:
        os.makedirs(os.path.join(output, "images", split))
        os.makedirs(os.path.join(output, "images", f"{split}_covered"))
    os.makedirs(os.path.join(output, "refcoco+"), exist_ok=True)
    return False


def retrieval_annotations(scenes):
    """The contents of RETRIEVAL, in this order; scenes are lists by split."""
    texts = {split: [{"image": s["image"], "caption": [c["caption"] for c in s["captions"]]} for s in scenes[split]]
             for split in SPLITS}
    pairs = [{"image": s["image"], "caption": c["caption"], "image_id": f"train_{i:06d}"}
             for i, s in enumerate(scenes["train"]) for c in s["captions"] if not c["noise"]]
    return texts["train"], pairs, texts["val"], texts["test"]


def vqa_annotations(scenes, seed):
    """The contents of TASKS["VQA"]; the answer list has all that annotators of train say and every possible truth."""
    entries, number = {split: [] for split in SPLITS}, 0
    for split in SPLITS:
        for i, scene in enumerate(scenes[split]):
            rng = random.Random(f"{seed}/{split}/{i}/vqa")
            for question, answer in ask(rng, scene, QUESTIONS[split]):
                entries[split].append({"image": scene["image"], "question": question, "question_id": number,
                                       "dataset": "vqa", "answer": annotate(rng, answer),
                                       "answer_type": answer_type(answer)})
                number += 1
    counts = Counter(dict.fromkeys(MISTAKEN, 0))
    for entry in entries["train"]:
        counts.update(entry["answer"])
    return *entries.values(), sorted(counts, key=lambda answer: (-counts[answer], answer))


def ve_annotations(scenes, seed):
    """The contents of TASKS["VE"]."""
    entries = {split: [] for split in SPLITS}
    for split in SPLITS:
        for i, scene in enumerate(scenes[split]):
            rng = random.Random(f"{seed}/{split}/{i}/ve")
            image = covered_image(scene["image"]) if scene["covered"] else scene["image"]
            for label, positive in premise(split, i, seed)[1]:
                sentence = hypothesis(rng, scene, scene["covered"], label, positive)
                entries[split].append({"image": image.removesuffix(".jpg"), "sentence": sentence, "label": label})
    return tuple(entries.values())


def nlvr_annotations(scenes, seed):
    """The contents of TASKS["NLVR2"]: statements, each of them once true and once false, of different pairs."""
    entries = {split: [] for split in SPLITS}
    for split in SPLITS:
        index = index_scenes(scenes[split])
        for i in range(len(scenes[split])):
            rng = random.Random(f"{seed}/{split}/{i}/nlvr")
            for _ in range(STATEMENTS[split]):
                sentence, pairs = state(rng, scenes[split], index) or ("", {})
                for label in rng.sample(list(pairs), len(pairs)):
                    images = [scenes[split][number]["image"] for number in pairs[label]]
                    entries[split].append({"images": images, "sentence": sentence, "label": str(label)})
    return tuple(entries.values())


def grounding_annotations(scenes, seed):
    """The contents of TASKS["grounding"]: annotations of all objects, detections in the images of val and test."""
    numbers = {shape: i for i, shape in enumerate(SHAPES, 1)}
    train, test, refs, images, boxes, detections, sentences = [], [], [], [], [], {}, 0
    for split, scene, i in ((split, scene, i) for split in SPLITS for i, scene in enumerate(scenes[split])):
        rng, objects = random.Random(f"{seed}/{split}/{i}/refs"), scene["objects"]
        image_id, first = len(images), len(boxes)
        images.append({"id": image_id, "file_name": scene["image"], "width": scene["image_size"],
                       "height": scene["image_size"]})
        boxes += [{"id": first + k, "image_id": image_id, "category_id": numbers[o["shape"]], "bbox": o["box"]}
                  for k, o in enumerate(objects)]
        named = ((k, refer(rng, objects, objects[k])) for k in rng.sample(range(len(objects)), len(objects)))
        for k, texts in [(k, texts) for k, texts in named if texts][:REFS] if len(objects) > 1 else ():
            ids, ref_id = list(range(sentences, sentences + len(texts))), len(refs)
            sentences += len(texts)
            refs.append({"ref_id": ref_id, "ann_id": first + k, "image_id": image_id,
                         "category_id": numbers[objects[k]["shape"]], "file_name": scene["image"],
                         "split": ref_split(split, objects[k]), "sent_ids": ids,
                         "sentences": [{"sent_id": n, "raw": text, "sent": text, "tokens": text.split()}
                                       for n, text in zip(ids, texts)]})
            (train if split == "train" else test).extend(
                {"image": scene["image"], "text": text, "ref_id": ref_id} for text in texts)
        if split != "train":
            detections[str(image_id)] = detect(random.Random(f"{seed}/{split}/{i}/detections"), scene)
    categories = [{"id": number, "name": shape} for shape, number in numbers.items()]
    return train, test, refs, {"images": images, "annotations": boxes, "categories": categories}, detections


def write_dataset(output, train=16000, val=500, test=500, noise=0.05, seed=0, image_size=96, captions=4,
                  progress=False):
    """Write the data set to the folder `output`; a finished one, made with the same arguments, is left alone.

    train, val and test are numbers of scenes, noise the share of corrupted captions in pretrain.json, image_size the
    side in pixels, captions the number an image; progress shows a bar. Same arguments, same bytes, on any number of
    processes. Writes images/{split}/*.jpg, images/{split}_covered/*.jpg, vocab.txt, and only then
    scenes_{split}.json (everything known), pretrain.json, retrieval_train.json (without the corrupted captions),
    val.json, test.json, the files of TASKS, and shapes.json (the arguments). Returns False if all this was already there.
    Raises InputError for arguments out of range and for a folder that has other files or cannot be written.
    """
    counts = dict(zip(SPLITS, (train, val, test)))
    arguments = {**counts, "noise": noise, "image_size": image_size, "captions": captions}
    for (name, value), (low, high) in zip(arguments.items(), [(2, 999_999)] * 3 + [(0, 1), (48, 1024), (1, 20)]):
        if not low <= value <= high:
            raise InputError(f"--{name} {value}: must lie between {low} and {high}")
    arguments.update(seed=seed, version=VERSION)
    try:
        if prepare(output, arguments):
            return False
        scenes = {split: draw_split(split, n, image_size, captions, noise, seed) for split, n in counts.items()}
        every = [scene for split in SPLITS for scene in scenes[split]]
        jobs = [(os.path.join(output, s["image"]), s, None) for s in every]
        jobs += [(os.path.join(output, covered_image(s["image"])), s, s["covered"]) for s in every if s["covered"]]
        chunks = (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK))
        with in_processes(os.cpu_count()) as run, tqdm(total=len(jobs), desc="shapes", unit="image", disable=not progress) as bar:
            for done in run(save_images, chunks):
                bar.update(done)
        save_text(os.path.join(output, "vocab.txt"), "\n".join(vocabulary()) + "\n")
        contents = [*zip(SCENES, scenes.values()), *zip(RETRIEVAL, retrieval_annotations(scenes))]
        for task, annotations in (("VQA", vqa_annotations), ("VE", ve_annotations), ("NLVR2", nlvr_annotations),
                                  ("grounding", grounding_annotations)):
            contents += zip(TASKS[task], annotations(scenes, seed))
        for name, content in contents:
            save_annotations(os.path.join(output, name), content)
        save_text(os.path.join(output, "shapes.json"), json.dumps({**arguments, "complete": True}))
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror}: choose another --output") from None
    return True
