"""Image-text retrieval (Section 5): encode, rank by ITC, re-rank by ITM, recall, rankings."""

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from configs.config import Config, as_config
from configs.tasks import TASKS
from dataset.loading import to_device
from dataset.text import MAX_TOKENS, tokenize
from engine.precision import autocast
from evaluation.distributed import iter_rank_share, progress_bar
from evaluation.metrics import chance_recall, recall_at_k
from evaluation.report import Report
from models.albef import Ranking
from models.contrastive import (
    NO_CANDIDATE,
    ContrastiveModel,
    feature_similarity,
    top_candidates,
)
from models.tokenizer import Tokenizer
from utils import Text, is_distributed, world_size

TABLE = ["txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"]
TOP = 10  # candidates of a query in result/retrieval.json
BATCH = 256  # texts that are encoded together


class ImageEmbeds:
    """The embeddings of this rank's images, every world_size-th, as `model.rerank` slices them.

    Args:
        model: A model with `encode_image`.
        dataset: The images, uint8 [3, H, W].
        config: The configuration.
        device: Device of the model.
        keep: Keep the embeddings in host memory; if False they are computed again batch by batch.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        dataset: Dataset,
        config: Config,
        device: torch.device,
        *,
        keep: bool,
    ) -> None:
        self.keep = keep
        self._model, self._dataset, self._device = model, dataset, device
        self._kept: list[Tensor] = []
        self._batch_size = config.batch_size_test
        self._recomputed: tuple[int, Tensor] | None = None  # number of a batch, its embeddings

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, 1+N, C] and features [B, D] of images [B, 3, H, W]."""
        embeds, feat = self._model.encode_image(image)
        if torch.is_autocast_enabled(self._device.type):
            # keys and values are computed in this dtype
            embeds = embeds.to(torch.get_autocast_dtype(self._device.type))
        if self.keep:
            self._kept.append(embeds.cpu())
        return embeds, feat

    def __getitem__(self, key: slice) -> Tensor:
        """Return the embeddings [1, 1+N, C] of the image `key.start`."""
        batch, place = divmod(key.start // world_size(), self._batch_size)
        if self.keep:
            return self._kept[batch][place : place + 1]
        if self._recomputed is None or self._recomputed[0] != batch:
            first = key.start - place * world_size()
            # Dataset of torch has no __len__
            count = len(self._dataset)  # ty: ignore[invalid-argument-type]
            numbers = range(first, count, world_size())[: self._batch_size]
            image = torch.stack([self._dataset[number] for number in numbers])
            self._recomputed = batch, self.encode(to_device(image, self._device))[0]
        return self._recomputed[1][place : place + 1]


@torch.no_grad()
def encode_images(
    model: ContrastiveModel, dataset: Dataset, config: Config, device: torch.device, *, keep: bool
) -> tuple[ImageEmbeds, Tensor]:
    """Encode a data set's images, divided over the ranks.

    Returns:
        The embeddings of this rank's images, and the features [NI, D] of all.
    """
    embeds = ImageEmbeds(model, dataset, config, device, keep=keep)
    count = len(dataset)  # ty: ignore[invalid-argument-type]  # see ImageEmbeds
    features = torch.zeros(count, config.embed_dim, device=device)
    for indices, image in iter_rank_share(dataset, config, device, "images"):
        features[indices] = embeds.encode(image)[1]
    if is_distributed():
        dist.all_reduce(features)
    return embeds, features


@torch.no_grad()
def encode_texts(
    model: ContrastiveModel,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode texts.

    Returns:
        text_embeds [NT, L, C], text_feat [NT, D] and attention_mask [NT, L] on the device.
    """
    tokens = tokenize(texts, tokenizer, config.max_tokens or MAX_TOKENS).to(device)
    lengths = tokens.attention_mask.sum(dim=1)
    # texts of similar length are a batch, so that there is almost no padding
    order = lengths.argsort(stable=True)
    text_embeds = torch.empty(0, device=device)
    text_feat = torch.empty(len(texts), config.embed_dim, device=device)
    for start in progress_bar(range(0, len(texts), BATCH), "texts"):
        part = order[start : start + BATCH]
        length = int(lengths[part[-1]])
        text = Text(tokens.input_ids[part, :length], tokens.attention_mask[part, :length])
        embeds, feat = model.encode_text(text)
        if not len(text_embeds):
            text_embeds = embeds.new_zeros(*tokens.input_ids.shape, embeds.shape[-1])
        text_embeds[part, :length] = embeds
        text_feat[part] = feat
    return text_embeds, text_feat, tokens.attention_mask


@torch.no_grad()
def evaluate(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
    *,
    ks: Sequence[int] | None = None,
) -> dict[str, float]:
    """Rank by ITC, then the k best candidates of each query by ITM (Table 6).

    Args:
        model: A model with the contrastive projections and the matching head.
        dataset: A RetrievalTestSet.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of a table and of result/retrieval.json, None for no report.
        ks: Numbers of candidates to re-rank, by default k_test.

    Returns:
        Metrics of `recall_at_k`, for ITC alone with the prefix itc_, for smaller k with k16_ etc.,
        and best_r_mean, the higher r_mean of ITC alone and of k_test.

    Raises:
        NotFinite: Scores are not finite.
    """
    config = as_config(config)
    model.eval()
    ks = sorted(ks or [config.k_test])
    sim, logits, probs = score_pairs(model, dataset, tokenizer, config, device, k=ks[-1])
    metrics, i2t, t2i = {0: recall_of(sim, sim.T, dataset)}, logits, logits.T
    for k in ks:
        i2t = logits.masked_fill(~top_candidates(sim, k), NO_CANDIDATE)
        t2i = logits.T.masked_fill(~top_candidates(sim.T, k), NO_CANDIDATE)
        metrics[k] = recall_of(i2t, t2i, dataset)
    if report:
        about = {"k": ks[-1], "ranking": msgspec.to_builtins(model.ranking)}
        found = rankings(sim, i2t, t2i, probs, model.temp.item(), dataset)
        report.write("retrieval.json", about | found)
        print_table(f"{TASKS[model.task].title}, {report.title}", metrics, dataset)
    prefixes = {k: f"k{k}_" for k in ks} | {ks[-1]: "", 0: "itc_"}
    named = {prefixes[k] + name: v for k, values in metrics.items() for name, v in values.items()}
    return {**named, "best_r_mean": max(named["r_mean"], named["itc_r_mean"])}


def score_pairs(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
    *,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score all pairs by ITC, and the k best candidates of each image and each text by ITM.

    Returns:
        Similarities, ITM logits and probabilities of a match, float32 [NI, NT] each. A pair that is
        no candidate has the logit and the probability NO_CANDIDATE.
    """
    keep = config.image_embeds == "host"
    bar = functools.partial(progress_bar, what="re-ranking")
    with autocast(config, device):
        image_embeds, image_feat = encode_images(model, dataset, config, device, keep=keep)
        text_embeds, text_feat, mask = encode_texts(model, dataset.texts, tokenizer, config, device)
        sim = feature_similarity(image_feat, text_feat)
        pairs = top_candidates(sim, k) | top_candidates(sim.T, k).T
        logits, probs = model.itm_scores(image_embeds, text_embeds, mask, pairs, progress=bar)
    return sim, logits, probs


def better_ranking(metrics: dict[str, float], config: Config) -> Ranking | None:
    """Return the ranking with the higher r_mean: ITC alone, or ITM of its k best candidates.

    Args:
        metrics: Metrics of `evaluate`, or of another task's evaluation.
        config: The configuration; k_test is read.

    Returns:
        The ranking, None without these metrics.
    """
    if "itc_r_mean" not in metrics:
        return None
    itc, itm = metrics["itc_r_mean"], metrics["r_mean"]
    return Ranking("itm" if itm > itc else "itc", config.k_test, itc, itm)


def recall_of(scores_i2t: Tensor, scores_t2i: Tensor, dataset: Any) -> dict[str, float]:
    """Return `recall_at_k` on a RetrievalTestSet of scores [NI, NT] and [NT, NI]."""
    return recall_at_k(scores_i2t.cpu(), scores_t2i.cpu(), dataset.txt2img, dataset.img2txt)


def print_table(title: str, metrics: dict[int, dict[str, float]], dataset: Any) -> None:
    """Print the recall of ITC, of re-ranking, and of chance.

    Args:
        title: Title of the table.
        metrics: Metrics by k, those of ITC alone under 0.
        dataset: The RetrievalTestSet.
    """
    images, texts = len(dataset.images), len(dataset.texts)
    print(f"{title}, {images} images and {texts} texts, recall in percent")
    print(f"{'':16}" + "".join(f"{name:>9}" for name in TABLE))
    reranked = {f"ITC + ITM, k {k}": values for k, values in metrics.items() if k}
    chance = chance_metrics(dataset)
    for label, values in {"ITC": metrics[0], **reranked, "chance": chance}.items():
        print(f"{label:16}" + "".join(f"{values[name]:9.1f}" for name in TABLE))


def rankings(
    sim: Tensor, i2t: Tensor, t2i: Tensor, probs: Tensor, temp: float, dataset: Any
) -> dict[str, Any]:
    """Return the best candidates of each query by ITM and by ITC, as result/retrieval.json.

    Args:
        sim: Similarities [NI, NT].
        i2t: ITM logits [NI, NT], NO_CANDIDATE for a pair that is not re-ranked.
        t2i: ITM logits [NT, NI], likewise.
        probs: Probabilities of a match [NI, NT].
        temp: Temperature; probabilities by ITC are a softmax over all candidates.
        dataset: The RetrievalTestSet.
    """
    images, texts = dataset.images, dataset.texts
    owners = torch.tensor(dataset.txt2img, device=sim.device)
    hits = owners == torch.arange(len(images), device=sim.device)[:, None]  # [NI, NT]
    by_image = zip(
        images,
        best_candidates(i2t, probs, hits, "caption", texts),
        best_candidates(sim, (sim / temp).softmax(dim=1), hits, "caption", texts),
        strict=True,
    )
    by_text = zip(
        texts,
        best_candidates(t2i, probs.T, hits.T, "image", images),
        best_candidates(sim.T, (sim.T / temp).softmax(dim=1), hits.T, "image", images),
        strict=True,
    )
    return {
        "image_root": dataset.roots["image_root"],
        "image_to_text": [
            {"image": image, "results": itm, "itc_results": itc} for image, itm, itc in by_image
        ],
        "text_to_image": [
            {"caption": text, "results": itm, "itc_results": itc} for text, itm, itc in by_text
        ],
    }


def best_candidates(
    scores: Tensor, probs: Tensor, hits: Tensor, key: str, names: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Return the TOP candidates of each query, the best first.

    Args:
        scores: Scores [Q, N], NO_CANDIDATE for none.
        probs: Probabilities [Q, N].
        hits: Whether query and candidate belong together, bool [Q, N].
        key: Key of the name of a candidate.
        names: Names of the candidates.
    """
    values, indices = scores.topk(min(TOP, scores.shape[1]), dim=1)
    found = indices, values, probs.gather(1, indices), hits.gather(1, indices)
    return [
        [
            {key: names[i], "score": round(value, 4), "probability": prob, "hit": hit}
            for i, value, prob, hit in zip(*row, strict=True)
            if value > NO_CANDIDATE
        ]
        for row in zip(*(part.tolist() for part in found), strict=True)
    ]


def chance_metrics(dataset: Any) -> dict[str, float]:
    """Return the expected recall of a random ranking of a RetrievalTestSet."""
    return chance_recall(len(dataset.images), len(dataset.texts), dataset.img2txt)
