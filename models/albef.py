"""What every ALBEF model shares (Section 3.1): image, text and multimodal encoders, projections, the matching head."""

import copy
import json
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models.momentum import copy_to_momentum_
from models.vit import build_vit
from utils import InputError


NO_CANDIDATE = -100.0  # score of a pair that re-ranking leaves out, as in the released code


class SpecialIds(NamedTuple):
    """Token ids that the models need to know; the defaults are BERT's."""

    pad: int = 0
    cls: int = 101
    mask: int = 103


class Text(NamedTuple):
    """A batch of tokenized texts: [CLS] and word pieces, padded at the end."""

    input_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L], 1 for a token, 0 for padding

    def to(self, device):
        return Text(*(x.to(device, non_blocking=True) for x in self))


def read_bert_config(value):
    """bert_config of a task's configuration, a dict or the path of a JSON file -> dict."""
    if isinstance(value, dict):
        return value
    try:
        with open(value) as file:
            config = json.load(file)
    except OSError as error:
        raise InputError(f"bert_config: cannot read {value}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"bert_config: {value} is not valid JSON: {error}") from None
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "fusion_layer", "encoder_width")
    missing = [key for key in needed if key not in config]
    if missing:
        raise InputError(f"bert_config: {value} lacks {', '.join(missing)}")
    return config


class ALBEF(nn.Module):
    """Encoders, projections to the contrastive space and the image-text matching head.

    config: the task's YAML as a dict; bert: the class of text_encoder, a BertModel or a module that holds one as .bert.
    """

    def __init__(self, config, bert, tokenizer=None):
        super().__init__()
        self.config = config
        self.bert_config = read_bert_config(config["bert_config"])
        width, vision_width = self.bert_config["hidden_size"], config["vision_width"]
        if self.bert_config["encoder_width"] != vision_width:
            raise InputError(
                f"vision_width {vision_width} differs from encoder_width {self.bert_config['encoder_width']} of "
                "bert_config: both are the width of the image embeddings, make them equal"
            )
        self.special_ids = SpecialIds()
        if tokenizer is not None:
            self.special_ids = SpecialIds(tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id)
        self.visual_encoder = build_vit(config, self.bert_config["initializer_range"])
        self.text_encoder = bert(self.bert_config)
        self.vision_proj = nn.Linear(vision_width, config["embed_dim"])
        self.text_proj = nn.Linear(width, config["embed_dim"])
        self.temp = nn.Parameter(torch.tensor(float(config["temp"])))
        self.itm_head = nn.Linear(width, 2)
        if config.get("gradient_checkpointing"):
            self.visual_encoder.set_grad_checkpointing()
            self.bert.gradient_checkpointing = True

    @property
    def bert(self):
        """The BertModel inside text_encoder."""
        return getattr(self.text_encoder, "bert", self.text_encoder)

    @property
    def bert_m(self):
        """The BertModel inside text_encoder_m."""
        return getattr(self.text_encoder_m, "bert", self.text_encoder_m)

    def add_momentum(self, *names):
        """Gives each named module a momentum copy `name_m` (Section 3.3)."""
        for name in names:
            self.add_module(f"{name}_m", copy.deepcopy(getattr(self, name)))
        copy_to_momentum_(self)

    def encode_image(self, image, momentum=False):
        """image [B, 3, H, W] -> image_embeds [B, 1+N, C] and image_feat [B, D], g_v(v_cls) normalized, float32."""
        encoder = self.visual_encoder_m if momentum else self.visual_encoder
        proj = self.vision_proj_m if momentum else self.vision_proj
        image_embeds = encoder.forward_features(image)
        return image_embeds, F.normalize(proj(image_embeds[:, 0]).float(), dim=-1)

    def encode_text(self, text, momentum=False):
        """text with input_ids [B, L] -> text_embeds [B, L, C] and text_feat [B, D], g_w(w_cls) normalized, float32."""
        bert = self.bert_m if momentum else self.bert
        proj = self.text_proj_m if momentum else self.text_proj
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return text_embeds, F.normalize(proj(text_embeds[:, 0]).float(), dim=-1)

    def fuse(self, text_embeds, attention_mask, image_embeds):
        """Multimodal encoder: text_embeds [B, L, C], attention_mask [B, L], image_embeds [B, 1+N, C] -> [B, L, C]."""
        return self.bert.fuse(text_embeds, attention_mask, self.bert.image_keys_values(image_embeds))

    def itm_logits(self, fused):
        """fused [B, L, C] -> logits [B, 2] from the [CLS] position: not matched, matched."""
        return self.itm_head(fused[:, 0])

    @torch.no_grad()
    def rerank(self, image_embeds, image_feat, text_embeds, text_feat, attention_mask, k, progress=iter, rows=256):
        """Matching scores of the k most similar candidates of every image and every text (Section 5, retrieval).

        image_embeds [NI, 1+N, C] and image_feat [NI, D]; text_embeds [NT, L, C], text_feat [NT, D], attention_mask
        [NT, L]. image_embeds and text_embeds may lie on any device, or be anything that an index or slice turns into
        such a tensor. The walk goes image by image over the union of both directions' candidates, so that an image's
        keys and values are computed once and a pair is scored once; texts of similar length share a pass of at most
        `rows` texts. In a process group the images are divided over the processes. progress wraps the range of images.

        Returns (scores_i2t [NI, NT], scores_t2i [NT, NI]), -100 where a pair is no candidate of that direction.
        """
        sim = feature_similarity(image_feat, text_feat)
        i2t = top_candidates(sim, k)
        t2i = top_candidates(sim.T, k).T
        lengths = attention_mask.sum(dim=1).tolist()
        scores = torch.full_like(sim, NO_CANDIDATE)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        candidates_of = (i2t | t2i).cpu()
        for image in progress(range(rank, sim.shape[0], world)):
            keys_values = self.bert.image_keys_values(image_embeds[image : image + 1].to(sim.device))
            candidates = sorted(candidates_of[image].nonzero().squeeze(1).tolist(), key=lengths.__getitem__)
            for start in range(0, len(candidates), rows):
                bucket = torch.tensor(candidates[start : start + rows])
                length = lengths[candidates[min(start + rows, len(candidates)) - 1]]
                embeds, mask = (x[bucket, :length].to(sim.device) for x in (text_embeds, attention_mask))
                fused = self.bert.fuse(embeds, mask, keys_values, cls_only=True)
                scores[image, bucket.to(sim.device)] = self.itm_logits(fused)[:, 1].float()
        if world > 1:
            dist.all_reduce(scores, op=dist.ReduceOp.MAX)
        return scores.masked_fill(~i2t, NO_CANDIDATE), scores.masked_fill(~t2i, NO_CANDIDATE).T


def feature_similarity(image_feat, text_feat):
    """s(I, T) of projected features: image_feat [NI, D], text_feat [NT, D] -> [NI, NT] in float32, also under autocast."""
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
    """Section 4: InfoNCE bounds the mutual information of image and text from below by log(candidates) - loss."""
    return math.log(candidates) - itc_onehot.detach()
