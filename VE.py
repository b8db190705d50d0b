"""Fine-tunes ALBEF for visual entailment (Section 5) and evaluates it: does the sentence follow from the image?"""

from dataset import to_device
from dataset.ve import LABELS
from evaluation import class_accuracy, print_accuracy
from finetune import fine_tune
from models.albef import Text
from utils import argument_parser, run_script


def step(device):
    """What a training step computes: batch -> losses by name."""

    def losses(model, batch, alpha, update_momentum):
        batch = to_device(batch, device)
        return model(batch.image, Text(*batch.text), targets=batch.targets, alpha=alpha, update_momentum=update_momentum)

    return losses


def evaluate(model, dataset, tokenizer, config, device):
    """Accuracy over the three classes."""
    model.eval()
    return class_accuracy(lambda batch: model.predict(batch.image, Text(*batch.text)), dataset, tokenizer, config, device), None


def show(output_dir, title, split, epoch, metrics, result, dataset):
    """One line with the accuracy."""
    print_accuracy(f"visual entailment, {title}", metrics, dataset, len(LABELS))


def main():
    args = argument_parser(__doc__, "configs/VE.yaml", "output/VE").parse_args()
    fine_tune("ve", args, step, evaluate, "acc", show)


if __name__ == "__main__":
    run_script(main)
