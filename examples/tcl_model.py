"""Triple contrastive learning (TCL; Yang et al., CVPR 2022): contrast within each modality too.

docs/extend.md explains each line.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from configs.config import Config
from models.losses import Contrast, Features, MaskedText, itc_loss, similarities
from models.pretrain import Pretrain
from models.tokenizer import Tokenizer
from utils import Text


class TCL(Pretrain):
    """Pre-training with the mean of image-text, text-image, image-image and text-text contrast."""

    intra: Tensor

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, tokenizer)
        self.second_view = RandomResizedCrop(config.resolution, scale=(0.5, 1.0))
        # the intra-modal loss of the last step
        self.register_buffer("intra", torch.zeros(()), persistent=False)

    def momentum_forward(
        self, image: Tensor, texts: Text, masked: MaskedText | None
    ) -> tuple[Features | None, Tensor | None]:
        """Show the momentum model another crop of each image; dropout changes a text."""
        second = torch.stack([self.second_view(one) for one in image])
        return super().momentum_forward(second, texts, masked)

    def contrastive(
        self, features: Features, features_m: Features, targets: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor, Contrast]:
        """Compute the mean of the four contrasts."""
        cross, onehot, contrast = super().contrastive(features, features_m, targets, alpha)
        # exchanged, so that the rows are image to image and text to text
        exchanged = Features(features_m.text, features_m.image)
        queues = Features(self.text_queue.clone(), self.image_queue.clone())
        within = similarities(features, exchanged, queues, self.temp)
        intra, _ = itc_loss(within, targets)
        self.intra.copy_(intra.detach())
        return (cross + intra) / 2, onehot, contrast

    def extra_metrics(self) -> dict[str, Tensor]:
        """Return the intra-modal loss beside the metrics of pre-training."""
        return {**super().extra_metrics(), "intra": self.intra}
