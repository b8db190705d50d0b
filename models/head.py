"""The linear layer of projections, classifiers and vocabulary heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """Compute a linear layer in the dtype of its weights, also under autocast: [..., C_in] -> [...,
    C_out].

    Its outputs rank candidates. Rounded to bf16, which has 8 significant bits, the scores of
    different inputs would tie.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
