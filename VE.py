"""Fine-tunes ALBEF for visual entailment (Section 5) and evaluates it: does the sentence follow from the image?"""

from evaluation.classification import evaluate, show, step
from dataset.ve import LABELS
from engine.finetune import fine_tune
from configs.flags import argument_parser
from utils import run_script


def main():
    args = argument_parser(__doc__, "configs/VE.yaml", "output/VE").parse_args()
    fine_tune("ve", args, step, evaluate, "acc", show("visual entailment", len(LABELS)))


if __name__ == "__main__":
    run_script(main)
