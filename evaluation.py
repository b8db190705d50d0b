"""Evaluation of trained models: zero-shot and fine-tuned image-text retrieval (Section 5)."""

import sys

import torch
from tqdm import tqdm

from dataset import test_loader
from dataset.transforms import normalize
from metrics import recall_at_k
from models.albef import Text
from utils import is_main


def _bar(iterable, what):
    return tqdm(iterable, desc=what, leave=False, disable=not is_main(), file=sys.stdout, dynamic_ncols=True, mininterval=1)


@torch.no_grad()
def encode_images(model, dataset, config, device):
    """All images of a data set -> image_embeds [NI, 1+N, C] and image_feat [NI, D]."""
    embeds, feats = [], []
    for image in _bar(test_loader(dataset, config, device), "images"):
        image_embeds, image_feat = model.encode_image(normalize(image.to(device, non_blocking=True)))
        embeds.append(image_embeds)
        feats.append(image_feat)
    return torch.cat(embeds), torch.cat(feats)


@torch.no_grad()
def encode_texts(model, texts, tokenizer, config, device, max_tokens=30):
    """texts -> text_embeds [NT, L, C], text_feat [NT, D] and attention_mask [NT, L], L at most max_tokens."""
    tokens = tokenizer(texts, padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens = Text(tokens["input_ids"], tokens["attention_mask"]).to(device)
    parts = [range(i, min(i + 256, len(texts))) for i in range(0, len(texts), 256)]
    embeds, feats = zip(*(
        model.encode_text(Text(*(x[part.start : part.stop] for x in tokens))) for part in _bar(parts, "texts")
    ))  # fmt: skip
    return torch.cat(embeds), torch.cat(feats), tokens.attention_mask


@torch.no_grad()
def evaluate_retrieval(model, dataset, tokenizer, config, device):
    """Ranks a RetrievalTestSet by ITC, then its k_test best candidates by ITM.

    Returns (metrics, rankings): metrics has recall_at_k's numbers after re-ranking, and with the prefix itc_ those before;
    rankings as the function of that name gives them.
    """
    model.eval()
    image_embeds, image_feat = encode_images(model, dataset, config, device)
    text_embeds, text_feat, mask = encode_texts(model, dataset.texts, tokenizer, config, device)
    scores_i2t, scores_t2i = model.rerank(
        image_embeds, image_feat, text_embeds, text_feat, mask, config["k_test"],
        progress=lambda images: _bar(images, "re-ranking"),
    )  # fmt: skip
    sim = image_feat @ text_feat.T
    itc = recall_at_k(sim.cpu(), sim.T.cpu(), dataset.txt2img, dataset.img2txt)
    metrics = recall_at_k(scores_i2t.cpu(), scores_t2i.cpu(), dataset.txt2img, dataset.img2txt)
    metrics.update({f"itc_{name}": value for name, value in itc.items()})
    return metrics, rankings(scores_i2t, scores_t2i, dataset)


def rankings(scores_i2t, scores_t2i, dataset, top=10):
    """For each query of both directions its `top` best candidates with scores, as result/retrieval.json holds them."""
    def best(scores, key, names, is_hit):
        values, indices = scores.topk(min(top, scores.shape[1]), dim=1)
        return [
            [{key: names[i], "score": round(v, 4), "hit": is_hit(query, i)} for i, v in zip(row_i, row_v)]
            for query, (row_i, row_v) in enumerate(zip(indices.tolist(), values.tolist()))
        ]  # fmt: skip

    texts = best(scores_i2t, "caption", dataset.texts, lambda image, text: dataset.txt2img[text] == image)
    images = best(scores_t2i, "image", dataset.images, lambda text, image: dataset.txt2img[text] == image)
    return {
        "image_to_text": [{"image": image, "results": row} for image, row in zip(dataset.images, texts)],
        "text_to_image": [{"caption": text, "results": row} for text, row in zip(dataset.texts, images)],
    }
