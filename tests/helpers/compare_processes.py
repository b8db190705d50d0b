"""Two processes with half a batch each against one process: queues, momentum and gradients. Run under torchrun."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.processes import init_process_group
from models import build_model
from test_pretrain_model import random_batch
from utils import Text, rank

data = torch.load("tests/golden/pretrain.pt", weights_only=True)


def build():
    model = build_model("pretrain", {**data["config"], "bert_config": "tests/golden/bert.json"})
    model.load_state_dict(data["state_dict"])
    return model


def part(batch, rows):
    image, text, (input_ids, labels) = batch
    return image[rows], Text(*(x[rows] for x in text)), (input_ids[rows], labels[rows])


def gradients(model, batch, objectives=("loss_ita", "loss_itm", "loss_mlm"), seed=0):
    torch.manual_seed(seed)
    losses = model(batch[0], batch[1], alpha=0.4, masked=batch[2])
    (sum(losses[name] for name in objectives) + 0 * sum(losses.values())).backward()
    return {name.removeprefix("module."): param.grad for name, param in model.named_parameters() if param.grad is not None}


batch = random_batch(4)
input_ids, labels = batch[2]
labels[:] = -100
labels[:, 1] = input_ids[:, 1]  # as many masked tokens in each half: the mean of means is the mean
halves = [part(batch, slice(0, 2)), part(batch, slice(2, 4))]

# what single processes say, before there is a group
whole = build()
whole_mlm = gradients(whole, batch, ["loss_mlm"])
alone = [gradients(build(), half) for half in halves]



@torch.no_grad()
def matching_scores():
    model, (image, text, _) = build().eval(), batch
    images, texts = model.encode_image(image), model.encode_text(text)
    return torch.stack(model.rerank(*images, *texts, text.attention_mask, k=2))


scores = matching_scores()

init_process_group("cpu")
assert torch.allclose(matching_scores(), scores, atol=1e-5)
model = build()
wrapped = DistributedDataParallel(model, broadcast_buffers=False)
together = gradients(wrapped, halves[rank()])
for name, grad in together.items():
    mean = (alone[0][name] + alone[1][name]) / 2
    assert torch.allclose(grad, mean, rtol=1e-4, atol=1e-7), name
for name in ("image_queue", "text_queue", "queue_ptr"):
    assert torch.allclose(model.state_dict()[name], whole.state_dict()[name], atol=1e-6), name
for name, value in model.state_dict().items():
    assert "_m." not in name or torch.equal(value, whole.state_dict()[name]), name

model = build()
mlm = gradients(DistributedDataParallel(model, broadcast_buffers=False), halves[rank()], ["loss_mlm"])
for name, grad in whole_mlm.items():
    assert torch.allclose(mlm[name], grad, rtol=1e-3, atol=1e-6), name
print("same")
dist.destroy_process_group()
