"""Pre-trains ALBEF for NLVR2 by text assignment (Section 5): is the first image the text's, the
second, or neither?
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/NLVR_pretrain.yaml", "--checkpoint ALBEF.pth")
if __name__ == "__main__":
    begin_script(flags)

from engine.task import run_task


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(batch, alpha=alpha, update_momentum=update_momentum)


def main():
    run_task("nlvr_pretrain", flags.parse_args(), step)


if __name__ == "__main__":
    run_script(main)
