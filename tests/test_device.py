"""What a GPU would compute with, on a device of which there is only the name."""

import datetime
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import refusal

from configs.config import as_config
from engine.checkpointing import Progress
from engine.distributed import init_process_group
from engine.metric_logger import MetricLogger
from engine.precision import device_peak, use_device
from engine.trainer import StepOutput

CUDA = torch.device("cuda")


def test_float32_is_tf32_on_a_gpu_but_not_where_results_must_repeat_and_attention_has_no_cudnn():
    kept = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic, precision in ((False, "high"), (True, "highest")):
            torch.backends.cuda.enable_cudnn_sdp(True)
            use_device(as_config({"deterministic": deterministic}), CUDA)
            assert (
                torch.get_float32_matmul_precision() == precision
                and not torch.backends.cuda.cudnn_sdp_enabled()
            )
            assert (
                torch.backends.cuda.flash_sdp_enabled()
                and torch.backends.cuda.mem_efficient_sdp_enabled()
            )
        use_device(as_config({"deterministic": False}), torch.device("cpu"))
        assert (
            torch.are_deterministic_algorithms_enabled()
            and torch.get_float32_matmul_precision() == "highest"
        )
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.use_deterministic_algorithms(kept[1])


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_is_that_of_the_very_device(name, peak):
    with mock.patch("torch.cuda.get_device_name", lambda device: name):
        assert device_peak(CUDA, as_config({"precision": "bf16"})) == (peak and peak * 1e12)
        assert device_peak(CUDA, as_config({"precision": "fp32"})) is None


def metric_logger(config, folder, device, **keys):
    """A MetricLogger at the beginning of an epoch, and the state of its run."""
    logger = MetricLogger(folder, as_config({**config, **keys}), device)
    state = SimpleNamespace(**asdict(Progress()), iterations=8, global_batch=config["batch_size"])
    logger.begin_epoch(state, 8)
    return logger, state


def output(**losses):
    return StepOutput(losses, torch.tensor(1.0), [], [])


def test_operations_are_counted_once_a_run_also_of_compiled_layers(tiny_config, tmp_path):
    weight, x = torch.ones(4, 8), torch.ones(2, 4)

    def kernel(*_):  # into which no counter sees
        return [torch.zeros(2, 8)]

    layer = torch.compile(lambda x: x @ weight, backend=lambda graph, inputs: kernel)
    assert not layer(x).any()
    with mock.patch("engine.metric_logger.device_peak", lambda device, config: 1e12):
        logger, _ = metric_logger(tiny_config, tmp_path, torch.device("cpu"))
    for flops, counted in ((None, 2 * 2 * 4 * 8), (7, 7)):
        logger.flops = flops
        with logger.count_flops():
            layer(x)
        assert logger.flops == counted


def test_a_gpu_is_asked_for_its_losses_every_log_every_iterations(tiny_config, tmp_path):
    logger, state = metric_logger(tiny_config, tmp_path, CUDA, log_every=3)
    asked = []

    def flush(state):
        asked.append(len(logger.pending))
        logger.pending = []

    with mock.patch.object(logger, "flush", flush):
        for state.iteration in range(8):
            logger.add(state, output(), 0.1)
    assert asked == [3, 3, 2]


def test_a_gpu_whose_peak_is_known_shows_its_mfu(tiny_config, tmp_path):
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GeForce RTX 4090", None)):
        with mock.patch("torch.cuda.get_device_name", lambda device, name=name: name):
            logger, state = metric_logger(tiny_config, tmp_path, CUDA, precision="bf16")
        logger.flops, logger.device = 1e9 if peak else None, torch.device("cpu")
        with mock.patch.object(logger, "_draw") as draw:
            logger.add(state, output(loss_a=torch.tensor(1.0)), 0.1)
            logger.flush(state)
        shown = draw.call_args.args[0]
        assert logger.peak == peak and ("MFU" in logger._bar.postfix) == bool(peak)
        if peak:
            steps_per_s = shown["samples_per_s"] / tiny_config["batch_size"]
            assert shown["mfu"] == pytest.approx(1e9 * steps_per_s / 989e12)


@pytest.fixture
def joined(monkeypatch):
    """Joins as a process of a machine with some GPUs, by environment variables; returns (device,
    calls of torch).
    """

    def join(gpus, device=None, timeout=1800, **environment):
        calls = mock.Mock()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
        monkeypatch.setattr(dist, "init_process_group", calls.init_process_group)
        rendezvous = mock.Mock(rank=5, **{"meet.return_value": "store"})
        monkeypatch.setattr("engine.distributed.Rendezvous", lambda *_: rendezvous)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return init_process_group(device, timeout), calls

    return join


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "gpus, environment, number", [(4, TORCHRUN, 1), (4, SRUN, 1), (1, SRUN, 0)]
)
def test_each_process_joins_with_a_gpu_of_its_own(joined, gpus, environment, number):
    device, calls = joined(gpus, timeout=900, **environment)
    assert device == torch.device("cuda", number)
    calls.set_device.assert_called_once_with(device)
    calls.init_process_group.assert_called_once_with(
        backend="cpu:gloo,cuda:nccl",
        device_id=device,
        store="store",
        rank=5,
        world_size=8,
        timeout=datetime.timedelta(seconds=900),
    )
    assert [call[0] for call in calls.mock_calls] == ["set_device", "init_process_group"]


def test_processes_of_a_machine_without_a_gpu_join_by_gloo(joined):
    device, calls = joined(0, **TORCHRUN)
    assert (
        device == torch.device("cpu")
        and calls.init_process_group.call_args.kwargs["backend"] == "gloo"
    )
    assert "device_id" not in calls.init_process_group.call_args.kwargs


def test_one_process_uses_the_gpu_it_is_told(joined):
    assert joined(2, "cuda:1")[0] == torch.device("cuda:1") and joined(2)[0] == CUDA
    assert "--device cuda:2: torch finds 2 GPUs here; name at most cuda:1" in refusal(
        joined, 2, "cuda:2"
    )


@pytest.mark.parametrize("gpus, environment", [(1, TORCHRUN), (2, {**SRUN, "LOCAL_RANK": "3"})])
def test_more_processes_than_gpus_are_refused(joined, gpus, environment):
    said = refusal(lambda: joined(gpus, **environment))
    assert f"torch finds only {gpus} on" in said and f"--nproc_per_node={gpus}" in said


def test_a_launcher_that_does_not_say_where_the_others_are_is_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "MASTER_ADDR is missing" in refusal(init_process_group, "cpu", 1)


def test_a_slurm_step_without_nodes_is_one_line(monkeypatch):
    monkeypatch.setattr(
        "os.environ",
        {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "1",
            "SLURM_JOB_ID": "1",
        },
    )
    assert "MASTER_ADDR" in refusal(init_process_group, "cpu", 1)


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "RANK", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK"]
)
def test_a_number_of_the_launcher_that_is_none_is_one_line(monkeypatch, name):
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    if name.startswith("SLURM"):
        del environment["RANK"]
    monkeypatch.setattr("os.environ", {**environment, name: "abc"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 if name == "LOCAL_RANK" else 0)
    assert f"{name}=abc" in refusal(init_process_group, None, 1)
