"""What a device computes with: precision, attention kernels, compiled layers; and how fast it
could.
"""

import os
import re

import torch
from timm.models.vision_transformer import Block

from dataset.cache import cache_folder
from models.bert import Layer
from utils import InputError, is_main, make_deterministic

# dense bf16 matrix-product peak in FLOP/s by the words that a device's name begins with, after
# NVIDIA
PEAK_BF16 = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 150e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
# graphs of a function, which all layers share; beyond them it computes as it is. timm's optimizers
# set it to a million
MAX_GRAPHS = 64


def has_bf16(device):
    """Whether the device computes in bf16; every CPU does, some of them slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config, device):
    """Return the context of the forward pass: bf16 autocast if the configuration and the device
    have it.
    """
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config["precision"] == "bf16" and has_bf16(device)
    )


def use_device(config, device):
    """Set how the device computes according to the keys precision and deterministic, before
    training or evaluation.

    float32 matrix products on a GPU run on tensor cores in TF32, as in the released code's torch,
    or in full float32 with deterministic. Fused attention does not use cuDNN, which would prepare a
    plan for every new length of the texts.
    """
    if config["deterministic"] or device.type == "cpu":  # on a CPU it takes no time
        make_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if config["deterministic"] else "high")
        torch.backends.cuda.enable_cudnn_sdp(False)


def compiles(config, device):
    """Return whether to compile the layers. `auto` compiles on a GPU unless `deterministic` is set.

    If torch.compile does not work, `auto` prints a note and does not compile. Raises InputError if
    the key compile is true then.
    """
    automatic = config["compile"] == "auto"
    if not (
        device.type == "cuda" and not config["deterministic"] if automatic else config["compile"]
    ):
        return False
    # the default of torch is the temporary folder, which a restart of the machine may empty
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache_folder(), "torchinductor"))
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler can raise any exception, and it may be missing
        said = " ".join(str(getattr(error, "inner_exception", error)).split())
        problem = f"torch.compile does not work here ({said:.200}): it needs Triton, a C compiler and Python's header files"
        if not automatic:
            raise InputError(f"compile: {problem}; install them, or --set compile=auto") from None
        if is_main():
            print(f"note: {problem}; training without it")
        return False
    # a layer that the compiler cannot take computes as it is
    torch._dynamo.config.suppress_errors = automatic
    return True


def compile_layers(model, **options):
    """Compile every transformer layer in place; names in the state dict stay as they are. options:
    of torch.compile.

    A layer over texts is compiled once for all lengths and batch sizes. Data parallelism does not
    split a layer into graphs of its own, which are of use for whole models.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # a text as long as there are heads would be compiled for that length
    torch.fx.experimental._config.use_duck_shape = False
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
        elif isinstance(module, Layer):
            module.compile(dynamic=True, **options)


def device_peak(device, config):
    """Return the bf16 matrix-product peak of the device in FLOP/s, None in fp32 or if it is
    unknown.
    """
    if device.type != "cuda" or config["precision"] != "bf16":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    fitting = [
        name
        for name in PEAK_BF16
        if words[: len(name.split())] == name.split() and "MIG" not in words
    ]
    return PEAK_BF16[max(fitting, key=len)] if fitting else None
