"""Base class of all models: image, text and multimodal encoders, momentum copies (Section 3)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from configs.config import BertConfig, Config
from models.bert import BertForMaskedLM, BertModel
from models.momentum import copy_to_momentum_
from models.tokenizer import Tokenizer
from models.vit import build_vit
from utils import InputError


class SpecialIds(NamedTuple):
    """Ids of special tokens, by default BERT's."""

    pad: int = 0
    cls: int = 101
    mask: int = 103
    eos: int = 102  # end of an answer


class Ranking(msgspec.Struct, frozen=True):
    """The ranking that a validation measured to be better, as checkpoints keep it.

    Attributes:
        by: "itc" for similarity alone, "itm" for the matching head on the k most similar.
        k: Number of candidates that were re-ranked.
        itc: Mean recall by ITC in percent.
        itm: Mean recall by ITM in percent.
    """

    by: Literal["itc", "itm"]
    k: int
    itc: float
    itm: float


def check_objectives(key: str, named: bool | Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError if the configuration key names an objective that the task does not have."""
    unknown = [] if isinstance(named, bool) else [name for name in named if name not in known]
    if unknown:
        remedy = "this task has only one loss; set true or false"
        if known:
            remedy = f"this task has only {', '.join(known)}; remove the other names"
        raise InputError(f"{key} names {', '.join(unknown)}, but {remedy}")


class ALBEF(nn.Module):
    """Image encoder, text encoder and multimodal encoder.

    `forward(batch, alpha=..., update_momentum=...)` of a model takes a batch of its data set, and
    `losses` the tensors of a batch. Both return losses by name.
    """

    task: str  # set by build_model
    pretrained: Sequence[str] = ()  # names of parameters that a run began with weights for
    ranking: Ranking | None = None  # of the last validation, see evaluation.retrieval
    text_encoder: BertModel | BertForMaskedLM
    # of a model with momentum copies
    visual_encoder_m: VisionTransformer
    text_encoder_m: BertModel | BertForMaskedLM

    def __init__(
        self,
        config: Config,
        bert: Callable[[BertConfig], BertModel | BertForMaskedLM],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Build the encoders with random weights.

        Args:
            config: Configuration of the task.
            bert: Class of the text encoder, BertModel or BertForMaskedLM.
            tokenizer: Source of the special token ids, by default BERT's.

        Raises:
            InputError: The configuration does not fit.
        """
        super().__init__()
        self.config = config
        self.bert_config = config.bert
        if self.bert_config.vocab_size == "auto":
            raise InputError(
                "bert_config: vocab_size is auto; call models.tokenizer.load_tokenizer(config),"
                " which sets it"
            )
        vision_width, encoder_width = config.vision_width, self.bert_config.encoder_width
        if encoder_width != vision_width:
            raise InputError(
                f"vision_width {vision_width} differs from encoder_width {encoder_width} of "
                "bert_config; make them equal, because both are the width of the image embeddings"
            )
        self.special_ids, self.vocabulary = SpecialIds(), None
        if tokenizer is not None:
            self.vocabulary = tokenizer.backend_tokenizer.to_str()  # saved in checkpoints
            self.special_ids = SpecialIds(
                tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id
            )
        self.visual_encoder = build_vit(config, self.bert_config.initializer_range)
        self.text_encoder = bert(self.bert_config)
        if config.gradient_checkpointing:
            self.visual_encoder.set_grad_checkpointing()
            self.bert.gradient_checkpointing = True

    @property
    def bert(self) -> BertModel:
        """The BertModel of text_encoder."""
        return self.text_encoder.bert

    @property
    def bert_m(self) -> BertModel:
        """The BertModel of text_encoder_m."""
        return self.text_encoder_m.bert

    def add_momentum(self, *names: str) -> None:
        """Give each named module X a momentum copy X_m (Section 3.3)."""
        for name in names:
            self.add_module(f"{name}_m", copy.deepcopy(getattr(self, name)))
        copy_to_momentum_(self)

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Fuse texts with their images by the multimodal encoder.

        Args:
            text_embeds: Text embeddings [B, L, C].
            attention_mask: Mask of the tokens [B, L].
            image_embeds: Image embeddings [B, 1+N, C].

        Returns:
            Fused states [B, L, C].
        """
        keys_values = self.bert.image_keys_values(image_embeds)
        return self.bert.fuse(text_embeds, attention_mask, keys_values)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that no loss reaches.

        They are not trained, because DistributedDataParallel waits for the gradient of every
        trained parameter.
        """
        return []

    def prepare(self, batch: Any) -> Any:
        """Add random draws to a batch on the host, so that a step does not wait for the device."""
        return batch

    def extra_metrics(self) -> dict[str, Tensor]:
        """Return tensors of the last step to log beside the losses, by name."""
        return {}
