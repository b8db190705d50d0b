"""Answer decoder of VQA (Section 5): causal BERT layers that attend to the states of a question."""

from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from configs.config import BertConfig
from models.bert import BertForMaskedLM, KeysValues, Source, additive_mask, compute_dtype


class AnswerDecoder(BertForMaskedLM):
    """Decoder with the layers of the multimodal encoder and the vocabulary head.

    The state dict has the names of a pre-training text_encoder, with layers counted from 0.
    """

    def __init__(self, config: BertConfig) -> None:
        depth = config.num_hidden_layers - config.fusion_layer
        super().__init__(
            replace(
                config, num_hidden_layers=depth, fusion_layer=0, encoder_width=config.hidden_size
            )
        )

    def forward(
        self,
        input_ids: Tensor,
        keys_values: Sequence[KeysValues],
        attention_mask: Tensor,
        *,
        past: Sequence[KeysValues] | None = None,
        question: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Compute hidden states of tokens that follow a `past`.

        Padding at the end is harmless, because no token before it attends to it.

        Args:
            input_ids: Tokens [R, L].
            keys_values: Keys and values of the states of Q questions, from
                `bert.image_keys_values`.
            attention_mask: Mask of the questions' tokens [Q, Lq].
            past: For each layer the keys and values [R, h, P, d] of the tokens before.
            question: Question of each row [R]. Default: row i has question i, or all rows have
                the only question.

        Returns:
            Hidden states [R, L, C] and the past of the next call.
        """
        before = past[0][0].shape[2] if past else 0
        length = input_ids.shape[1]
        hidden = self.bert.embeddings(input_ids, before)
        dtype = compute_dtype(hidden)
        allowed = torch.ones(length, before + length, device=input_ids.device).tril(before)
        causal = additive_mask(allowed, dtype)
        of_rows = attention_mask if question is None else attention_mask[question]
        mask = additive_mask(of_rows[:, None, None], dtype)
        following = []
        layers = zip(self.bert.encoder.layer, keys_values, strict=True)
        for number, (layer, (keys, values)) in enumerate(layers):
            own: KeysValues = layer.attention.self.keys_values(hidden)
            if past:
                pairs = zip(past[number], own, strict=True)
                own_keys, own_values = (torch.cat(pair, dim=2) for pair in pairs)
                own = own_keys, own_values
            source = Source(keys, values, question, mask)
            hidden = self.bert.run(layer, hidden, causal, keys_values=own, source=source)
            following.append(own)
        return hidden, following
