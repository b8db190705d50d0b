"""The answer decoder of VQA (Section 5): causal BERT layers that attend to the states of a
question.
"""

import torch

from models.bert import BertForMaskedLM, additive_mask, compute_dtype


class AnswerDecoder(BertForMaskedLM):
    """Answer decoder: the layers of the multimodal encoder, which initializes them, and the
    vocabulary head.

    The state dict has the names of a pre-training text_encoder, with layers counted from 0.
    """

    def __init__(self, config):
        depth = config["num_hidden_layers"] - config["fusion_layer"]
        width = config["hidden_size"]
        super().__init__(
            {**config, "num_hidden_layers": depth, "fusion_layer": 0, "encoder_width": width}
        )

    def forward(self, input_ids, keys_values, attention_mask, past=None, question=None):
        """Hidden states of tokens that follow a `past`.

        input_ids [R, L]; keys_values: of the states of Q questions, from `bert.image_keys_values`;
        attention_mask [Q, Lq]: their tokens; past: for each layer the self-attention's keys and
        values of what comes before, each [R, h, P, d]; question [R]: the question of each row, or
        None where the rows are whole groups of Q. Padding at the end does no harm, as nothing
        before it attends to it. Returns hidden states [R, L, C] and the past of the next call.
        """
        before = past[0][0].shape[2] if past else 0
        length = input_ids.shape[1]
        hidden = self.bert.embeddings(input_ids, before)
        dtype = compute_dtype(hidden)
        causal = additive_mask(
            torch.ones(length, before + length, device=input_ids.device).tril(before), dtype
        )
        of_rows = attention_mask if question is None else attention_mask[question]
        mask = additive_mask(of_rows[:, None, None], dtype)
        following = []
        for number, (layer, (keys, values)) in enumerate(
            zip(self.bert.encoder.layer, keys_values, strict=True)
        ):
            own = layer.attention.self.keys_values(hidden)
            if past:
                own = tuple(torch.cat(both, dim=2) for both in zip(past[number], own))
            hidden = self.bert.run(layer, hidden, causal, None, keys, values, question, mask, own)
            following.append(own)
        return hidden, following
