"""Devices and how they compute: precision, attention kernels, compiled layers, peak speed."""

import logging
import os
import re
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from configs.config import Config
from dataset.cache import cache_folder
from models.bert import Layer
from utils import InputError

logger = logging.getLogger(__name__)

# dense bf16 matrix-product peak in FLOP/s by the words that a device's name begins with
# (NVIDIA's data sheets)
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
# largest number of compiled graphs of a function, which all layers share; with more it runs
# uncompiled. timm's optimizers set the limit to a million
MAX_GRAPHS = 64


def find_device(name: str | None) -> torch.device:
    """Return the device of a name, None for a GPU if there is one. Raises InputError."""
    gpus = torch.cuda.device_count()
    name = str(name or ("cuda" if gpus else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name} is not supported; use cuda or cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        remedy = f"name at most cuda:{gpus - 1}" if gpus else "use --device cpu"
        raise InputError(f"--device {name}: torch finds {gpus} GPUs here; {remedy}")
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16. Every CPU does, some of them slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the context of the forward pass: bf16 if set and supported by the device."""
    enabled = config.precision == "bf16" and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def use_device(config: Config, device: torch.device) -> None:
    """Set how the device computes, by the keys precision and deterministic.

    float32 matrix products on a GPU use TF32, as in the released code's torch, or full float32 if
    `deterministic` is set. Fused attention does not use cuDNN, which would prepare a plan for every
    new length of the texts.
    """
    if config.deterministic or device.type == "cpu":  # free on a CPU
        make_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if config.deterministic else "high")
        torch.backends.cuda.enable_cudnn_sdp(False)


def make_deterministic() -> None:
    """Make every operation repeatable, even if a GPU has a faster one (key deterministic)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # filling uninitialized memory serves debugging only, and slows down every allocation
    torch.utils.deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]  # set by a property
    torch.backends.cudnn.benchmark = False


def compiles(config: Config, device: torch.device) -> bool:
    """Return whether to compile the layers; `auto` compiles on a GPU unless deterministic.

    If torch.compile does not work here, `auto` logs a note and returns False.

    Raises:
        InputError: The key compile is true and torch.compile does not work here.
    """
    automatic = config.compile == "auto"
    if not (device.type == "cuda" and not config.deterministic if automatic else config.compile):
        return False
    # torch's default is the temporary folder, which a restart of the machine may empty
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache_folder(), "torchinductor"))
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler can raise any exception, and it may be missing
        reason = " ".join(str(getattr(error, "inner_exception", error)).split())
        problem = f"torch.compile does not work here ({reason:.200})"
        remedy = "install Triton, a C compiler and Python's header files"
        if not automatic:
            raise InputError(f"compile: {problem}; {remedy}, or add --set compile=auto") from None
        logger.warning("%s, so training goes on without it; %s", problem, remedy)
        return False
    # a layer that the compiler does not support runs uncompiled
    torch._dynamo.config.suppress_errors = automatic
    return True


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile every transformer layer in place. Names in the state dict do not change.

    A layer over texts is compiled once for all lengths and batch sizes.

    Args:
        model: The model.
        options: Options of torch.compile.
    """
    # it would split a layer into several graphs, which helps whole models only
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = MAX_GRAPHS  # ty: ignore[invalid-assignment]  # an int
    # a text whose length is the number of heads would be compiled for that length
    # (torch._dynamo has imported _config)
    torch.fx.experimental._config.use_duck_shape = False  # ty: ignore[possibly-missing-submodule]
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
        elif isinstance(module, Layer):
            module.compile(dynamic=True, **options)


def device_peak(device: torch.device, config: Config) -> float | None:
    """Return the device's bf16 peak in FLOP/s, None in fp32 or if it is unknown."""
    if device.type != "cuda" or config.precision != "bf16":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    if "MIG" in words:
        return None
    fitting = [name for name in PEAK_BF16 if words[: len(name.split())] == name.split()]
    return PEAK_BF16[max(fitting, key=len)] if fitting else None
