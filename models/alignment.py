"""Contrastive learning and matching under momentum distillation (Sections 3.2, 3.3): what pre-training and retrieval share."""

import torch

from models.albef import ALBEF, feature_queue
from models.losses import itc_loss, sample_negatives, similarities
from models.momentum import update_momentum_
from models.queue import enqueue_


class Alignment(ALBEF):
    """An ALBEF with momentum copies of its unimodal encoders, queues of their features, ITC and hard negatives for ITM.

    Keys of the configuration beyond the architecture: objectives, hard_negatives (false: uniform), distill (true, false, or
    the list of objectives to distill), queue_size, momentum. known: the objectives that the task has.
    """

    def __init__(self, config, bert, tokenizer, known):
        super().__init__(config, bert, tokenizer)
        self.objectives = [name for name in config["objectives"] if name in known]
        distill = config["distill"]
        self.distilled = distill if isinstance(distill, list) else self.objectives * distill
        self.hard_negatives = config["hard_negatives"] and "itc" in self.objectives
        self.momentum = config["momentum"]
        self.add_momentum("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        for queue in ("image_queue", "text_queue"):
            self.register_buffer(queue, feature_queue(config["embed_dim"], config["queue_size"]))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def begin_step(self, update_momentum):
        """Keeps temp in its range and moves the momentum model."""
        self.temp.clamp_(0.001, 0.5)
        if update_momentum:
            update_momentum_(self, self.momentum)

    def contrastive(self, image_feat, text_feat, features_m, targets, alpha):
        """Equations 1, 2 and 6. targets: class indices [B] or distributions [B, B + Q].

        Returns (loss, the one-hot loss of Equation 2, Contrast).
        """
        # backward needs the queues as they were before this step's features enter
        image_queue, text_queue = self.image_queue.clone(), self.text_queue.clone()
        contrast = similarities(image_feat, text_feat, *features_m, image_queue, text_queue, self.temp)
        contrast_m = None
        if "itc" in self.distilled:
            contrast_m = similarities(*features_m, *features_m, image_queue, text_queue, self.temp.detach())
        return *itc_loss(contrast, targets, contrast_m, alpha), contrast

    def enqueue(self, features_m, **others):
        """The queues take this step's momentum features (image, text) of all processes; others: rows by name of their queue."""
        queues = [self.image_queue, self.text_queue, *(getattr(self, name) for name in others)]
        enqueue_(queues, [*features_m, *others.values()], self.queue_ptr)

    def negatives(self, contrast, positives):
        """Indices of a negative text for each image and of a negative image for each text [B], and validity [B].

        positives: bool [B, B], symmetric, the pairs that match; contrast is not read where negatives are uniform.
        """
        uniform = torch.zeros(positives.shape, device=positives.device)
        batch = len(positives)
        i2t, t2i = (sim[:, :batch] for sim in contrast) if self.hard_negatives else (uniform, uniform)
        negative_text, valid = sample_negatives(i2t, positives)
        negative_image, _ = sample_negatives(t2i, positives)
        return negative_text, negative_image, valid

    def match(self, text_embeds, attention_mask, keys_values, contrast, positives, text_embeds_masked=None):
        """Fuses matched pairs, their hard negatives and perhaps masked texts in one pass of the multimodal encoder.

        Returns the [CLS] embeddings [3B, C] of B matched pairs, B images with a negative text and B texts with a negative
        image, the fused masked texts [B, L, C] (no rows without them), and validity of the negatives [B].
        """
        negative_text, negative_image, valid = self.negatives(contrast, positives)
        rows = torch.cat([text_embeds, text_embeds[negative_text], text_embeds])
        masks = torch.cat([attention_mask, attention_mask[negative_text], attention_mask])
        masked = text_embeds[:0] if text_embeds_masked is None else text_embeds_masked
        cls, fused = self.bert.fuse_matched_and_masked(
            rows, masks, masked, attention_mask[: len(masked)], keys_values, negative_image
        )
        return cls, fused, valid

    def freeze(self, parameters):
        """Takes what no objective reaches out of training, so that data parallelism does not wait for its gradient."""
        for param in parameters:
            param.requires_grad_(False)

    def idle_parameters(self):
        """Parameters that no objective reaches when ITC or ITM is off."""
        idle = []
        if "itc" not in self.objectives:
            idle += [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]
        if "itm" not in self.objectives:
            idle += self.itm_head.parameters()
        if self.objectives == ["itc"]:
            idle += self.bert.encoder.layer[self.bert.fusion_layer :].parameters()
        return idle
