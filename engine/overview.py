"""The first lines in the log of a training run: device, data, model, weights."""

import logging
from typing import TYPE_CHECKING

import torch

from dataset.base import EntryDataset

if TYPE_CHECKING:
    from models.albef import ALBEF

COUNTED = 100_000  # entries; in longer lists, images and texts are not counted

log = logging.getLogger(__name__)


def log_overview(model: "ALBEF", train_set: EntryDataset, device: torch.device) -> None:
    """Log the device, the size of the training set, and which weights are pre-trained."""
    threads = torch.get_num_threads()
    name = f"a CPU with {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    log.info("training set: %s", describe_data(train_set))
    log.info("model: on %s, %s", name, describe_weights(model))


def describe_data(train_set: EntryDataset) -> str:
    """Return the number of entries, and of images and texts if the lists are short."""
    entries = f"{len(train_set):,} entries"
    if len(train_set.indices) != len(train_set) or len(train_set) > COUNTED:  # shards, long lists
        return entries
    images, texts = set(), 0
    for index in range(len(train_set)):
        entry = train_set.entry(index)
        images.update(entry.images)
        texts += len(entry.texts)
    return f"{entries}, {len(images):,} images, {texts:,} texts"


def describe_weights(model: "ALBEF") -> str:
    """Return the number of parameters, and the modules by origin of their weights."""
    pretrained, total, origins = set(model.pretrained), 0, {"pre-trained": [], "random": []}
    for module, child in model.named_children():
        if module.endswith("_m"):  # momentum copies
            continue
        sizes = {f"{module}.{name}": param.numel() for name, param in child.named_parameters()}
        size = sum(sizes.values())
        loaded = sum(number for name, number in sizes.items() if name in pretrained)
        total += size
        share = f" ({loaded / size:.0%})" if 0 < loaded < size else ""
        origins["pre-trained" if loaded else "random"].append(module + share)
    named = (f"{origin}: {', '.join(modules)}" for origin, modules in origins.items() if modules)
    return f"{total / 1e6:.1f} million parameters; {'; '.join(named)}"
