"""Slow libraries are imported when they are used: --help does not wait for torch."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("dataset/*/*.py"))
    if path.parent.name not in ("benchmarks", "tests") and "run_script(main)" in path.read_text()
)
USED_LATER = {"transformers", "tensorboard", "matplotlib", "gradio", "sklearn", "scipy", "pandas"}
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(*sys.modules)
"""


def imported(program, *arguments):
    """What a program prints, and the names of the modules that it has imported at its end."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, modules = done.stdout.splitlines()
    return "\n".join(printed), set(modules.split())


def test_a_model_is_loaded_without_libraries_of_training_and_drawing():
    _, modules = imported("import sys; from inference import load_model; print(*sys.modules)")
    assert "torch" in modules
    assert not modules & USED_LATER


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_before_slow_libraries_are_imported(command):
    printed, modules = imported(HELP, command)
    assert "configs.cli" in modules
    assert not modules & {*USED_LATER, "torch", "timm", "numpy", "PIL", "huggingface_hub"}
    assert "world_size" not in printed and "text_decoder" not in printed
    if "." not in command:  # a script
        assert "example:" in printed
        assert not modules & {"ruamel", "ruamel.yaml", "msgspec"}
