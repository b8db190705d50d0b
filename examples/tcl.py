"""Pre-train with triple contrastive learning (TCL; Yang et al., CVPR 2022).

python -m examples.tcl takes the flags of Pretrain.py; examples/tcl_model.py has the method.
"""

from dataclasses import replace

from configs.cli import task_parser
from configs.tasks import TASKS
from engine.launch import run_script

parser = task_parser(__doc__, "examples/tcl.yaml", "--output_dir output/tcl")


def main() -> None:
    """Parse the flags and pre-train."""
    args = parser.parse_args()
    from engine.run import run_task

    TASKS["pretrain"] = replace(
        TASKS["pretrain"], model="examples.tcl_model:TCL", config="examples/tcl.yaml"
    )
    run_task("pretrain", args)


if __name__ == "__main__":
    run_script(main)
