"""Memory of a training step on a GPU: an estimate, and what to do where there is too little.

The step is the training loop's own (engine.iterate), run on tensors that have a shape but no data (torch's FakeTensorMode):
neither a GPU nor the memory of the model is needed. The peak of the bytes of all storages alive, in the blocks of 512 that the
CUDA allocator hands out, is what torch.cuda.max_memory_allocated would report. Weights, momentum model, queues, gradients and
optimizer state are counted from the tensors, activations are the rest of the peak. With more than one process the gradients are
buckets of DistributedDataParallel that outlive a step; alone they come and go with the backward pass and count as activations.
A sharded optimizer is ZeRO-1 as torch's ZeroRedundancyOptimizer divides it, the fullest process counts. Not in it: what lies
outside of torch's allocator (CUDA context, NCCL) and what the allocator cannot reuse, for which a tenth of the GPU is left
free; and buffers inside an operation. torch.compile is off. GB are 10^9 bytes.
"""

import contextlib
import copy
import itertools
import sys
import weakref
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dataset.batches import TrainBatches
from dataset.transforms import normalize
from engine.loop import Run, iterate
from models import build_model
from optim import create_optimizer
from utils import InputError, TrainingStopped, rank, seed_everything, world_size

BLOCK = 512  # bytes, the granularity of the CUDA caching allocator
USABLE = 0.9  # of a GPU's memory


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


def prepare(model, step, device, world_size):
    """Return a run with all that outlives a step in place: optimizer state and, with several processes, gradients."""
    config = model.config
    for param in model.idle_parameters():
        param.requires_grad_(False)
    optimizer = create_optimizer(config["optimizer"], model.train())
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    if world_size == 1:
        optimizer.zero_grad(set_to_none=True)
    return Run(model, model, optimizer, step, config, config["scheduler"], device, seed=0, output_dir=None, iterations=1)


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


def estimate(task, config, step, batch, world_size, gpu=True, tokenizer=None):
    """Return the Memory of a step on each of world_size processes, on a GPU or on a CPU, by a complete configuration.

    task, step: as run_task takes them; batch: one of the task's training set, on the host. Raises InputError for an optimizer
    other than AdamW: only its fused step decides without looking at the gradients.
    """
    if config["optimizer"]["opt"].lower() != "adamw":
        raise InputError(f"optimizer: the estimate is for opt adamW, not {config['optimizer']['opt']!r}")
    with torch.device("meta"):
        model = build_model(task, config, tokenizer)
    seed_everything(0)
    batch = model.prepare(batch)
    normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # keeps constants for good, and they should be real ones
    fake_mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(BLOCK if gpu else 1)
    with fake_mode, live, gpu_kernels() if gpu else contextlib.nullcontext():
        model = fake_copy(model)
        model.prepare = lambda batch: batch
        batch = tree_map_only(torch.Tensor, fake_mode.from_tensor, batch)
        for tensor in filter(torch.is_tensor, tree_leaves(batch)):
            live.add(tensor)
        run = prepare(model, step, torch.device("cpu"), world_size)
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
# where memory runs out


def fitting(task, config, step, dataset, tokenizer, usable, processes):
    """Return {(precision, checkpointing): largest batch size that fits}, of the configuration's batch size and its halves.

    usable: bytes. What the configuration says has been tried, so that of it only smaller batches count.
    """
    tried, found = (config["precision"], config["gradient_checkpointing"]), {}
    for precision, checkpointing in itertools.product(("fp32", "bf16"), (False, True)):
        keys = {**config, "precision": precision, "gradient_checkpointing": checkpointing, "num_workers": 0}
        batch_size = config["batch_size"] // (2 if (precision, checkpointing) == tried else 1)
        while batch_size:
            keys["batch_size"] = batch_size
            batch = next(iter(TrainBatches(dataset, tokenizer, keys, torch.device("cpu"), seed=0)))
            if estimate(task, keys, step, batch, processes, True, tokenizer).total(config["shard_optimizer"]) <= usable:
                found[precision, checkpointing] = batch_size
                break
            batch_size //= 2
    return found


@contextlib.contextmanager
def explain_full_memory(model, config, step, dataset, tokenizer, device):
    """Within it, memory of the GPU that runs out in training raises TrainingStopped: it says what would fit by the estimate."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        if not model.training:  # a validation, which batch_size_test decides
            raise
        said = " ".join(str(error).split()[:40])
    print(f"process {rank()}: out of GPU memory; estimating what would fit", file=sys.stderr, flush=True)
    total, processes = torch.cuda.get_device_properties(device).total_memory, world_size()
    try:
        with mock.patch("torch.distributed.is_initialized", lambda: False):  # the step of the estimate has no others
            found = fitting(model.task, config, step, dataset, tokenizer, USABLE * total, processes)
        fits = ", or ".join(f"batch_size={size} precision={precision} gradient_checkpointing={str(checkpointing).lower()}"
                            for (precision, checkpointing), size in found.items())  # fmt: skip
        advice = f"by the estimate would fit: --set {fits}" if fits else "by the estimate not even batch_size=1 fits"
    except InputError as error:  # an optimizer without an estimate
        advice = f"lower batch_size ({error})"
    raise TrainingStopped(
        f"out of GPU memory ({total / 1e9:.0f} GB) with batch_size {config['batch_size']} in {config['precision']}, "
        f"gradient_checkpointing {str(config['gradient_checkpointing']).lower()}; {advice}; accumulate makes up for a smaller "
        f"batch ({said})"
    )
