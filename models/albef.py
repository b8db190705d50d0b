"""What every ALBEF model shares (Section 3.1): image, text and multimodal encoders, and their
momentum copies.
"""

import copy
from typing import NamedTuple

from torch import nn

from configs.schema import read_bert_config
from models.momentum import copy_to_momentum_
from models.vit import build_vit
from utils import InputError


class SpecialIds(NamedTuple):
    """Token ids that the models need to know; the defaults are BERT's."""

    pad: int = 0
    cls: int = 101
    mask: int = 103
    eos: int = 102  # what ends an answer


def check_objectives(key: str, named: bool | list[str], known: list[str]) -> None:
    """Raise InputError for objectives that a task does not have. key: the configuration key that
    names them.
    """
    others = [name for name in named if name not in known] if isinstance(named, list) else []
    if others:
        remedy = (
            f"in this task it may name {', '.join(known)}"
            if known
            else "this task has one loss, set true or false"
        )
        raise InputError(f"{key} names {', '.join(others)}: {remedy}")


class ALBEF(nn.Module):
    """Image encoder, text encoder and multimodal encoder.

    config: the task's YAML as a dict; bert: the class of text_encoder, a BertModel or a module that
    holds one as .bert.
    """

    def __init__(self, config, bert, tokenizer=None):
        super().__init__()
        self.config = config
        self.bert_config = read_bert_config(config["bert_config"])
        if self.bert_config["vocab_size"] == "auto":
            raise InputError(
                "bert_config: vocab_size is auto: let models.tokenizer.tokenizer_of(config) set it"
            )
        vision_width = config["vision_width"]
        if self.bert_config["encoder_width"] != vision_width:
            raise InputError(
                f"vision_width {vision_width} differs from encoder_width {self.bert_config['encoder_width']} of "
                "bert_config: both are the width of the image embeddings, make them equal"
            )
        self.special_ids, self.vocabulary = SpecialIds(), None
        if tokenizer is not None:
            self.vocabulary = tokenizer.backend_tokenizer.to_str()  # goes into checkpoints
            self.special_ids = SpecialIds(
                tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id
            )
        self.visual_encoder = build_vit(config, self.bert_config["initializer_range"])
        self.text_encoder = bert(self.bert_config)
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
        """Give each named module a momentum copy `name_m` (Section 3.3)."""
        for name in names:
            self.add_module(f"{name}_m", copy.deepcopy(getattr(self, name)))
        copy_to_momentum_(self)

    def fuse(self, text_embeds, attention_mask, image_embeds):
        """Multimodal encoder: text_embeds [B, L, C], attention_mask [B, L], image_embeds [B, 1+N,
        C] -> [B, L, C].
        """
        return self.bert.fuse(
            text_embeds, attention_mask, self.bert.image_keys_values(image_embeds)
        )

    def idle_parameters(self):
        """Return parameters that no loss reaches; training leaves them out, so that data
        parallelism does not wait for them.
        """
        return []

    def prepare(self, batch):
        """A batch of the data set with what a step draws on the host: there the number of masked
        tokens asks no device.
        """
        return batch

    def extra_metrics(self):
        """Return tensors worth logging beside the losses, by name, of the last step."""
        return {}
