"""Triple contrastive learning (TCL; Yang et al., CVPR 2022) on ALBEF: contrasts within each
modality beside those across.

python -m examples.tcl takes the flags of Pretrain.py; docs/extend.md explains each line.
"""

from dataclasses import replace

from configs.flags import task_flags
from configs.tasks import TASKS
from utils import begin_script, run_script

flags = task_flags(__doc__, "examples/tcl.yaml", "--output_dir output/tcl")
if __name__ == "__main__":
    begin_script(flags)

import torch
from torchvision.transforms.v2 import RandomResizedCrop

from engine.task import run_task
from evaluation.retrieval import evaluate
from models.losses import Features, itc_loss, similarities
from models.pretrain import Pretrain
from Pretrain import initialize, step


class TCL(Pretrain):
    """Pre-training whose contrastive loss is TCL's: the mean of image-text, text-image, image-image
    and text-text.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, tokenizer)
        self.second_view = RandomResizedCrop(config["image_res"], scale=(0.5, 1.0))
        # the intra-modal loss of the last step
        self.register_buffer("intra", torch.zeros(()), persistent=False)

    def momentum_forward(self, image, *others):
        """Show the momentum model another view of each image [B, 3, H, W]; a text's other view is
        its other dropout.
        """
        return super().momentum_forward(
            torch.stack([self.second_view(one) for one in image]), *others
        )

    def contrastive(self, features, features_m, targets, alpha):
        cross, onehot, contrast = super().contrastive(features, features_m, targets, alpha)
        # exchanged, so that the rows are image to image and text to text
        others = Features(features_m.text, features_m.image)
        queues = Features(self.text_queue.clone(), self.image_queue.clone())
        within = similarities(features, others, queues, self.temp)
        intra, _ = itc_loss(within, targets)
        self.intra.copy_(intra.detach())
        return (cross + intra) / 2, onehot, contrast

    def extra_metrics(self):
        return {**super().extra_metrics(), "intra": self.intra}


def main():
    TASKS["pretrain"] = replace(TASKS["pretrain"], model="examples.tcl:TCL")
    run_task("pretrain", flags.parse_args(), step, evaluate, initialize=initialize)


if __name__ == "__main__":
    run_script(main)
