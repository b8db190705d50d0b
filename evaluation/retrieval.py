"""Image-text retrieval with a trained model (Section 5): encoding, re-ranking, recall, rankings,
tables.
"""

import torch
import torch.distributed as dist

from dataset.loading import to_device
from dataset.text import MAX_TOKENS, tokenize
from engine import autocast
from evaluation.divide import divide, progress_bar
from evaluation.metrics import chance_recall, recall_at_k
from models.contrastive import NO_CANDIDATE, feature_similarity, top_candidates
from utils import Text, is_distributed, world_size

TABLE = ["txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"]


class ImageEmbeds:
    """The embeddings of this process's images, every world_size-th of a data set, as model.rerank
    slices them.

    They wait in the host's memory, or with keep=False are computed anew, a batch at a time.
    """

    def __init__(self, model, dataset, config, device):
        self.keep = config["image_embeds"] == "host"
        self._model, self._dataset, self._device = model, dataset, device
        self._kept, self._batch_size = [], config["batch_size_test"]
        self._recomputed = None, None  # number of a batch, its embeddings

    def encode(self, image):
        """image [B, 3, H, W] on the device -> embeddings and features there; keeps the embeddings
        on the host.
        """
        embeds, feat = self._model.encode_image(image)
        if torch.is_autocast_enabled(self._device.type):
            # as the keys and values take them anyway
            embeds = embeds.to(torch.get_autocast_dtype(self._device.type))
        if self.keep:
            self._kept.append(embeds.cpu())
        return embeds, feat

    def __getitem__(self, key):
        """The embeddings [1, 1+N, C] of one image, key a slice of one number; on the host or the
        device.
        """
        batch, place = divmod(key.start // world_size(), self._batch_size)
        if self.keep:
            return self._kept[batch][place : place + 1]
        if self._recomputed[0] != batch:
            first = key.start - place * world_size()
            numbers = range(first, len(self._dataset), world_size())[: self._batch_size]
            image = torch.stack([self._dataset[number] for number in numbers])
            self._recomputed = batch, self.encode(to_device(image, self._device))[0]
        return self._recomputed[1][place : place + 1]


@torch.no_grad()
def encode_images(model, dataset, config, device):
    """A data set's images, divided over the processes -> ImageEmbeds and the image_feat [NI, D] of
    all.
    """
    image_embeds = ImageEmbeds(model, dataset, config, device)
    image_feat = torch.zeros(len(dataset), config["embed_dim"], device=device)
    for indices, image in divide(dataset, config, device, "images"):
        image_feat[indices] = image_embeds.encode(image)[1]
    if is_distributed():
        dist.all_reduce(image_feat)
    return image_embeds, image_feat


@torch.no_grad()
def encode_texts(model, texts, tokenizer, config, device):
    """Encode texts -> text_embeds [NT, L, C], text_feat [NT, D] and attention_mask [NT, L] on the
    device.
    """
    tokens = tokenize(texts, tokenizer, config["max_tokens"] or MAX_TOKENS).to(device)
    lengths = tokens.attention_mask.sum(dim=1)
    # texts of one length go together, so that padding costs next to nothing
    order = lengths.argsort(stable=True)
    text_embeds, text_feat = None, torch.empty(len(texts), config["embed_dim"], device=device)
    for start in progress_bar(range(0, len(texts), 256), "texts"):
        part = order[start : start + 256]
        length = int(lengths[part[-1]])
        embeds, feat = model.encode_text(
            Text(tokens.input_ids[part, :length], tokens.attention_mask[part, :length])
        )
        if text_embeds is None:
            text_embeds = embeds.new_zeros(*tokens.input_ids.shape, embeds.shape[-1])
        text_embeds[part, :length] = embeds
        text_feat[part] = feat
    return text_embeds, text_feat, tokens.attention_mask


@torch.no_grad()
def evaluate(model, dataset, tokenizer, config, device, report=None, ks=None):
    """Rank a RetrievalTestSet by ITC, then the k best candidates of each query by ITM, for every k
    of ks (Table 6).

    ks: default [k_test]; several values share all encodings and scores. Return the metrics of
    recall_at_k after re-ranking: for the largest k without prefix, for another k with a prefix such
    as k16_, and for ITC alone with itc_. Report a table and, for the largest k,
    result/retrieval.json. Raises NotFinite, on all processes.
    """
    model.eval()
    ks = sorted(ks or [config["k_test"]])
    with autocast(config, device):
        image_embeds, image_feat = encode_images(model, dataset, config, device)
        text_embeds, text_feat, mask = encode_texts(model, dataset.texts, tokenizer, config, device)
        sim = feature_similarity(image_feat, text_feat)
        metrics = {0: recall_at_k(sim.cpu(), sim.T.cpu(), dataset.txt2img, dataset.img2txt)}
        scores_i2t, scores_t2i = model.rerank(
            image_embeds,
            image_feat,
            text_embeds,
            text_feat,
            mask,
            ks[-1],
            progress=lambda images: progress_bar(images, "re-ranking"),
        )
    for k in ks:
        i2t = scores_i2t.masked_fill(~top_candidates(sim, k), NO_CANDIDATE)
        t2i = scores_t2i.masked_fill(~top_candidates(sim.T, k), NO_CANDIDATE)
        metrics[k] = recall_at_k(i2t.cpu(), t2i.cpu(), dataset.txt2img, dataset.img2txt)
    if report:
        report.write("retrieval.json", rankings(scores_i2t, scores_t2i, dataset))
        kind = "zero-shot retrieval" if model.task == "pretrain" else "retrieval"
        print_table(f"{kind}, {report.title}", metrics, dataset)
    prefixes = {k: f"k{k}_" for k in ks} | {ks[-1]: "", 0: "itc_"}
    return {
        prefixes[k] + name: value for k, values in metrics.items() for name, value in values.items()
    }


def print_table(title, metrics, dataset):
    """Print the recall of ITC alone, metrics[0], and after ITM re-ranking, by k, beside what chance
    would give.
    """
    print(f"{title}, {len(dataset.images)} images and {len(dataset.texts)} texts, percent")
    print(f"{'':16}" + "".join(f"{name:>9}" for name in TABLE))
    chance = chance_recall(len(dataset.images), len(dataset.texts), dataset.img2txt)
    rows = {
        "ITC": metrics[0],
        **{f"ITC + ITM, k {k}": metrics[k] for k in metrics if k},
        "chance": chance,
    }
    for label, values in rows.items():
        print(f"{label:16}" + "".join(f"{values[name]:9.1f}" for name in TABLE))


def rankings(scores_i2t, scores_t2i, dataset, top=10):
    """For each query of both directions its `top` best re-ranked candidates with scores, as
    result/retrieval.json has them.
    """

    def best(scores, key, names, is_hit):
        values, indices = scores.topk(min(top, scores.shape[1]), dim=1)
        return [
            [
                {key: names[i], "score": round(v, 4), "hit": is_hit(query, i)}
                for i, v in zip(row_i, row_v)
                if v > NO_CANDIDATE
            ]
            for query, (row_i, row_v) in enumerate(zip(indices.tolist(), values.tolist()))
        ]

    texts = best(
        scores_i2t, "caption", dataset.texts, lambda image, text: dataset.txt2img[text] == image
    )
    images = best(
        scores_t2i, "image", dataset.images, lambda text, image: dataset.txt2img[text] == image
    )
    return {
        "image_root": dataset.roots["image_root"],
        "image_to_text": [
            {"image": image, "results": row} for image, row in zip(dataset.images, texts)
        ],
        "text_to_image": [
            {"caption": text, "results": row} for text, row in zip(dataset.texts, images)
        ],
    }
