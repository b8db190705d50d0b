"""Operations, FLOPs and bytes of a pre-training step on a GPU, counted, and the time to expect of them: an estimate.

The step is the training loop's own on tensors without data (engine/memory.py), with the kernels that a GPU has in eager mode.
Every operation that is not a view counts as a launch, and its bytes are those of all tensors that it reads and writes. On the
device an operation takes as long as its FLOPs or its bytes do, whichever is more; the host launches one after the other; the
step takes as long as the slower of the two. It needs no GPU.

    python benchmarks/roofline.py [--batch_size 32 64 128]
"""

import argparse
from unittest import mock

from bench import full_size_config

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import Pretrain
from engine.device import PEAK_BF16
from engine.loop import iterate
from engine.memory import estimate
from pretrain_step import make_batch

GPUS = {"A100": 2.04e12, "H100 80GB HBM3": 3.35e12}  # bytes per second of its memory
OF_PEAK, OF_BANDWIDTH, LAUNCH = 0.7, 0.8, 6e-6  # what kernels reach; seconds of the host for an operation


class Work(TorchDispatchMode):
    """The operations of a step: FLOPs and bytes of each."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "aten" and not (function.is_view or function is torch.ops.aten._unsafe_view.default):
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.operations.append((flops, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return result


def count_work(batch_size):
    """Return (FLOPs, bytes) of each operation of a bf16 step of configs/Pretrain.yaml."""
    config, work = full_size_config("Pretrain", f"batch_size={batch_size}", "precision=bf16"), Work()

    def counted(*arguments):
        with work:
            return iterate(*arguments)

    of_gpu = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)  # all norms in one operation
    with mock.patch("engine.memory.iterate", counted), of_gpu:
        estimate("pretrain", config, Pretrain.step, make_batch(batch_size, config["image_res"]), world_size=1)
    return work.operations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32, 64, 128])
    sizes = parser.parse_args().batch_size
    print(f"pre-training step in bf16, counted, torch {torch.__version__}; times are estimates: products at {OF_PEAK:.0%} of the "
          f"peak,\nmemory at {OF_BANDWIDTH:.0%} of its bandwidth, {LAUNCH * 1e6:.0f} us of the host for an operation")
    print(f"{'batch':>5}{'operations':>12}{'TFLOP':>8}{'GB moved':>10}   {'GPU':16}{'device ms':>10}{'host ms':>9}{'step ms':>9}"
          f"{'MFU':>7}")  # fmt: skip
    for batch_size in sizes:
        operations = count_work(batch_size)
        flops, moved = map(sum, zip(*operations))
        host = LAUNCH * len(operations)
        for name, bandwidth in GPUS.items():
            peak = PEAK_BF16[name]
            device = sum(max(flop / peak / OF_PEAK, size / bandwidth / OF_BANDWIDTH) for flop, size in operations)
            print(f"{batch_size:5}{len(operations):12}{flops / 1e12:8.2f}{moved / 1e9:10.1f}   {name:16}{1e3 * device:10.1f}"
                  f"{1e3 * host:9.1f}{1e3 * max(device, host):9.1f}{flops / peak / max(device, host):7.1%}", flush=True)


if __name__ == "__main__":
    main()
