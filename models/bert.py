"""BERT with cross-attention to an image in its upper layers (Section 3.1, Figure 1).

Parameters have the names of Hugging Face's BertModel and the released ALBEF checkpoints.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.config import BertConfig

KeysValues = tuple[Tensor, Tensor]  # keys and values of attention, each [B, h, N, d]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor's matrix products: autocast's if it is on, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask of 0 and 1 to the mask that attention adds to its scores.

    Fused kernels on a GPU convert a bool mask in every layer and copy a mask whose rows do not
    begin at multiples of 8 numbers. Compiled layers are compiled again for another row stride.
    Therefore rows are allocated in multiples of 64 numbers.

    Args:
        allowed: Mask [..., N], bool or 0 and 1.
        dtype: Dtype of the scores.

    Returns:
        Mask [..., N], 0 where allowed and -inf elsewhere.
    """
    length = allowed.shape[-1]
    rows = torch.full(
        (*allowed.shape[:-1], length + -length % 64), -torch.inf, dtype=dtype, device=allowed.device
    )
    return rows[..., :length].masked_fill_(allowed.bool(), 0)


class Head(nn.Linear):
    """Linear layer [..., C_in] -> [..., C_out] in the dtype of its weights, also under autocast.

    The outputs rank candidates. In bf16, with 8 significant bits, different inputs would tie.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings."""

    position_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.word_pieces, width, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """Embed input_ids [B, L], the first one at position `start` -> [B, L, C]."""
        positions = self.position_embeddings.weight[start : start + input_ids.shape[1]]  # [L, C]
        embeds = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(embeds))


class MultiHeadAttention(nn.Module):
    """Projections to queries, keys and values, and fused attention."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.dropout_prob = config.attention_probs_dropout_prob

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, C] -> [B, h, L, d]

    def keys_values(self, source: Tensor) -> KeysValues:
        """Project source [B, N, source_width] to keys and values, each [B, h, N, d]."""
        return self._heads(self.key(source)), self._heads(self.value(source))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Compute softmax(query keys^T / sqrt(d) + mask) values.

        Args:
            query: Queries [B, h, L, d].
            keys: Keys [B, h, N, d].
            values: Values [B, h, N, d].
            mask: Additive mask, broadcastable to [B, h, L, N].

        Returns:
            Context [B, h, L, d].
        """
        dropout = self.dropout_prob if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout
        )


class SelfAttention(MultiHeadAttention):
    """Attention of a text's tokens to each other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        queries: int | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Attend from the first `queries` positions of hidden [B, L, C], by default all.

        Args:
            hidden: Hidden states [B, L, C].
            mask: Additive mask, broadcastable to [B, h, queries, L].
            queries: Number of positions to compute.
            keys_values: Keys and values of a longer text that ends with `hidden`. Default: those
                of `hidden`.

        Returns:
            Context [B, queries, C].
        """
        keys, values = keys_values or self.keys_values(hidden)
        context = self.attend(self._heads(self.query(hidden[:, :queries])), keys, values, mask)
        return context.transpose(1, 2).flatten(2)


class Source(NamedTuple):
    """Sources of the texts' cross-attention: images, or the states of questions.

    The last len(index) rows attend to the sources in `index`. The rows before them are groups of B
    rows: row i of each group attends to source i.
    """

    keys: Tensor  # [B, h, N, d]
    values: Tensor  # [B, h, N, d]
    index: Tensor | None = None  # [R']
    # additive; [B, 1, 1, N] if no row has an index, [R, 1, 1, N] if every row has one
    mask: Tensor | None = None


class CrossAttention(MultiHeadAttention):
    """Attention of texts to their sources. Several texts share a source without a copy."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.encoder_width)

    def forward(self, hidden: Tensor, source: Source) -> Tensor:
        """Attend from hidden [R, L, C] to the source of each row -> [R, L, C]."""
        query = self._heads(self.query(hidden))
        keys, values, index, mask = source
        rows, heads, length, dim = query.shape
        sources, indexed = keys.shape[0], 0 if index is None else index.shape[0]
        groups = (rows - indexed) // sources
        contexts = []
        if groups:
            # queries of one source side by side, so that its keys and values are visited once
            grouped = query[: rows - indexed].unflatten(0, (groups, sources))
            side_by_side = grouped.permute(1, 2, 0, 3, 4).flatten(2, 3)
            context = self.attend(side_by_side, keys, values, mask)  # [B, h, G * L, d]
            context = context.unflatten(2, (groups, length)).permute(2, 0, 3, 1, 4)
            contexts.append(context.reshape(-1, length, heads * dim))
        if index is not None:
            # the gradient of index_select is the same in every run on a CPU, and it is faster
            keys, values = keys.index_select(0, index), values.index_select(0, index)
            context = self.attend(query[rows - indexed :], keys, values, mask)
            contexts.append(context.transpose(1, 2).flatten(2))
        return torch.cat(contexts)


class ResidualOutput(nn.Module):
    """Dense layer and dropout, then LayerNorm of the sum with the residual."""

    def __init__(self, config: BertConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Normalize dense(hidden) [..., width_in] + residual [..., C] -> [..., C]."""
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Attention and its output layer, under the names of Hugging Face's BERT."""

    def __init__(self, config: BertConfig, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.self = attention
        self.output = ResidualOutput(config, config.hidden_size)


class Layer(nn.Module):
    """Self-attention, cross-attention in the multimodal layers, feed-forward (Figure 1)."""

    def __init__(self, config: BertConfig, cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(config, SelfAttention(config))
        if cross_attention:
            self.crossattention = Attention(config, CrossAttention(config))
        dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate = nn.Sequential(OrderedDict(dense=dense, gelu=nn.GELU()))
        self.output = ResidualOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        *,
        queries: int | None = None,
        keys_values: KeysValues | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """Compute hidden [R, L, C] -> [R, queries, C]; arguments as in both kinds of attention."""
        context = self.attention.self(hidden, mask, queries, keys_values)
        hidden = self.attention.output(context, hidden[:, :queries])
        if source is not None:
            context = self.crossattention.self(hidden, source)
            hidden = self.crossattention.output(context, hidden)
        return self.output(self.intermediate(hidden), hidden)


class Encoder(nn.Module):
    """The layers, under the name of Hugging Face's BERT."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, cross_attention=i >= config.fusion_layer)
            for i in range(config.num_hidden_layers)
        )


class TextRows(NamedTuple):
    """Texts for a pass of the multimodal encoder, each with its image.

    Attributes:
        text_embeds: Text embeddings [R, L, C].
        attention_mask: Mask of the tokens [R, L].
        image_index: Image of each text [R]. Default: text i has image i, or all texts have the
            only image.
        cls_only: Whether to compute the last layer for [CLS] alone.
    """

    text_embeds: Tensor
    attention_mask: Tensor
    image_index: Tensor | None = None
    cls_only: bool = False


class BertModel(nn.Module):
    """Text encoder, layers 0 .. fusion_layer - 1, and multimodal encoder, the other layers."""

    images_per_text = 1

    def __init__(self, config: BertConfig) -> None:
        """Build the layers with random weights.

        Args:
            config: Hugging Face's keys of BERT, fusion_layer, and encoder_width, the width of the
                image embeddings.
        """
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(lambda module: init_weights(module, config.initializer_range))

    @property
    def bert(self) -> "BertModel":
        """The model itself, under the name that it has in BertForMaskedLM."""
        return self

    def run(self, layer: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        """Call a layer, without keeping its activations if gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, **options)
        return layer(*inputs, **options)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode input_ids [B, L] with attention_mask [B, L] -> text_embeds [B, L, C]."""
        hidden = self.embeddings(input_ids)
        mask = additive_mask(attention_mask[:, None, None], compute_dtype(hidden))
        for layer in self.encoder.layer[: self.fusion_layer]:
            hidden = self.run(layer, hidden, mask)
        return hidden

    def image_keys_values(self, image_embeds: Tensor) -> list[KeysValues]:
        """Project image_embeds [B, 1+N, C] to the keys and values of each multimodal layer."""
        # cast once, or every layer would cast the embeddings and keep its own copy
        image_embeds = image_embeds.to(compute_dtype(image_embeds))
        return [
            layer.crossattention.self.keys_values(image_embeds)
            for layer in self.encoder.layer[self.fusion_layer :]
        ]

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_keys_values: Sequence[KeysValues],
        *,
        image_index: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """Fuse texts with their images by the multimodal encoder.

        Args:
            text_embeds: Text embeddings [R, L, C].
            attention_mask: Mask of the tokens [R, L].
            image_keys_values: Keys and values of the images, from `image_keys_values`.
            image_index: Image of each text [R]. Default: text i has image i, or all texts have the
                only image.
            cls_only: Whether to compute the last layer for [CLS] alone.

        Returns:
            Fused states [R, L, C], or [R, 1, C] if `cls_only`.
        """
        rows = TextRows(text_embeds, attention_mask, image_index, cls_only)
        return self.fuse_all([rows], image_keys_values)[0]

    def fuse_all(
        self, parts: Sequence[TextRows], image_keys_values: Sequence[KeysValues]
    ) -> list[Tensor]:
        """Fuse several sets of texts of equal length in one pass; see `fuse`.

        Args:
            parts: The sets of texts.
            image_keys_values: Keys and values of the images, from `image_keys_values`.

        Returns:
            Fused states of each set, as `fuse` returns them.
        """
        layers = self.encoder.layer[self.fusion_layer :]
        *lower, last = zip(layers, image_keys_values, strict=True)
        # Source expects rows with an index after the others
        order = sorted(range(len(parts)), key=lambda number: parts[number].image_index is not None)
        hidden = self._run_fusion(lower, [parts[number] for number in order], None)
        outputs: dict[int, Tensor] = {}
        for cls_only in (True, False):
            chosen = {
                number: parts[number]._replace(text_embeds=rows)
                for number, rows in zip(order, hidden, strict=True)
                if parts[number].cls_only == cls_only
            }
            if chosen:
                queries = 1 if cls_only else None
                fused = self._run_fusion([last], list(chosen.values()), queries)
                outputs.update(zip(chosen, fused, strict=True))
        return [outputs[number] for number in range(len(parts))]

    def _run_fusion(
        self,
        layers: Sequence[tuple[nn.Module, KeysValues]],
        parts: Sequence[TextRows],
        queries: int | None,
    ) -> tuple[Tensor, ...]:
        """Run multimodal layers, with the images' keys and values, over all sets of texts."""
        hidden = torch.cat([part.text_embeds for part in parts])
        allowed = torch.cat([part.attention_mask for part in parts])
        mask = additive_mask(allowed[:, None, None], compute_dtype(hidden))
        indices = [part.image_index for part in parts if part.image_index is not None]
        index = torch.cat(indices) if indices else None
        for layer, keys_values in layers:
            source = Source(*keys_values, index)
            hidden = self.run(layer, hidden, mask, queries=queries, source=source)
        return hidden.split([len(part.text_embeds) for part in parts])


class PredictionHead(nn.Module):
    """Vocabulary head, tied to the word embeddings: hidden [..., C] -> logits [..., V], float32."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.word_pieces))
        width = config.hidden_size
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transform = nn.Sequential(
            OrderedDict(dense=Head(width, width), gelu=nn.GELU(), LayerNorm=norm)
        )
        self.decoder = Head(width, config.word_pieces)
        self.transform.apply(lambda module: init_weights(module, config.initializer_range))
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the logits."""
        return self.decoder(self.transform(hidden))


class MaskedLMHead(nn.Module):
    """The vocabulary head, under the name of Hugging Face's BERT."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.predictions = PredictionHead(config, word_embeddings)


class BertForMaskedLM(nn.Module):
    """BertModel with the vocabulary head of masked language modeling."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.cls = MaskedLMHead(config, self.bert.embeddings.word_embeddings)


def init_weights(module: nn.Module, std: float) -> None:
    """Initialize as BERT: normal weights with standard deviation `std`, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
