"""Contrastive learning and matching with momentum distillation, for pre-training and retrieval."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.config import TEMP_RANGE, BertConfig, Config
from models.albef import ALBEF, check_objectives
from models.bert import BertForMaskedLM, BertModel, Head, TextRows
from models.losses import Contrast, Features, itc_loss, sample_negatives, similarities
from models.momentum import enqueue_, update_momentum_
from models.tokenizer import Tokenizer
from utils import Text, is_distributed, rank, world_size

OBJECTIVES = {"itc", "mlm", "itm"}
NO_CANDIDATE = -100.0  # score of a pair that is not re-ranked, as in the released code


class MatchOutput(NamedTuple):
    """Fused states of matched pairs, their hard negatives and masked texts.

    Attributes:
        cls: [CLS] states [3B, C] of B matched pairs, B images with a negative text and B texts with
            a negative image. None without ITM.
        masked: States of the masked texts [B, L, C]. None without MLM.
        valid: Whether a pair has negatives, bool [B]. None without ITM.
    """

    cls: Tensor | None = None
    masked: Tensor | None = None
    valid: Tensor | None = None


class ContrastiveModel(ALBEF):
    """ALBEF with projections, matching head, momentum encoders and queues of their features."""

    vision_proj_m: Head
    text_proj_m: Head
    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor
    image_cos: Tensor
    text_cos: Tensor

    def __init__(
        self,
        config: Config,
        bert: Callable[[BertConfig], BertModel | BertForMaskedLM],
        tokenizer: Tokenizer | None,
        known: Sequence[str],
    ) -> None:
        """Build the model with random weights.

        Args:
            config: Configuration of the task.
            bert: Class of the text encoder.
            tokenizer: Source of the special token ids, by default BERT's.
            known: Objectives of the task.

        Raises:
            InputError: The configuration does not fit.
        """
        super().__init__(config, bert, tokenizer)
        if set(config.objectives) != OBJECTIVES:  # all objectives are the default of every task
            check_objectives("objectives", config.objectives, known)
        self.objectives = [name for name in config.objectives if name in known]
        distillable = [name for name in self.objectives if name != "itm"]
        check_objectives("distill", config.distill, distillable)
        distilled = config.distill
        self.distilled = distillable * distilled if isinstance(distilled, bool) else distilled
        self.hard_negatives = config.hard_negatives
        width, embed_dim = self.bert_config.hidden_size, config.embed_dim
        self.vision_proj = Head(config.vision_width, embed_dim)
        self.text_proj = Head(width, embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(config.temp)))
        self.itm_head = Head(width, 2)
        self.add_momentum("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        for name in ("image_queue", "text_queue"):  # queues of random features at first
            queue = F.normalize(torch.randn(embed_dim, config.queue_size), dim=0)
            self.register_buffer(name, queue)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        for name in ("image_cos", "text_cos"):  # of the last step, see `mean_cosine`
            self.register_buffer(name, torch.zeros(()), persistent=False)

    def extra_metrics(self) -> dict[str, Tensor]:
        """Return the temperature, and how alike the features of the batch are."""
        if "itc" not in self.objectives:
            return {}
        return {"temp": self.temp, "image_cos": self.image_cos, "text_cos": self.text_cos}

    def encode_image(self, image: Tensor, momentum: bool = False) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            image: Images [B, 3, H, W].
            momentum: Whether to use the momentum model.

        Returns:
            image_embeds [B, 1+N, C], and image_feat [B, D] = g_v(v_cls), normalized, float32.
        """
        encoder = self.visual_encoder_m if momentum else self.visual_encoder
        proj = self.vision_proj_m if momentum else self.vision_proj
        image_embeds = encoder.forward_features(image)
        return image_embeds, F.normalize(proj(image_embeds[:, 0]), dim=-1)

    def encode_text(self, text: Text, momentum: bool = False) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            text: Texts [B, L].
            momentum: Whether to use the momentum model.

        Returns:
            text_embeds [B, L, C], and text_feat [B, D] = g_w(w_cls), normalized, float32.
        """
        bert = self.bert_m if momentum else self.bert
        proj = self.text_proj_m if momentum else self.text_proj
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return text_embeds, F.normalize(proj(text_embeds[:, 0]), dim=-1)

    def itm_logits(self, fused: Tensor) -> Tensor:
        """Classify fused states [B, L, C] by [CLS] -> [B, 2], not matched and matched, float32."""
        return self.itm_head(fused[:, 0])

    @torch.no_grad()
    def begin_step(self, update_momentum: bool) -> None:
        """Clamp the temperature and update the momentum model."""
        self.temp.clamp_(*TEMP_RANGE)
        if update_momentum:
            update_momentum_(self, self.config.momentum)

    def contrastive(
        self, features: Features, features_m: Features, targets: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor, Contrast]:
        """Compute the contrastive loss (Equations 1, 2 and 6).

        Args:
            features: Features of the batch.
            features_m: Features of the momentum model.
            targets: Class indices [B] or distributions [B, B + Q].
            alpha: Weight of distillation.

        Returns:
            The loss, the one-hot loss of Equation 2, and the similarities.
        """
        self.image_cos.copy_(mean_cosine(features.image))
        self.text_cos.copy_(mean_cosine(features.text))
        # backward needs the queues as they were before this step's features enter
        queues = Features(self.image_queue.clone(), self.text_queue.clone())
        contrast, contrast_m = similarities(features, features_m, queues, self.temp), None
        if "itc" in self.distilled:
            contrast_m = similarities(features_m, features_m, queues, self.temp.detach())
        return *itc_loss(contrast, targets, contrast_m, alpha), contrast

    def enqueue(self, features_m: Features, **others: Tensor) -> None:
        """Put the momentum features of all ranks into the queues.

        Args:
            features_m: Momentum features of this rank.
            others: Rows of this rank for other queues, by the name of the queue.
        """
        queues = [self.image_queue, self.text_queue, *(getattr(self, name) for name in others)]
        enqueue_(queues, [*features_m, *others.values()], self.queue_ptr)

    def negatives(
        self, contrast: Contrast | None, positives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a negative text for each image and a negative image for each text.

        Args:
            contrast: Similarities of the batch. Default: uniform negatives.
            positives: Pairs that match, bool [B, B], symmetric.

        Returns:
            Indices of texts [B] and of images [B], and validity [B].
        """
        uniform = torch.zeros(positives.shape, device=positives.device)
        i2t, t2i = contrast if contrast and self.hard_negatives else (uniform, uniform)
        batch = len(positives)
        negative_text, valid = sample_negatives(i2t[:, :batch], positives)
        negative_image, _ = sample_negatives(t2i[:, :batch], positives)
        return negative_text, negative_image, valid

    def match(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        attention_mask: Tensor,
        *,
        contrast: Contrast | None,
        positives: Tensor | None = None,
        masked_embeds: Tensor | None = None,
    ) -> MatchOutput:
        """Fuse matched pairs, their hard negatives and masked texts in one pass.

        Args:
            image_embeds: Image embeddings [B, 1+N, C].
            text_embeds: Text embeddings [B, L, C].
            attention_mask: Mask of the tokens [B, L].
            contrast: Similarities of the batch. Default: uniform negatives.
            positives: Pairs that match, bool [B, B], symmetric. Default: a text and its own image.
            masked_embeds: Embeddings of the masked texts [B, L, C].
        """
        parts, valid, cls, masked = [], None, None, None
        if "itm" in self.objectives:
            if positives is None:
                positives = torch.eye(len(text_embeds), dtype=torch.bool, device=text_embeds.device)
            negative_text, negative_image, valid = self.negatives(contrast, positives)
            # the gradient of index_select is the same in every run on a CPU
            negative_embeds = text_embeds.index_select(0, negative_text)
            parts = [
                TextRows(text_embeds, attention_mask, cls_only=True),
                TextRows(negative_embeds, attention_mask[negative_text], cls_only=True),
                TextRows(text_embeds, attention_mask, negative_image, cls_only=True),
            ]
        if masked_embeds is not None:
            parts.append(TextRows(masked_embeds, attention_mask))
        # an image's keys and values are computed once for all of its texts
        fused = self.bert.fuse_all(parts, self.bert.image_keys_values(image_embeds))
        if masked_embeds is not None:
            masked = fused.pop()
        if fused:
            cls = torch.cat(fused)[:, 0]
        return MatchOutput(cls, masked, valid)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that no objective reaches."""
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
        image_embeds: Any,
        image_feat: Tensor,
        text_embeds: Any,
        text_feat: Tensor,
        attention_mask: Tensor,
        k: int,
        *,
        progress: Callable[[range], Iterable[int]] = iter,
        rows: int = 256,
    ) -> tuple[Tensor, Tensor]:
        """Score the k most similar candidates of every image and every text (Section 5).

        The union of both directions' candidates is scored by `itm_scores`.

        Args:
            image_embeds: Image embeddings [NI, 1+N, C] on any device, or an object whose slices
                are such tensors.
            image_feat: Image features [NI, D].
            text_embeds: Text embeddings [NT, L, C], like `image_embeds`.
            text_feat: Text features [NT, D].
            attention_mask: Mask of the tokens [NT, L].
            k: Number of candidates of each query.
            progress: Wrapper of the range of images, for a progress bar.
            rows: Maximum number of texts in a pass.

        Returns:
            scores_i2t [NI, NT] and scores_t2i [NT, NI], -100 if a pair is not a candidate.
        """
        sim = feature_similarity(image_feat, text_feat)
        i2t = top_candidates(sim, k)
        t2i = top_candidates(sim.T, k).T
        scores, _ = self.itm_scores(
            image_embeds, text_embeds, attention_mask, i2t | t2i, progress=progress, rows=rows
        )
        return scores.masked_fill(~i2t, NO_CANDIDATE), scores.T.masked_fill(~t2i.T, NO_CANDIDATE)

    @torch.no_grad()
    def itm_scores(
        self,
        image_embeds: Any,
        text_embeds: Any,
        attention_mask: Tensor,
        pairs: Tensor,
        *,
        progress: Callable[[range], Iterable[int]] = iter,
        rows: int = 256,
    ) -> tuple[Tensor, Tensor]:
        """Score pairs of images and texts by matching.

        Image by image, so that an image's keys and values are computed once. Texts of similar
        length share a pass. The images are distributed over the ranks.

        Args:
            image_embeds: As in `rerank`.
            text_embeds: As in `rerank`.
            attention_mask: Mask of the tokens [NT, L].
            pairs: Pairs to score, bool [NI, NT].
            progress: Wrapper of the range of images, for a progress bar.
            rows: Maximum number of texts in a pass.

        Returns:
            Logits of "matched", the scores of re-ranking, and probabilities of "matched", float32
            [NI, NT] each, -100 for other pairs.
        """
        lengths, device = attention_mask.sum(dim=1).tolist(), pairs.device
        scores = torch.zeros(*pairs.shape, 2, device=device)
        texts_of = pairs.cpu()
        for image in progress(range(rank(), len(pairs), world_size())):
            keys_values = self.bert.image_keys_values(image_embeds[image : image + 1].to(device))
            texts = sorted(texts_of[image].nonzero().squeeze(1).tolist(), key=lengths.__getitem__)
            for start in range(0, len(texts), rows):
                bucket = torch.tensor(texts[start : start + rows])
                length = lengths[bucket[-1]]
                embeds = text_embeds[bucket, :length].to(device)
                mask = attention_mask[bucket, :length].to(device)
                fused = self.bert.fuse(embeds, mask, keys_values, cls_only=True)
                logits = self.itm_logits(fused)
                matched = torch.stack([logits[:, 1], logits.softmax(dim=1)[:, 1]], dim=1)
                scores[image, bucket.to(device)] = matched
        if is_distributed():
            # one rank has each score, so that the sum is exact; a maximum would drop NaN
            dist.all_reduce(scores)
        logits, probs = scores.masked_fill_(~pairs[..., None], NO_CANDIDATE).unbind(dim=2)
        return logits, probs


def feature_similarity(image_feat: Tensor, text_feat: Tensor) -> Tensor:
    """Compute s(I, T) of features [NI, D] and [NT, D] -> [NI, NT] in float32."""
    with torch.autocast(image_feat.device.type, enabled=False):
        return image_feat @ text_feat.T


def top_candidates(sim: Tensor, k: int) -> Tensor:
    """Mark the k largest of each row, or all if there are fewer: sim [Q, K] -> bool [Q, K]."""
    top = sim.topk(min(k, sim.shape[1]), dim=1).indices
    return torch.zeros_like(sim, dtype=torch.bool).scatter_(1, top, True)


@torch.no_grad()
def mean_cosine(feat: Tensor) -> Tensor:
    """Compute the mean cosine of two different rows of normalized features [B, D].

    It is near 1 if the encoder maps all inputs to one feature. A batch of one has 0.
    """
    batch = len(feat)
    return (feat.sum(dim=0).square().sum() - batch) / max(1, batch * (batch - 1))


def mutual_information_bound(itc_onehot: Tensor, candidates: int) -> Tensor:
    """Compute log(candidates) - loss, a lower bound of the mutual information (Section 4)."""
    return math.log(candidates) - itc_onehot.detach()
