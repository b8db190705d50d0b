"""Data sets by task and split, and the loaders that feed them."""

import functools

import torch
from PIL import Image

from configs.schema import require
from dataset.annotations import Entries
from dataset.attributes import AttributeTestSet
from dataset.base import check_images
from dataset.batches import workers
from dataset.caption import CaptionDataset, GroundingPair, Pair, RetrievalPair, ShardedCaptions
from dataset.classification import ClassificationDataset
from dataset.grounding import GroundingTestSet
from dataset.nlvr import Statement
from dataset.refer import load_detections, load_refer
from dataset.relevance import MAX_AD_TOKENS, Ad
from dataset.retrieval import RetrievalTestSet
from dataset.shards import Shards, expand
from dataset.text import MAX_TOKENS, SHORT_TOKENS, Limits
from dataset.transforms import normalize, test_transform, train_transform
from dataset.ve import Entailment
from dataset.vqa import ROOTS, VQADataset, load_answer_list
from dataset.workers import Loader
from utils import InputError

# training sets: form of the entries, smallest share of the image that a crop keeps (None: all)
CAPTIONS = {
    "pretrain": (Pair, 0.2),
    "nlvr_pretrain_train": (Pair, 0.2),
    "retrieval_train": (RetrievalPair, 0.5),
    "grounding_train": (GroundingPair, None),
}
# ids of a text by data set, unless max_tokens is set; the other data sets have the model's limit
TOKENS = {
    "pretrain": SHORT_TOKENS,
    "nlvr_pretrain_train": SHORT_TOKENS,
    "vqa_train": SHORT_TOKENS,
    **{
        f"{task}_{split}": tokens
        for split in ("train", "val", "test")
        for task, tokens in (
            ("retrieval", MAX_TOKENS),
            ("grounding", MAX_TOKENS),
            ("relevance", MAX_AD_TOKENS),
        )
    },
}
FINE_TUNING_SCALE = 0.5
CLASSIFICATION = {"ve": Entailment, "nlvr": Statement, "relevance": Ad}


def _task_and_split(name):
    task, _, split = name.rpartition("_")
    return (task, split) if task else (name, "train")


def data_sets(task: str) -> dict[str, str]:
    """Return the data sets of a task by split (train, val, test), as `build_dataset` names them."""
    if task == "pretrain":
        return {"train": "pretrain", "test": "retrieval_test"}
    splits = {"nlvr_pretrain": ("train",), "attributes": ("val", "test")}.get(
        task, ("train", "val", "test")
    )
    return {split: f"{task}_{split}" for split in splits}


def file_key(name):
    """The key of the configuration that names the annotation files of data set `name`."""
    return "test_file" if name == "grounding_val" else f"{_task_and_split(name)[1]}_file"


def build_dataset(name, config, seed=0):
    """The data set `name`: pretrain, nlvr_pretrain_train, attributes_test, or a task and a split of
    it.

    The tasks are retrieval, vqa, ve, nlvr, grounding and relevance, the splits train, val and test.
    All its annotation files are checked here. seed: of the training sets. Raises InputError.
    """
    task, split = _task_and_split(name)
    key, image_root = file_key(name), config["image_root"]
    require(config, "image_res", key)
    training = split == "train"
    scale = CAPTIONS[name][1] if name in CAPTIONS else FINE_TUNING_SCALE
    transform = test_transform(config["image_res"])
    if training:
        scale = scale if config["min_scale"] is None else config["min_scale"]
        transform = train_transform(
            config["image_res"], scale, config["hflip"], config["randaugment"]
        )
    files, own_seed = config[key], seed if training else None
    limits = Limits(config["max_words"], config["max_tokens"] or TOKENS.get(name))
    if name in CAPTIONS:
        return _image_captions(name, config, transform, seed, limits)
    if task == "retrieval":
        dataset = RetrievalTestSet(files, image_root, transform, limits)
    elif task in CLASSIFICATION:
        dataset = ClassificationDataset(
            files, CLASSIFICATION[task], image_root, transform, own_seed, limits
        )
        if task == "relevance" and not training:
            dataset.require_classes(2, key)
    elif task == "vqa":
        roots = {root: config[root] for root in ROOTS.values()}
        answers = (
            load_answer_list(config["answer_list"])
            if config["answer_list"] and not training
            else None
        )
        dataset = VQADataset(files, roots, transform, config["eos"], own_seed, answers, limits)
        if split == "val" and not dataset.annotations():
            raise InputError(
                f"val_file {files[0]} has no answers to compare with: leave val_file out, the last epoch is then "
                "the result"
            )
    elif task == "grounding":
        refer, detections = grounding_data(
            *(config[key] for key in ("refcoco_data", "det_file", "refer_dataset"))
        )
        # test_file holds all splits together
        splits = (
            ["val"]
            if split == "val"
            else sorted({ref["split"] for ref in refer.refs.values()} - {"train", "val"})
        )
        dataset = GroundingTestSet(files, image_root, transform, refer, detections, splits, limits)
    elif task == "attributes" and not training:
        # bilinear, as where the published number comes from
        dataset = AttributeTestSet(
            files, image_root, test_transform(config["image_res"], Image.Resampling.BILINEAR)
        )
    else:
        raise InputError(
            f"data set {name!r} is unknown, there are pretrain, {{retrieval, vqa, ve, nlvr, grounding, "
            "relevance}}_{train, val, test} and attributes_test"
        )
    check_images(dataset, 1000 if training else None)
    return dataset


def lists_and_shards(name: str, files: list[str]) -> tuple[list[str], list[str]]:
    """Return the JSON lists and the shards of a training set.

    Raises InputError for shards if its task reads none.
    """
    lists, shards = expand(files)
    if shards and name not in ("pretrain", "nlvr_pretrain_train"):
        raise InputError(
            f"train_file: {shards[0]} is a WebDataset shard; only pre-training and text assignment read shards, "
            f"{name.removesuffix('_train')} needs JSON lists"
        )
    return lists, shards


def _image_captions(name, config, transform, seed, limits):
    """Build a training set of image-caption pairs from JSON lists, shards or both."""
    form = CAPTIONS[name][0]
    files, shards = lists_and_shards(name, config["train_file"])
    entries = Entries(files, form) if files or not shards else []
    dataset = CaptionDataset(entries, config["image_root"], transform, seed, limits)
    if len(dataset):
        check_images(dataset)
    if not shards:
        return dataset
    return ShardedCaptions(
        entries,
        config["image_root"],
        transform,
        seed,
        limits,
        Shards(shards),
        config["shuffle_buffer"],
    )


@functools.lru_cache(maxsize=1)
def grounding_data(refcoco_data, det_file, refer_dataset):
    """Read a data set of REFER and the detected boxes, once for val and test."""
    for key, value in (("refcoco_data", refcoco_data), ("det_file", det_file)):
        if value is None:
            raise InputError(
                f"the configuration lacks the key {key}: add it to the file or pass --set {key}=..."
            )
    refer = load_refer(refcoco_data, refer_dataset)
    return refer, load_detections(det_file, refer)


def test_loader(dataset, config, device, collate=None):
    """A loader of batches in the order of the data set."""
    return Loader(dataset, collate, workers(config), device, batch_size=config["batch_size_test"])


def to_device(value, device):
    """A batch, tuples in it included, with its tensors on the device and its images, which are
    uint8 until then, normalized.
    """
    if isinstance(value, torch.Tensor):
        if device.type == "cuda":
            # masks are drawn after the loader has pinned; a copy from other memory may wait
            value = value.pin_memory()
        value = value.to(device, non_blocking=True)
        return normalize(value) if value.dtype == torch.uint8 else value
    if isinstance(value, tuple):
        moved = [to_device(part, device) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
