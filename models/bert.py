"""BERT as ALBEF uses it (Section 3.1): the lower layers encode text, the upper ones fuse it with an
image by cross-attention.

Parameter names are those of Hugging Face's BertModel and of the released ALBEF checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def compute_dtype(tensor):
    """Return the dtype of a tensor's matrix products: autocast's if it is on, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def additive_mask(allowed, dtype):
    """What attention adds to its scores: allowed [..., N], bool or 0 and 1 -> 0 where allowed and
    -inf elsewhere.

    Built once for all layers: fused kernels on a GPU would convert a bool mask in every layer, and
    copy one whose rows do not begin at multiples of 8 numbers. Compiled layers would be compiled
    again for rows at another distance: up to 63 tokens it is the same.
    """
    length = allowed.shape[-1]
    rows = torch.full(
        (*allowed.shape[:-1], length + -length % 64), -torch.inf, dtype=dtype, device=allowed.device
    )
    return rows[..., :length].masked_fill_(allowed.bool(), 0)


class Head(nn.Linear):
    """Compute a linear layer in the dtype of its weights, also under autocast: [..., C_in] -> [...,
    C_out].

    Its outputs rank candidates. Rounded to bf16, which has 8 significant bits, the scores of
    different inputs would tie.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings: input_ids [B, L], the first at position `start` ->
    [B, L, C].
    """

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(
            config["vocab_size"], width, padding_idx=config.get("pad_token_id", 0)
        )
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.register_buffer("position_ids", torch.arange(config["max_position_embeddings"])[None])

    def forward(self, input_ids, start=0):
        positions = self.position_embeddings.weight[start : start + input_ids.shape[1]]  # [L, C]
        embeds = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(embeds))


class MultiHeadAttention(nn.Module):
    """Query, key and value projections around fused attention; keys and values may come from
    another width.
    """

    def __init__(self, config, source_width):
        super().__init__()
        width = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.dropout_prob = config["attention_probs_dropout_prob"]

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, C] -> [B, h, L, d]

    def keys_values(self, source):
        """source [B, N, source_width] -> keys and values, each [B, h, N, d]."""
        return self._heads(self.key(source)), self._heads(self.value(source))

    def attend(self, query, keys, values, mask=None):
        """query [B, h, L, d], keys and values [B, h, N, d], additive mask broadcastable to [B, h,
        L, N] -> [B, h, L, d].
        """
        dropout = self.dropout_prob if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout
        )

    def forward(self, hidden, mask, queries=None, keys_values=None):
        """Self-attention of the first `queries` positions, all by default -> [B, queries, C].

        hidden [B, L, C]; mask additive, broadcastable to [B, h, queries, L]; keys_values: of a
        longer text that hidden ends, by default hidden's own.
        """
        keys, values = keys_values or self.keys_values(hidden)
        context = self.attend(self._heads(self.query(hidden[:, :queries])), keys, values, mask)
        return context.transpose(1, 2).flatten(2)

    def cross(self, hidden, keys, values, extra_index, mask=None):
        """Cross-attention of R text rows to B sources (images) without copying a source's keys and
        values for its rows.

        hidden [R, L, C]; keys, values [B, h, N, d]. The last len(extra_index) rows attend to the
        sources that extra_index names. The rows before them are whole groups of B, row i of a group
        attending to source i: their queries are laid side by side, so that each source is visited
        once for all its rows. mask: additive, where all rows are of one kind: [B, 1, 1, N] for
        groups, [R, 1, 1, N] for rows that extra_index names.
        """
        query = self._heads(self.query(hidden))
        rows, heads, length, dim = query.shape
        sources = keys.shape[0]
        extra = 0 if extra_index is None else extra_index.shape[0]
        groups = (rows - extra) // sources
        contexts = []
        if groups:
            side_by_side = (
                query[: rows - extra]
                .unflatten(0, (groups, sources))
                .permute(1, 2, 0, 3, 4)
                .flatten(2, 3)
            )
            context = self.attend(side_by_side, keys, values, mask)  # [B, h, G * L, d]
            context = context.unflatten(2, (groups, length)).permute(2, 0, 3, 1, 4)
            contexts.append(context.reshape(-1, length, heads * dim))
        if extra:
            # index_select: its gradient is the same in every run on a CPU, and faster than that of
            # indexing
            keys, values = keys.index_select(0, extra_index), values.index_select(0, extra_index)
            context = self.attend(query[rows - extra :], keys, values, mask)
            contexts.append(context.transpose(1, 2).flatten(2))
        return torch.cat(contexts)


class ResidualOutput(nn.Module):
    """Dense, dropout, then LayerNorm of the sum with the residual (BERT normalizes after the sum)."""

    def __init__(self, config, width_in):
        super().__init__()
        self.dense = nn.Linear(width_in, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, hidden, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Attention and what follows it, under the names of Hugging Face's BERT: self, output."""

    def __init__(self, config, source_width):
        super().__init__()
        self.self = MultiHeadAttention(config, source_width)
        self.output = ResidualOutput(config, config["hidden_size"])


class Intermediate(nn.Module):
    """The first half of the feed-forward part: hidden [..., C] -> [..., intermediate_size]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config["hidden_size"], config["intermediate_size"])

    def forward(self, hidden):
        return F.gelu(self.dense(hidden))


class Layer(nn.Module):
    """Self-attention, cross-attention to an image in the multimodal layers, feed-forward (Figure
    1).

    In the answer decoder cross-attention is to the states of a question.
    """

    def __init__(self, config, cross_attention):
        super().__init__()
        self.attention = Attention(config, config["hidden_size"])
        if cross_attention:
            self.crossattention = Attention(config, config["encoder_width"])
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config["intermediate_size"])

    def forward(
        self,
        hidden,
        mask,
        queries=None,
        cross_keys=None,
        cross_values=None,
        extra_index=None,
        cross_mask=None,
        keys_values=None,
    ):
        """hidden [R, L, C] -> [R, L, C], or [R, queries, C] where only the first `queries`
        positions are wanted.
        """
        hidden = self.attention.output(
            self.attention.self(hidden, mask, queries, keys_values), hidden[:, :queries]
        )
        if cross_keys is not None:
            context = self.crossattention.self.cross(
                hidden, cross_keys, cross_values, extra_index, cross_mask
            )
            hidden = self.crossattention.output(context, hidden)
        return self.output(self.intermediate(hidden), hidden)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, cross_attention=i >= config["fusion_layer"])
            for i in range(config["num_hidden_layers"])
        )


class BertModel(nn.Module):
    """Layers 0 .. fusion_layer - 1 are the text encoder, the rest the multimodal encoder.

    config: the Hugging Face keys plus fusion_layer and encoder_width (the width of the image
    embeddings).
    """

    def __init__(self, config):
        super().__init__()
        self.fusion_layer = config["fusion_layer"]
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(lambda module: init_weights(module, config["initializer_range"]))

    def run(self, layer, *inputs):
        """layer(*inputs), without keeping its activations where gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def encode_text(self, input_ids, attention_mask):
        """input_ids, attention_mask [B, L] -> text_embeds [B, L, C]."""
        hidden = self.embeddings(input_ids)
        mask = additive_mask(attention_mask[:, None, None], compute_dtype(hidden))
        for layer in self.encoder.layer[: self.fusion_layer]:
            hidden = self.run(layer, hidden, mask)
        return hidden

    def image_keys_values(self, image_embeds):
        """image_embeds [B, 1+N, C] -> for each multimodal layer the image's keys and values, each
        [B, h, 1+N, d].
        """
        # or every layer would cast them anew and keep its own copy
        image_embeds = image_embeds.to(compute_dtype(image_embeds))
        return [
            layer.crossattention.self.keys_values(image_embeds)
            for layer in self.encoder.layer[self.fusion_layer :]
        ]

    def fuse(
        self, text_embeds, attention_mask, image_keys_values, extra_index=None, cls_only=False
    ):
        """The multimodal encoder over R text rows and B images.

        text_embeds [R, L, C], attention_mask [R, L], image_keys_values from `image_keys_values`.
        The last len(extra_index) rows attend to the images that extra_index [R'] names, the rows
        before them are whole groups of B rows, row i of each group with image i. Returns [R, L, C];
        with cls_only [R, 1, C], the last layer being computed for [CLS] alone.
        """
        layers = self.encoder.layer[self.fusion_layer :]
        return self._fuse(
            layers,
            text_embeds,
            attention_mask,
            image_keys_values,
            extra_index,
            1 if cls_only else None,
        )

    def _fuse(self, layers, hidden, attention_mask, image_keys_values, extra_index, last_queries):
        mask = additive_mask(attention_mask[:, None, None], compute_dtype(hidden))
        for number, (layer, (keys, values)) in enumerate(
            zip(layers, image_keys_values, strict=True), 1
        ):
            queries = last_queries if number == len(layers) else None
            hidden = self.run(layer, hidden, mask, queries, keys, values, extra_index)
        return hidden

    def fuse_matched_and_masked(
        self, matched, matched_mask, masked, masked_mask, image_keys_values, extra_index
    ):
        """One pass of the multimodal encoder for rows of which only [CLS] is wanted (matched) and
        rows wanted whole (masked).

        matched [R, L, C] as in `fuse` with extra_index; masked [B, L, C], row i with image i, or no
        rows at all. The two part ways in the last layer alone. Returns [R, C] and [B, L, C].
        """
        *lower, last = self.encoder.layer[self.fusion_layer :]
        extra = extra_index.shape[0]
        split = [len(matched) - extra, len(masked), extra]
        rows = torch.cat([matched[: split[0]], masked, matched[split[0] :]])
        masks = torch.cat([matched_mask[: split[0]], masked_mask, matched_mask[split[0] :]])
        hidden = self._fuse(lower, rows, masks, image_keys_values[:-1], extra_index, None)
        grouped, masked, extra_rows = hidden.split(split)
        matched = torch.cat([grouped, extra_rows])
        matched = self._fuse([last], matched, matched_mask, image_keys_values[-1:], extra_index, 1)
        if len(masked):
            masked = self._fuse([last], masked, masked_mask, image_keys_values[-1:], None, None)
        return matched[:, 0], masked


class PredictionTransform(nn.Module):
    """Dense, GELU, LayerNorm before the vocabulary: hidden [..., C] -> [..., C]."""

    def __init__(self, config):
        super().__init__()
        self.dense = Head(config["hidden_size"], config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])

    def forward(self, hidden):
        return self.LayerNorm(F.gelu(self.dense(hidden)))


class PredictionHead(nn.Module):
    """Compute vocabulary logits [..., V] in float32 from hidden [..., C]; the decoder's weight is
    the word embedding.
    """

    def __init__(self, config, word_embeddings):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config["vocab_size"]))
        self.transform = PredictionTransform(config)
        self.decoder = Head(config["hidden_size"], config["vocab_size"])
        self.transform.apply(lambda module: init_weights(module, config["initializer_range"]))
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, hidden):
        return self.decoder(self.transform(hidden))


class MaskedLMHead(nn.Module):
    """The vocabulary head under the name of Hugging Face's BERT: predictions."""

    def __init__(self, config, word_embeddings):
        super().__init__()
        self.predictions = PredictionHead(config, word_embeddings)


class BertForMaskedLM(nn.Module):
    """BertModel with the vocabulary head of masked language modeling."""

    def __init__(self, config):
        super().__init__()
        self.bert = BertModel(config)
        self.cls = MaskedLMHead(config, self.bert.embeddings.word_embeddings)


def init_weights(module, std):
    """BERT's initialization: normal weights, zero biases, unit LayerNorm."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
