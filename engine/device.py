"""What a device computes with: precision, attention kernels, compiled layers; and how fast it could."""

import re

import torch
from timm.models.vision_transformer import Block

from models.bert import Layer
from utils import make_deterministic

# dense bf16 matrix-product peak in FLOP/s by the words that a device's name begins with, after NVIDIA
PEAK_BF16 = {
    "A10": 125e12, "A10G": 70e12, "A30": 165e12, "A40": 150e12, "A100": 312e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "H100 80GB HBM3": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200": 989e12, "H200 NVL": 835e12, "GH200": 989e12,
    "B200": 2250e12,
}  # fmt: skip


def has_bf16(device):
    """Whether the device computes in bf16; every CPU does, some of them slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config, device):
    """Return the context of the forward pass: bf16 autocast if the configuration and the device have it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16" and has_bf16(device))


def use_device(config, device):
    """Choose how the device computes, by the keys precision and deterministic. Training and evaluation call it first.

    float32 matrix products on a GPU run on tensor cores in TF32, as in the released code's torch, or in full float32 with
    deterministic. Fused attention leaves cuDNN out: it prepares a plan for every new shape, and the lengths of texts vary.
    """
    if config["deterministic"] or device.type == "cpu":  # where it costs nothing
        make_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if config["deterministic"] else "high")
        torch.backends.cuda.enable_cudnn_sdp(False)


def compile_layers(model):
    """Compile every transformer layer in place; names in the state dict stay as they are.

    Data parallelism does not split a layer into graphs of its own, which are of use for whole models.
    """
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, (Block, Layer)):
            module.compile()


def device_peak(device, config):
    """Return the bf16 matrix-product peak of the device in FLOP/s; None in fp32, and where it is not known."""
    if device.type != "cuda" or config["precision"] != "bf16":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    fitting = [name for name in PEAK_BF16 if words[: len(name.split())] == name.split() and "MIG" not in words]
    return PEAK_BF16[max(fitting, key=len)] if fitting else None
