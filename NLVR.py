"""Fine-tunes ALBEF for NLVR2 (Section 5) and evaluates it: is the sentence true of the two images?

--checkpoint is a model after text assignment (Pretrain_nlvr.py) or, "w/o TA", a plain pre-trained
one.
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/NLVR.yaml", "--checkpoint pretrain_model_nlvr.pth")
if __name__ == "__main__":
    begin_script(flags)

from engine.task import run_task
from evaluation.classification import evaluate, step


def main():
    run_task("nlvr", flags.parse_args(), step, evaluate, "acc")


if __name__ == "__main__":
    run_script(main)
