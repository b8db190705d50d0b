"""Memory per GPU of a pre-training step by batch size, precision, gradient checkpointing and optimizer sharding: an estimate.

The step is the training loop's own (engine.iterate over Pretrain.step), run on tensors that have a shape but no data (torch's
FakeTensorMode): neither a GPU nor the memory of the model is needed. The peak of the bytes of all storages alive, in the blocks
of 512 that the CUDA allocator hands out, is what torch.cuda.max_memory_allocated would report. Weights, momentum model, queues,
gradients and optimizer state are counted from the tensors, activations are the rest of the peak. With more than one process the
gradients are buckets of DistributedDataParallel that outlive a step; alone they come and go with the backward pass and count as
activations. A sharded optimizer is ZeRO-1 as torch's ZeroRedundancyOptimizer divides it, the fullest process counts. Not in it:
what lies outside of torch's allocator (CUDA context, NCCL) and what the allocator cannot reuse, for which the columns of 24, 40
and 80 GB leave a tenth of the GPU free; and buffers inside an operation. torch.compile is off. GB are 10^9 bytes.

    python benchmarks/memory.py [--config FILE] [--set key=value ...] [--batch_size 16 32 64 128] [--world_size 8]
"""

import argparse
import contextlib
import copy
import itertools
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from bench import ROOT

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import Pretrain
from configs.schema import load_config
from dataset.transforms import normalize
from engine import Run, iterate
from models import build_model
from optim import create_optimizer
from pretrain_step import make_batch
from utils import InputError

BLOCK = 512  # bytes, the granularity of the CUDA caching allocator
GPUS = (24, 40, 80)  # GB
USABLE = 0.9  # of a GPU's memory
ON_OFF = {True: "on", False: "off"}


class Memory(NamedTuple):
    """Bytes at the peak of a step, by what they hold; shard: of the optimizer on the fullest process under ZeRO-1."""

    weights: int
    momentum: int
    queues: int
    gradients: int
    optimizer: int
    activations: int
    shard: int

    def total(self, sharded=False):
        return sum(self[:-1]) + (self.shard - self.optimizer if sharded else 0)


# ---------------------------------------------------------------------------------------------------------------------
# the estimate


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that still live: `now`, and at most so far: `peak`."""

    def __init__(self, block):
        super().__init__()
        self.block, self.sizes, self.now, self.peak = block, {}, 0, 0

    def size(self, tensor):
        """Return the bytes of a tensor's storage in whole blocks."""
        return -(-tensor.untyped_storage().nbytes() // self.block) * self.block

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata  # views share it
        if key not in self.sizes:
            self.sizes[key] = self.size(tensor)
            weakref.finalize(storage, self._free, key)
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)

    def _free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result


def gpu_kernels():
    """Let tensors that are fake CPU tensors keep for the backward pass what CUDA's kernels keep.

    Fake CUDA tensors have no backward pass on a machine without a GPU. Of the operations of this model three differ: attention
    is fused with dropout too and keeps no L x L matrix, dropout keeps one byte an element, and under autocast LayerNorm is in
    float32.
    """
    cpu_layer_norm = F.layer_norm

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, **_):
        bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, bias, torch.is_grad_enabled(), dropout_p)[0]

    def dropout(input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def layer_norm(input, *args, **kwargs):
        return cpu_layer_norm(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)

    return mock.patch.multiple(F, scaled_dot_product_attention=attention, dropout=dropout, layer_norm=layer_norm)


def real_batch(model):
    """Return a batch and its masked texts."""
    config = model.config
    batch = make_batch(config["batch_size"], config["image_res"])
    batch.text.input_ids.clamp_(max=model.bert_config["vocab_size"] - 1)
    torch.manual_seed(0)
    return batch, model.mask(batch.text.input_ids)


def prepare(model, masked, device, world_size):
    """Return a run with all that outlives a step in place: optimizer state and, with several processes, gradients."""
    config = model.config
    model.mask = lambda input_ids: masked
    for param in model.idle_parameters():
        param.requires_grad_(False)
    optimizer = create_optimizer(config["optimizer"], model.train())
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    if world_size == 1:
        optimizer.zero_grad(set_to_none=True)
    return Run(
        model, model, optimizer, Pretrain.step, config, config["scheduler"], device, seed=0, output_dir=None, iterations=1
    )


def fullest_shard(optimizer, size, world_size):
    """Return the bytes of state of the fullest process as ZeroRedundancyOptimizer deals: the largest, to whom has fewest."""
    elements, state = [0] * world_size, [0] * world_size
    for group in optimizer.param_groups:
        for param in sorted(group["params"], key=torch.Tensor.numel, reverse=True):
            rank = elements.index(min(elements))
            elements[rank] += param.numel()
            state[rank] += sum(map(size, optimizer.state[param].values()))
    return max(state)


def fake_copy(model):
    """Return a meta model as a model of fake CPU tensors, tied weights tied; to be called in a FakeTensorMode."""
    fakes = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        fake = torch.empty_like(tensor, device="cpu")
        fakes[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake
    return copy.deepcopy(model, fakes)


def estimate(config, world_size, gpu=True):
    """Return the Memory of a step on each of world_size processes, on a GPU or on a CPU, by a complete configuration.

    Raises InputError for an optimizer other than AdamW: only its fused step decides without looking at the gradients.
    """
    if config["optimizer"]["opt"].lower() != "adamw":
        raise InputError(f"optimizer: the estimate is for opt adamW, not {config['optimizer']['opt']!r}")
    with torch.device("meta"):
        model = build_model("pretrain", config)
    batch, masked = real_batch(model)
    normalize(batch.image[:1])  # keeps constants for good, and they should be real ones
    fake_mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(BLOCK if gpu else 1)
    with fake_mode, live, gpu_kernels() if gpu else contextlib.nullcontext():
        model, fake = fake_copy(model), fake_mode.from_tensor
        masked = type(masked)(*map(fake, masked))
        batch = batch._replace(image=fake(batch.image), text=type(batch.text)(*map(fake, batch.text)), idx=fake(batch.idx))
        for tensor in (batch.image, *batch.text, batch.idx, *masked):
            live.add(tensor)
        run = prepare(model, masked, torch.device("cpu"), world_size)
        parts = dict.fromkeys(Memory._fields[:-2], 0)
        for name, param in model.named_parameters():
            parts["momentum" if name.partition(".")[0].endswith("_m") else "weights"] += live.size(param)
            parts["gradients"] += live.size(param.grad) if param.grad is not None else 0
        parts["queues"] = sum(map(live.size, model.buffers()))
        parts["optimizer"] = sum(live.size(x) for state in run.optimizer.state.values() for x in state.values())
        shard = fullest_shard(run.optimizer, live.size, world_size)
        live.peak = live.now
        iterate(run, itertools.repeat(batch), 0, 0, 0.4)
    return Memory(**parts, activations=live.peak - sum(parts.values()), shard=shard)


# ---------------------------------------------------------------------------------------------------------------------
# the table


def largest_fitting(batch_sizes, totals, gigabytes):
    """Return the largest batch size whose total leaves enough of a GPU's memory free, - if none does."""
    return max((b for b, total in zip(batch_sizes, totals) if total <= USABLE * gigabytes * 1e9), default="-")


def print_estimates(config, batch_sizes, world_size):
    print(f"{'':37}{'GB at batch size':>{8 * len(batch_sizes)}}   {'largest batch size within':>27}")
    print(f"{'precision':11}{'checkpointing':15}{'optimizer':11}" + "".join(f"{b:8}" for b in batch_sizes) + "   "
          + "".join(f"{f'{gb} GB':>9}" for gb in GPUS))  # fmt: skip
    for precision, checkpointing in itertools.product(("fp32", "bf16"), (False, True)):
        options = {"precision": precision, "gradient_checkpointing": checkpointing}
        memories = [estimate({**config, **options, "batch_size": batch_size}, world_size) for batch_size in batch_sizes]
        for sharded in (False, True):
            totals = [memory.total(sharded) for memory in memories]
            print(f"{precision:11}{ON_OFF[checkpointing]:15}{'sharded' if sharded else 'whole':11}"
                  + "".join(f"{total / 1e9:8.2f}" for total in totals)
                  + "   " + "".join(f"{largest_fitting(batch_sizes, totals, gb):>9}" for gb in GPUS), flush=True)  # fmt: skip
    memory, checkpointing = estimate(config, world_size), ON_OFF[config["gradient_checkpointing"]]
    print(f"parts in GB at batch {config['batch_size']}, {config['precision']}, checkpointing {checkpointing}:")
    print(", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in Memory._fields[:-1])
          + f"; {memory.shard / 1e9:.2f} of the optimizer if sharded")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/Pretrain.yaml"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 32, 64, 128], help="of each process")
    parser.add_argument("--world_size", type=int, default=8, help="processes")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    if isinstance(config["bert_config"], str):
        config["bert_config"] = str(ROOT / config["bert_config"])
    print(f"memory of a pre-training step of {Path(args.config).name} on each of {args.world_size} processes, "
          f"estimated for a GPU, torch {torch.__version__}")  # fmt: skip
    print_estimates(config, args.batch_size, args.world_size)


if __name__ == "__main__":
    main()
