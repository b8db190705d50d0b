"""Fine-tunes ALBEF for NLVR2 (Section 5) and evaluates it: is the sentence true of the two images?

--checkpoint is a model after text assignment (Pretrain_nlvr.py) or, "w/o TA", a plain pre-trained one.
"""

from dataset import to_device
from dataset.nlvr import LABELS
from evaluation import class_accuracy, print_accuracy
from finetune import fine_tune
from models.albef import Text
from utils import argument_parser, run_script


def step(device):
    """What a training step computes: batch -> losses by name."""

    def losses(model, batch, alpha, update_momentum):
        batch = to_device(batch, device)
        first, second = batch.image.chunk(2)
        return model(first, second, Text(*batch.text), targets=batch.targets, alpha=alpha, update_momentum=update_momentum)

    return losses


def evaluate(model, dataset, tokenizer, config, device):
    """Accuracy over the two classes."""
    model.eval()

    def predict(batch):
        return model.predict(*batch.image.chunk(2), Text(*batch.text))

    return class_accuracy(predict, dataset, tokenizer, config, device), None


def show(output_dir, title, split, epoch, metrics, result, dataset):
    """One line with the accuracy."""
    print_accuracy(f"NLVR2, {title}", metrics, dataset, len(LABELS))


def main():
    args = argument_parser(__doc__, "configs/NLVR.yaml", "output/NLVR").parse_args()
    fine_tune("nlvr", args, step, evaluate, "acc", show)


if __name__ == "__main__":
    run_script(main)
