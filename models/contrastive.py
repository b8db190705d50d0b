"""Contrastive learning and matching under momentum distillation (Sections 3.2, 3.3): what
pre-training and retrieval share.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from configs.schema import KEYS, TEMP_RANGE
from models.albef import ALBEF, check_objectives
from models.bert import Head
from models.losses import itc_loss, sample_negatives, similarities
from models.momentum import enqueue_, update_momentum_
from utils import is_distributed, rank, world_size

NO_CANDIDATE = -100.0  # score of a pair that re-ranking leaves out, as in the released code


def matched(logits):
    """The score of re-ranking: the logit of the class "matched", itm_logits [B, 2] -> [B]."""
    return logits[:, 1]


class ContrastiveModel(ALBEF):
    """An ALBEF with projections to the contrastive space and the matching head, trained by ITC and
    ITM with hard negatives.

    Momentum copies of the unimodal encoders and queues of their features come with it.

    Keys of the configuration beyond the architecture: objectives, hard_negatives (false: uniform),
    distill (true, false, or the list of objectives to distill), queue_size, momentum. known: the
    objectives that the task has.
    """

    def __init__(self, config, bert, tokenizer, known):
        super().__init__(config, bert, tokenizer)
        # the default is all objectives of a task
        if set(config["objectives"]) != set(KEYS["objectives"].default):
            check_objectives("objectives", config["objectives"], known)
        self.objectives = [name for name in config["objectives"] if name in known]
        distillable = [name for name in self.objectives if name != "itm"]
        self.distilled = (
            config["distill"]
            if isinstance(config["distill"], list)
            else distillable * config["distill"]
        )
        check_objectives("distill", config["distill"], distillable)
        self.hard_negatives = config["hard_negatives"] and "itc" in self.objectives
        width = self.bert_config["hidden_size"]
        self.vision_proj = Head(config["vision_width"], config["embed_dim"])
        self.text_proj = Head(width, config["embed_dim"])
        self.temp = nn.Parameter(torch.tensor(float(config["temp"])))
        self.itm_head = Head(width, 2)
        self.add_momentum("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        for queue in ("image_queue", "text_queue"):
            self.register_buffer(queue, feature_queue(config["embed_dim"], config["queue_size"]))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def encode_image(self, image, momentum=False):
        """image [B, 3, H, W] -> image_embeds [B, 1+N, C] and image_feat [B, D], g_v(v_cls)
        normalized, float32.
        """
        encoder = self.visual_encoder_m if momentum else self.visual_encoder
        proj = self.vision_proj_m if momentum else self.vision_proj
        image_embeds = encoder.forward_features(image)
        return image_embeds, F.normalize(proj(image_embeds[:, 0]), dim=-1)

    def encode_text(self, text, momentum=False):
        """text with input_ids [B, L] -> text_embeds [B, L, C] and text_feat [B, D], g_w(w_cls)
        normalized, float32.
        """
        bert = self.bert_m if momentum else self.bert
        proj = self.text_proj_m if momentum else self.text_proj
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return text_embeds, F.normalize(proj(text_embeds[:, 0]), dim=-1)

    def itm_logits(self, fused):
        """Classify fused [B, L, C] -> logits [B, 2] in float32 from the [CLS] position: not
        matched, matched.
        """
        return self.itm_head(fused[:, 0])

    @torch.no_grad()
    def begin_step(self, update_momentum):
        """Keep temp in its range and move the momentum model."""
        self.temp.clamp_(*TEMP_RANGE)
        if update_momentum:
            update_momentum_(self, self.config["momentum"])

    def contrastive(self, image_feat, text_feat, features_m, targets, alpha):
        """Equations 1, 2 and 6. targets: class indices [B] or distributions [B, B + Q].

        Returns (loss, the one-hot loss of Equation 2, Contrast).
        """
        # backward needs the queues as they were before this step's features enter
        image_queue, text_queue = self.image_queue.clone(), self.text_queue.clone()
        contrast = similarities(
            image_feat, text_feat, *features_m, image_queue, text_queue, self.temp
        )
        contrast_m = None
        if "itc" in self.distilled:
            contrast_m = similarities(
                *features_m, *features_m, image_queue, text_queue, self.temp.detach()
            )
        return *itc_loss(contrast, targets, contrast_m, alpha), contrast

    def enqueue(self, features_m, **others):
        """Put this step's momentum features (image, text) of all processes into the queues.

        others: name of another queue = its rows.
        """
        queues = [self.image_queue, self.text_queue, *(getattr(self, name) for name in others)]
        enqueue_(queues, [*features_m, *others.values()], self.queue_ptr)

    def negatives(self, contrast, positives):
        """Return indices of a negative text for each image and of a negative image for each text
        [B], and validity [B].

        positives: bool [B, B], symmetric, the pairs that match; contrast is not read where
        negatives are uniform.
        """
        uniform = torch.zeros(positives.shape, device=positives.device)
        batch = len(positives)
        i2t, t2i = (
            (sim[:, :batch] for sim in contrast) if self.hard_negatives else (uniform, uniform)
        )
        negative_text, valid = sample_negatives(i2t, positives)
        negative_image, _ = sample_negatives(t2i, positives)
        return negative_text, negative_image, valid

    def match(
        self, text_embeds, attention_mask, keys_values, contrast, positives, text_embeds_masked=None
    ):
        """Fuse matched pairs, their hard negatives and perhaps masked texts in one pass of the
        multimodal encoder.

        Returns the [CLS] embeddings [3B, C] of B matched pairs, B images with a negative text and B
        texts with a negative image, the fused masked texts [B, L, C] (no rows without them), and
        validity of the negatives [B].
        """
        negative_text, negative_image, valid = self.negatives(contrast, positives)
        rows = torch.cat([text_embeds, text_embeds.index_select(0, negative_text), text_embeds])
        masks = torch.cat([attention_mask, attention_mask[negative_text], attention_mask])
        masked = text_embeds[:0] if text_embeds_masked is None else text_embeds_masked
        cls, fused = self.bert.fuse_matched_and_masked(
            rows, masks, masked, attention_mask[: len(masked)], keys_values, negative_image
        )
        return cls, fused, valid

    def idle_parameters(self):
        """Return parameters that no objective reaches when ITC or ITM is off."""
        idle = []
        if "itc" not in self.objectives:
            idle += [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]
        if "itm" not in self.objectives:
            idle += self.itm_head.parameters()
        if self.objectives == ["itc"]:
            idle += self.bert.encoder.layer[self.bert.fusion_layer :].parameters()
        return idle

    @torch.no_grad()
    def rerank(
        self,
        image_embeds,
        image_feat,
        text_embeds,
        text_feat,
        attention_mask,
        k,
        progress=iter,
        rows=256,
    ):
        """Return matching scores of the k most similar candidates of every image and every text
        (Section 5, retrieval).

        image_embeds [NI, 1+N, C] and image_feat [NI, D]; text_embeds [NT, L, C], text_feat [NT, D],
        attention_mask [NT, L]. image_embeds and text_embeds may lie on any device, or be anything
        that an index or slice turns into such a tensor. The union of both directions' candidates is
        scored by itm_scores.

        Returns (scores_i2t [NI, NT], scores_t2i [NT, NI]), -100 where a pair is not a candidate of
        that direction.
        """
        sim = feature_similarity(image_feat, text_feat)
        i2t = top_candidates(sim, k)
        t2i = top_candidates(sim.T, k).T
        scores = self.itm_scores(
            image_embeds, text_embeds, attention_mask, i2t | t2i, progress=progress, rows=rows
        )
        return scores.masked_fill(~i2t, NO_CANDIDATE), scores.masked_fill(~t2i, NO_CANDIDATE).T

    @torch.no_grad()
    def itm_scores(
        self,
        image_embeds,
        text_embeds,
        attention_mask,
        pairs,
        score=matched,
        progress=iter,
        rows=256,
    ):
        """Return score(itm_logits [B, 2]) -> [B] of some pairs, bool [NI, NT], as float32 [NI, NT];
        -100 for the others.

        Other arguments as in rerank. The walk goes image by image, so that an image's keys and
        values are computed once; texts of similar length share a pass of at most `rows` texts. In a
        process group the images are divided over the processes. progress wraps the range of images.
        """
        lengths, device = attention_mask.sum(dim=1).tolist(), pairs.device
        scores = torch.zeros(pairs.shape, device=device)
        texts_of = pairs.cpu()
        for image in progress(range(rank(), len(pairs), world_size())):
            keys_values = self.bert.image_keys_values(image_embeds[image : image + 1].to(device))
            texts = sorted(texts_of[image].nonzero().squeeze(1).tolist(), key=lengths.__getitem__)
            for start in range(0, len(texts), rows):
                bucket = torch.tensor(texts[start : start + rows])
                length = lengths[texts[min(start + rows, len(texts)) - 1]]
                embeds, mask = (
                    x[bucket, :length].to(device) for x in (text_embeds, attention_mask)
                )
                fused = self.bert.fuse(embeds, mask, keys_values, cls_only=True)
                scores[image, bucket.to(device)] = score(self.itm_logits(fused))
        if is_distributed():
            # one process has each score, so the sum is exact; a maximum would not keep NaN
            dist.all_reduce(scores)
        return scores.masked_fill_(~pairs, NO_CANDIDATE)


def feature_similarity(image_feat, text_feat):
    """s(I, T) of projected features: image_feat [NI, D], text_feat [NT, D] -> [NI, NT] in float32,
    also under autocast.
    """
    with torch.autocast(image_feat.device.type, enabled=False):
        return image_feat @ text_feat.T


def top_candidates(sim, k):
    """bool [Q, K]: the k largest of each row, all of them if there are fewer."""
    top = sim.topk(min(k, sim.shape[1]), dim=1).indices
    return torch.zeros_like(sim, dtype=torch.bool).scatter_(1, top, True)


def feature_queue(embed_dim, size):
    """A queue [D, size] of random normalized features, to be overwritten by momentum features."""
    return F.normalize(torch.randn(embed_dim, size), dim=0)


def mutual_information_bound(itc_onehot, candidates):
    """Section 4:

    InfoNCE bounds the mutual information of image and text from below by log(candidates) - loss.
    """
    return math.log(candidates) - itc_onehot.detach()
