"""Conversions: names of tensors in released and foreign files, and position embeddings of another grid."""

import re

import torch
import torch.nn.functional as F


def interpolate_pos_embed(pos_embed, tokens):
    """Position embeddings [1, 1+N, C] -> [1, tokens, C]: the square grid bicubically, the [CLS]
    position unchanged.
    """
    old, new = round((pos_embed.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat(
        [pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1
    )


def task_names(model, weights):
    """Return name in the model -> name in a file of another task that its weights are to come from,
    "" for none.

    - from pre-training, where text_encoder holds the bare BERT as bert: the prefix bert. is dropped
    - to VQA: the answer decoder's layers are the multimodal encoder's, its embeddings the text encoder's, its head the MLM
      head, the same for momentum
    - from one image to NLVR2: both blocks of a pair are the layer; the momentum model starts as a copy of the base
    """
    fusion = model.bert.fusion_layer
    to_decoder = not any(name.startswith("text_decoder.") for name in weights)
    last = re.compile(rf"text_encoder\..*\.layer\.{len(model.bert.encoder.layer) - 1}\.")
    to_pairs = hasattr(model.bert, "pair_keys_values") and not any(map(last.match, weights))

    def renumber(name, change):
        return re.sub(r"(?<=\.layer\.)\d+", lambda number: str(change(int(number[0]))), name)

    def source(name):
        if to_pairs and name.split(".")[0].endswith("_m"):
            return ""
        if to_decoder and name.startswith("text_decoder"):
            name = renumber(name, lambda layer: fusion + layer).replace(
                "text_decoder", "text_encoder", 1
            )
        if to_pairs:
            name = renumber(
                name, lambda block: block if block < fusion else fusion + (block - fusion) // 2
            )
        with_bert = re.sub(r"^(text_encoder(_m)?\.)(bert\.)?", r"\1bert.", name)
        without = re.sub(r"^(text_encoder(_m)?\.)bert\.", r"\1", name)
        return next((known for known in (name, with_bert, without) if known in weights), name)

    return {name: source(name) for name in model.state_dict()}


def bert_names(model, weights):
    """Return name in the pre-training model -> name in a file of Hugging Face's BERT, with or
    without its prefix bert.

    Files from before 2019 call the weight and bias of LayerNorm gamma and beta; files may lack the
    names of tied weights.
    """
    known = {}
    for old in weights:
        name = old.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        known[
            "text_encoder."
            + ("bert." if name.startswith(("embeddings.", "encoder.")) else "")
            + name
        ] = old
    head = "text_encoder.cls.predictions."
    twins = {
        "decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
        "decoder.bias": f"{head}bias",
    }
    for name, twin in twins.items():
        if twin in known:
            known.setdefault(head + name, known[twin])
    return {
        name: known.get(name, name)
        for name in model.state_dict()
        if name.startswith("text_encoder.")
    }
