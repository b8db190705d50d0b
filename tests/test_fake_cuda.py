"""Steps of every task, and ranking, on tensors that claim to be a GPU's: they have shapes, types
and a device but no numbers.

A mix-up of devices, a value that the host would wait for and a shape that depends on values each
raise an error here. The backward pass needs a real device; its gradients are made up.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.config import as_config
from dataset.build import build_dataset
from dataset.transforms import _scale_and_offset, normalize
from engine.trainer import create_train_state, train_step
from models import build_model
from models.tokenizer import build_tokenizer
from models.vqa import length_buckets
from utils import Text

CUDA = torch.device("cuda")
TASKS = {
    "Pretrain": ("pretrain", "pretrain.json"),
    "Retrieval": ("retrieval", "retrieval_train.json"),
    "VQA": ("vqa", "vqa_train.json"),
    "VE": ("ve", "ve_train.json"),
    "NLVR": ("nlvr", "nlvr_train.json"),
    "Relevance": ("relevance", "relevance_train.json"),
    "Pretrain_nlvr": ("nlvr_pretrain", "pretrain.json"),
    "Grounding": ("grounding", "grounding_train.json"),
}


class Launches(TorchDispatchMode):
    """Counts what the device is asked to do, views left out, and what is copied to it from the
    host.
    """

    def __init__(self):
        super().__init__()
        self.count, self.copies = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            self.count += not function.is_view
            sources = [
                arg for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cpu"
            ]
            if "copy" in function.name() and sources:
                self.copies.append(tuple(sources[-1].shape))
        return result


@contextlib.contextmanager
def fake_gpu(model):
    """Within it the model's tensors are fake ones of a GPU that has bf16, and so is what is made on
    CUDA.
    """
    has_bf16 = mock.patch.object(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: True
    )
    has_autocast = mock.patch.object(
        torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    )
    with FakeTensorMode(allow_non_fake_inputs=True), has_bf16, has_autocast:
        # its constants are copied once in a run
        normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=CUDA))
        yield model.to_empty(device=CUDA)
    _scale_and_offset.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("script", TASKS)
def test_a_step_waits_for_nothing_and_copies_its_batch_alone(
    tiny_config, shapes, monkeypatch, script, precision
):
    name, file = TASKS[script]
    # a layer of each kind
    bert = {**tiny_config["bert_config"], "num_hidden_layers": 2, "fusion_layer": 1}
    keys = {
        "bert_config": bert,
        "vision_depth": 1,
        "train_file": [str(shapes / file)],
        "vqa_root": str(shapes),
        "precision": precision,
        "accumulate": 2,
        "compile": False,
    }
    config = as_config({**tiny_config, **keys})
    tokenizer, dataset = build_tokenizer(config.tokenizer), build_dataset(name, "train", config)
    batches = [
        dataset.collate([dataset[i] for i in part], tokenizer) for part in (range(4), range(4, 8))
    ]
    model = build_model(name, config, tokenizer).train()
    prepared = [model.prepare(batch) for batch in batches]  # on the host
    tensors = [leaf for leaf in tree_leaves(prepared) if isinstance(leaf, torch.Tensor)]

    def backward(loss):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(model, "prepare", lambda batch: batch)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tuple(tensor.shape)), tensor)[1]
    )
    with fake_gpu(model):
        state = create_train_state(model, range(2), config, device=CUDA, seed=0)
        with Launches() as launches:
            output = train_step(state, iter(prepared), 0.4)
    assert all(value.device.type == "cuda" for value in output.losses.values())
    assert (
        sorted(launches.copies)
        == sorted(pinned)
        == sorted(tuple(tensor.shape) for tensor in tensors)
    )


@torch.no_grad()
def test_ranking_answers_waits_for_nothing_and_has_no_more_launches_for_more_questions(tiny_config):
    model = build_model("vqa", {**tiny_config, "distill": False}).eval()
    lengths, k, counts = torch.tensor([3, 3, 4, 5, 3, 4]), 4, []
    buckets_of = {questions: length_buckets(lengths, questions, k) for questions in (2, 8)}
    with fake_gpu(model):
        for questions, buckets in buckets_of.items():
            image, ids = (
                torch.zeros(questions, 3, 32, 32, device=CUDA),
                torch.ones(questions, 7, dtype=torch.long, device=CUDA),
            )
            answers = torch.ones(questions, k, 5, dtype=torch.long, device=CUDA)
            with Launches() as launches:
                keys_values, mask = model.encode_question(image, Text(ids, ids))
                _, past = model.text_decoder(ids[:, :1], keys_values, mask)
                scores = model._log_probs_in_buckets(
                    answers, answers.sum(dim=2), mask, keys_values, past, buckets
                )
            assert scores.shape == (questions, k) and not launches.copies
            counts.append(launches.count)
    assert len(buckets) == 3 and counts[0] == counts[1]
