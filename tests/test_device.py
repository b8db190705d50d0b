"""What a GPU would compute with, on a device of which there is only the name."""

import contextlib
from unittest import mock

import pytest
import torch

from engine.device import device_peak, use_device
from engine.recorder import Recorder
from engine.saving import Position

CUDA = torch.device("cuda")


def test_float32_is_tf32_on_a_gpu_but_not_where_results_must_repeat_and_attention_has_no_cudnn():
    kept = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic, precision in ((False, "high"), (True, "highest")):
            torch.backends.cuda.enable_cudnn_sdp(True)
            use_device({"deterministic": deterministic}, CUDA)
            assert torch.get_float32_matmul_precision() == precision and not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
        use_device({"deterministic": False}, torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.use_deterministic_algorithms(kept[1])


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 NVL", 835), ("NVIDIA B200", 2250),
    ("NVIDIA GeForce RTX 4090", None), ("NVIDIA A1000", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
])  # fmt: skip
def test_the_peak_is_that_of_the_very_device(name, peak):
    with mock.patch("torch.cuda.get_device_name", lambda device: name):
        assert device_peak(CUDA, {"precision": "bf16"}) == (peak and peak * 1e12)
        assert device_peak(CUDA, {"precision": "fp32"}) is None


def test_operations_are_counted_once_a_run_also_of_compiled_layers(tiny_config, tmp_path):
    run = mock.Mock(config=tiny_config, device=torch.device("cpu"), output_dir=tmp_path)
    weight, x = torch.ones(4, 8), torch.ones(2, 4)
    kernel = lambda *arguments: [torch.zeros(2, 8)]  # into which no counter sees
    layer = torch.compile(lambda x: x @ weight, backend=lambda graph, inputs: kernel)
    assert not layer(x).any()
    with mock.patch("engine.recorder.device_peak", lambda device, config: 1e12):
        for flops, counted in ((None, 2 * 2 * 4 * 8), (7, 7)):
            with contextlib.closing(Recorder(run, Position(), 6, None, flops)) as recorder:
                with recorder.count_flops():
                    layer(x)
                assert recorder.flops == counted


def test_a_gpu_is_asked_for_its_losses_every_log_every_iterations(tiny_config, tmp_path):
    run = mock.Mock(config={**tiny_config, "log_every": 3}, device=CUDA, output_dir=tmp_path)
    asked = []
    with contextlib.closing(Recorder(run, Position(), 8, None)) as recorder:
        def fetch():
            asked.append(len(recorder.pending))
            recorder.now.iteration += len(recorder.pending)
            recorder.pending = []

        with mock.patch.object(recorder, "fetch", fetch):
            for _ in range(8):
                recorder.add({}, 0.1, [], [])
    assert asked == [3, 3, 2]
