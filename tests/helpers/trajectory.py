"""The batches of tests/golden/trajectory.pt through the training loop.

Started in several processes: FOLDER KEY=VALUE...
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]

import torch
from helpers.training import fit

from configs.load import override
from dataset.caption import CaptionBatch
from engine.distributed import init_process_group
from engine.launch import run_script
from models import build_model
from models.losses import masked_text
from utils import Text, rank, world_size

DATA = torch.load(Path(__file__).parents[1] / "golden/trajectory.pt", weights_only=True)
BATCH_SIZE, BATCHES = 4, len(DATA["batches"])
EPOCH = 12  # batches of an epoch of the variants, which have two: the queue wraps in each


class Stop(Exception):
    """Ends a run where the released one ended."""


class Served:
    """A data set of `epoch_batches` batches per epoch that serves the trajectory's in their order,
    whatever its sampler asks.

    Of each, a process gets every world_size-th row. After the last one Stop is raised.
    """

    def __init__(self, epoch_batches, first=0, last=BATCHES):
        self.length, self.served, self.last = epoch_batches * BATCH_SIZE, first, last

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return None

    def collate(self, samples, tokenizer):
        if self.served == self.last:
            raise Stop
        batch = {
            name: value[rank() :: world_size()]
            for name, value in DATA["batches"][self.served].items()
        }
        self.served += 1
        self.masked = masked_text(batch["masked"], batch["labels"])
        image, text = batch["image"] / 64, Text(batch["input_ids"], batch["attention_mask"])
        return CaptionBatch(image, text, torch.zeros(len(image)), [""] * len(image), [])


def build(**keys):
    """The configuration of the trajectory with other keys, and its model as it started."""
    released = {**DATA["config"], "bert_config": DATA["bert"], "vision_depth": 2, "vision_heads": 4}
    keys = {"batch_size": BATCH_SIZE, "num_workers": 0, **keys}
    config = override(released, [f"{key}={value}" for key, value in keys.items()], "config")
    model = build_model("pretrain", config)
    model.load_state_dict(DATA["start"])
    return config, model


def most_similar(log_weights, count):
    """As models.losses.draw, without chance: the trajectory has the most similar negatives."""
    return log_weights.topk(count, dim=1).indices


def follow(output_dir, served, resume_from=None, **keys):
    """Trains as Pretrain.py does on a Served data set. Returns the losses of each batch by name."""
    config, model = build(**keys)
    model.mask = lambda input_ids: served.masked
    output_dir.mkdir(exist_ok=True)
    losses, forward = [], model.forward

    def noted(*args, **options):
        values = forward(*args, **options)
        losses.append({name: value.item() for name, value in values.items()})
        return values

    model.forward = noted
    with mock.patch("models.losses.draw", most_similar), contextlib.suppress(Stop):
        fit(model, served, None, config, output_dir, seed=0, resume_from=resume_from)
    return losses


def main():
    init_process_group("cpu", 60)
    keys = dict(text.split("=") for text in sys.argv[2:])
    follow(Path(sys.argv[1]), Served(EPOCH), **keys)


if __name__ == "__main__":
    run_script(main)
