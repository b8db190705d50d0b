"""A trained model as one object: features, ranking, answers, heat maps, pseudo-targets."""

import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from configs.config import Config, as_config
from configs.load import require
from configs.tasks import TASKS, detect_task, find_task
from dataset.entries import Entry
from dataset.relevance import Ad
from dataset.text import MAX_TOKENS, tokenize
from dataset.transforms import normalize, test_transform
from dataset.vqa import Question, load_answer_list
from engine.configuration import choose_config, task_of_checkpoint
from engine.precision import autocast, find_device, use_device
from evaluation.distributed import progress_bar
from evaluation.metrics import box_scores
from evaluation.retrieval import ImageEmbeds, encode_images, encode_texts
from evaluation.vqa import answer_questions, tokenize_answers
from inference.inputs import (
    Images,
    as_images,
    as_list,
    as_texts,
    check_box,
    is_features,
    read_image,
)
from models import build_model
from models.contrastive import feature_similarity
from models.gradcam import text_gradcam
from models.tokenizer import load_tokenizer
from models.weights import (
    find_checkpoint,
    load_checkpoint,
    named_tensors,
    read_checkpoint,
)
from utils import InputError, Text, alone
from visualize.explain import (
    Candidate,
    HeatMaps,
    Phrase,
    explain_answer,
    explain_class,
    explain_similarity,
    split_words,
    unknown_words,
    word_targets,
)

TEXTS = 4096  # texts encoded at a time; only their features are kept
BLOCK = 2048  # candidates at a time: their float32 features stay in the cache of a core


class HeatMap(NamedTuple):
    """Heat maps of a decision about an image, on the grid of patches.

    Attributes:
        whole: Map of the text as a whole [h, w]; of two images [2, h, w].
        by_word: Maps of the W words [W, h, w]; of two images [2, W, h, w].
        words: The W words of the text, " [UNK]" after each that the vocabulary lacks.
        verdict: The decision and its score.
        text: The text after clean-up.
        pictures: The images, uint8 [H, W, 3].
        kind: "text" or "question".
    """

    whole: np.ndarray
    by_word: np.ndarray
    words: list[str]
    verdict: str
    text: str
    pictures: list[np.ndarray]
    kind: str

    def draw(self, path: str | Path) -> None:
        """Draw the maps over the image to a .png, .jpg, .pdf or .svg file."""
        from visualize.draw import draw_heat_maps

        whole, by_word = (
            maps if len(self.pictures) == 2 else maps[None] for maps in (self.whole, self.by_word)
        )
        words = zip(self.words, by_word.swapaxes(0, 1), strict=True) if self.words else ()
        panels = [(f"whole {self.kind}", whole), *words]
        title = [self.text.strip(), self.verdict, *unknown_words(self.words)]
        draw_heat_maps(self.pictures, panels, title, path)


def load_model(
    source: str | Path,
    device: str | None = None,
    precision: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    allow_missing: bool = False,
) -> "Inference":
    """Load a checkpoint in eval mode.

    Args:
        source: A .pth or .safetensors file, the folder of a run (its best checkpoint, else its
            last) or of an export, or a hub repository USER/NAME or USER/NAME@REVISION.
        device: cuda, cuda:1, ... or cpu. Default: cuda if there is a GPU.
        precision: fp32 or bf16. Default: the configuration's.
        config: YAML file of the training, for a checkpoint without a configuration.
            Default: the configuration of the task in configs/.
        overrides: Changes of the configuration, KEY=VALUE as `--set` takes them.
        allow_missing: Whether missing weights stay random.

    Raises:
        InputError: The checkpoint cannot be read, or belongs to no task or another one.
    """
    found = find_device(device)
    source = find_checkpoint(source) if Path(source).is_dir() else source
    content = read_checkpoint(source)
    task = detect_task(named_tensors(content, source))
    overrides = [*overrides, *[f"precision={precision}"] * bool(precision)]
    name = task_of_checkpoint(content, task, source)
    chosen, _ = choose_config(name, str(source), file=config, overrides=overrides)
    return Inference(task, chosen, source, found, allow_missing=allow_missing)


def serves(*, exact: bool = False) -> Callable:
    """Decorate a method: one call at a time, without gradients, only for tasks that list it.

    Args:
        exact: Whether to compute in float32 even if `precision` is bf16.
    """

    def decorate(method: FunctionType) -> Callable:
        @functools.wraps(method)
        def call(self: "Inference", *args: Any, **kwargs: Any) -> Any:
            self.require(method.__name__)
            precision = nullcontext() if exact else autocast(self.config, self.device)
            with alone(), torch.no_grad(), precision:
                return method(self, *args, **kwargs)

        return call

    return decorate


class Inference:
    """A model in eval mode with its tokenizer and transform.

    Images are paths, pictures of Pillow, arrays uint8 [H, W, 3] or tensors uint8 [3, H, W]; texts
    are strings. The key exif decides whether paths and pictures are turned by their EXIF
    orientation. A method takes one input or a list. Its result for a single input lacks that
    dimension. Methods raise InputError for unusable input, and if the task of the checkpoint does
    not list them in configs/tasks.py.

    Attributes:
        task: Task of the weights.
        source: File or hub repository of the weights.
        model: The network.
        config: The configuration.
        tokenizer: The tokenizer.
        transform: Function uint8 [3, H, W] -> uint8 [3, R, R].
        device: Device of the network.
        report: Report of loading the weights.
        ranking: The ranking that a validation measured to be better, None if none did.
        batch_size: Images and pairs that are computed at a time.
    """

    def __init__(
        self,
        task: str,
        config: Config | Mapping[str, Any],
        source: str | Path,
        device: torch.device,
        *,
        allow_missing: bool = False,
    ) -> None:
        config = as_config(config)
        require(config, "bert_config", "image_res")
        self.task, self.source, self.device = task, source, device
        self.tokenizer, config = load_tokenizer(config)
        # the class depends on the task; `serves` refuses methods that the task does not list
        self.model: Any = build_model(task, config, self.tokenizer)
        self.report = load_checkpoint(self.model, source, allow_missing, complete=True)
        self.ranking = self.model.ranking
        self.model.to(device).eval()
        self.config = self.model.config
        self.transform = test_transform(config.resolution)
        self.batch_size = config.batch_size_test
        if device.type == "cuda":
            use_device(self.config, device)

    def can(self, method: str) -> bool:
        """Return whether the task of the checkpoint has a method."""
        return method in find_task(self.task).methods

    def require(self, method: str) -> None:
        """Raise InputError unless the task of the checkpoint has a method."""
        if not self.can(method):
            others = [task.name for task in TASKS.values() if method in task.methods]
            raise InputError(
                f"{method}: {self.source} is a checkpoint of task {self.task}, which lacks this"
                f" method; load a checkpoint of {' or '.join(others)}"
            )

    @property
    def default_rerank(self) -> int:
        """Number of candidates that `rank` and searches re-rank by default.

        It is 0 if a validation measured that ITC alone ranks better, else the key k_test.
        """
        return 0 if self.ranking and self.ranking.by == "itc" else self.config.k_test

    # ----------------------------------------------------------------------------------------------
    # images and texts together: pre-training, retrieval, grounding

    @serves()
    def embed_images(self, images: Any, workers: int = 0) -> Tensor:
        """Return the normalized features of images, float32 [N, D] on the CPU.

        Memory holds one batch and the features, also for a hundred thousand paths.

        Args:
            images: Images to embed.
            workers: Processes that read and resize the images, 0 for this one.
        """
        images, one = as_images(images)
        config = self._batch_config(num_workers=workers)
        data = Images(images, self.transform, self.config.exif)
        _, features = encode_images(self.model, data, config, self.device, keep=False)
        return features.cpu()[0] if one else features.cpu()

    @serves()
    def embed_texts(self, texts: Any) -> Tensor:
        """Return the normalized features of texts, float32 [N, D] on the CPU."""
        texts, one = self._clean(texts)
        parts = (texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS))
        features = torch.cat([self._encode_texts(part)[1].cpu() for part in parts])
        return features[0] if one else features

    @serves()
    def similarity(self, images: Any, texts: Any) -> Tensor | float:
        """Return the contrastive similarities (ITC) of all pairs, from -1 to 1: [NI, NT].

        Args:
            images: Images, or their features from `embed_images`.
            texts: Texts, or their features from `embed_texts`.
        """
        image_feat = _features(images, self.embed_images)
        text_feat = _features(texts, self.embed_texts)
        sim = _check_finite(feature_similarity(_matrix(image_feat), _matrix(text_feat)))
        return _unwrap(sim, image_feat.ndim == 1, text_feat.ndim == 1)

    @serves()
    def match(self, images: Any, texts: Any) -> Tensor | float:
        """Return the probabilities that images and texts match (ITM), of all pairs: [NI, NT]."""
        (images, one_image), (texts, one_text) = as_images(images), self._clean(texts)
        pairs = torch.ones(len(images), len(texts), dtype=torch.bool)
        return _unwrap(self._itm(images, texts, pairs)[1], one_image, one_text)

    @serves()
    def match_logits(self, images: Any, text: str) -> tuple[Tensor, Tensor]:
        """Return the ITM logits of images and a text, and the probabilities of a match, [N] each.

        The evaluation ranks by the logits of the class "match" (Section 5).
        """
        (images, _), (texts, _) = as_images(images), self._clean([text])
        logits, probs = self._itm(images, texts, torch.ones(len(images), 1, dtype=torch.bool))
        return logits[:, 0], probs[:, 0]

    @serves()
    def rank(
        self,
        images: Any,
        texts: Any,
        k: int = 10,
        rerank: int | None = None,
        *,
        of: str = "images",
        image_features: Any = None,
        text_features: Any = None,
    ) -> list:
        """Return the k best images for each text, or the k best texts for each image.

        As in the evaluation (Section 5), the `rerank` most similar candidates are ranked by their
        ITM logit, and the others follow by similarity. The score is the probability of a match
        (ITM) if the candidate was re-ranked, else its value in `similarity_probs` (ITC).

        Args:
            images: Images; None if `image_features` are given and `rerank` is 0.
            texts: Texts; None if `text_features` are given and `rerank` is 0.
            k: Number of results.
            rerank: Number of candidates to re-rank. Default: `default_rerank`.
            of: Kind of the candidates, "images" or "texts".
            image_features: Features from `embed_images`; then only candidates are read.
            text_features: Features from `embed_texts`.

        Returns:
            A list [(index, score), ...] for each query, the best first.
        """
        rerank = self.default_rerank if rerank is None else rerank
        _check_rank(k, rerank, of)
        if rerank and (images is None or texts is None):
            raise InputError("rank: re-ranking needs images and texts; give both, or set rerank=0")
        images, image_feat, one_image = _rankable(
            "image", images, image_features, as_images, self.embed_images
        )
        texts, text_feat, one_text = _rankable(
            "text", texts, text_features, self._clean, self.embed_texts
        )
        by_text = of == "images"
        features = (text_feat, image_feat) if by_text else (image_feat, text_feat)
        sim, best = most_similar(*features, max(k, rerank), self.device)
        scores = self.similarity_probs(sim, *features)
        if rerank:
            ranked = self._rerank(images, texts, best[:, :rerank], by_text)
            scores[:, :rerank], best[:, :rerank] = ranked
        rows = zip(best[:, :k].tolist(), scores[:, :k].tolist(), strict=True)
        rows = [list(zip(*row, strict=True)) for row in rows]
        return rows[0] if (one_text if by_text else one_image) else rows

    def similarity_probs(self, sim: Tensor, queries: Any, candidates: Any) -> Tensor:
        """Return the probabilities by ITC: the softmax over all candidates (Equation 1).

        The logits are the similarities, divided by the model's temperature.

        Args:
            sim: Similarities of each query with some of the candidates [Q, K].
            queries: Features [Q, D].
            candidates: Features of all candidates [N, D].
        """
        temp = self.model.temp.item()
        total = torch.full((len(sim), 1), -torch.inf)
        for _, part in similarity_blocks(queries, candidates, self.device):
            total = total.logaddexp((part / temp).logsumexp(dim=1, keepdim=True).cpu())
        return (sim / temp - total).exp()

    @serves()
    def ground(
        self,
        images: Any,
        texts: Any,
        boxes: Any = None,
        *,
        mode: str = "itm",
        block_num: int | None = None,
    ) -> list:
        """Return the boxes of referring expressions in their images, the best first.

        The score of a box is Section 5's: the sum of the heat map in it, divided by the root of its
        area.

        Args:
            images: Images, in pairs with `texts` as in `answer`.
            texts: Referring expressions.
            boxes: Candidates [[x, y, w, h], ...] in pixels; a list of such lists for several pairs.
                If the key exif is "upright", these are pixels of the turned image. Default: the
                best rectangle of whole patches.
            mode: Heat map of the matching head, "itm", or of the similarity, "itc".
            block_num: Layer of the heat map. Default: the third multimodal one.

        Returns:
            A list [([x, y, w, h], score), ...] for each pair.
        """
        items, texts, one = self._pairs(images, texts)
        _check_mode(mode)
        boxes = _box_lists(boxes, len(items), one)
        found = []
        for part, image, pictures in self._batches(items):
            tokens = self._tokenize(texts[part], MAX_TOKENS)
            heat = text_gradcam(self.model, *image, tokens, mode, block_num)
            # the mean over a text's own tokens, without padding
            if mode == "itm":
                lengths = tokens.attention_mask.sum(dim=1)
                heat *= (tokens.attention_mask.shape[1] / lengths)[:, None, None]
            for values, (picture,), given in zip(heat.cpu(), pictures, boxes[part], strict=True):
                size = picture.shape[1:]
                candidates = [best_rectangle(values.numpy(), *size)] if given is None else given
                scored = zip(
                    candidates, map(float, box_scores(values, *size, candidates)), strict=True
                )
                found.append(sorted(scored, key=lambda box: -box[1]))
        return found[0] if one else found

    # ----------------------------------------------------------------------------------------------
    # the fine-tuned tasks

    @serves()
    def answer(self, images: Any, questions: Any, answers: Any = None) -> list:
        """Return the answers to questions with probabilities, the best first.

        Args:
            images: Images, as many as questions; a single one goes with every question.
            questions: Questions; a single one goes with every image.
            answers: List of answers to choose from, or its JSON file. Their probabilities are the
                softmax over the k_test candidates with the likeliest first token, as in the
                evaluation. Default: the answer that beam search finds, with its own probability.

        Returns:
            A list [(text, probability), ...] for each pair.
        """
        items, questions, one = self._pairs(images, questions)
        answers = _answer_list(answers)
        tokens = tokenize_answers(answers, self.model, self.tokenizer) if answers else None
        found = []
        for part, (image,), _ in self._batches(items):
            question = self._tokenize(questions[part])
            found += answer_questions(self.model, image, question, answers, tokens, self.tokenizer)
        return found[0] if one else found

    @serves()
    def entails(self, images: Any, texts: Any) -> dict[str, float] | list[dict[str, float]]:
        """Return the probabilities of contradiction, neutral and entailment, for each pair."""
        found, one = self._predict(images, texts)
        return found[0] if one else found

    @serves()
    def true_of(self, images: Any, texts: Any) -> float | list[float]:
        """Return the probability that a text is true of two images, for each pair.

        Args:
            images: A list of two images, or a list of such lists for several texts.
            texts: Texts.
        """
        found, one = self._predict(images, texts)
        return found[0]["True"] if one else [probs["True"] for probs in found]

    def _predict(self, images: Any, texts: Any) -> tuple[list[dict[str, float]], bool]:
        """Return the probabilities of the classes of each pair, and whether there is one pair."""
        items, texts, one = self._pairs(images, texts)
        classes, found = find_task(self.task).classes, []
        for part, image, _ in self._batches(items):
            probs = self.model.predict(*image, self._tokenize(texts[part])).softmax(dim=1)
            found += [dict(zip(classes, row, strict=True)) for row in probs.tolist()]
        return found, one

    # ----------------------------------------------------------------------------------------------
    # explanations

    @serves(exact=True)
    def heat_map(
        self,
        images: Any,
        texts: Any,
        answers: Any = None,
        *,
        mode: str = "itm",
        block_num: int | None = None,
    ) -> HeatMap | list[HeatMap]:
        """Return heat maps of the decisions on images and texts by Grad-CAM (Figures 4 to 6).

        The decision is "match" for models that match images and texts, else the most probable
        class or answer.

        Args:
            images: Images, in pairs with `texts` as in `answer` or `true_of`.
            texts: Texts or questions.
            answers: Answers to choose from, as in `answer`.
            mode: "itm", or "itc" for the contrastive similarity, which has no words.
            block_num: Layer of the map. Default: the third with cross-attention, but not the last.
        """
        _check_mode(mode)
        if mode == "itc" and not self.can("similarity"):
            raise InputError(
                f"heat_map: mode itc needs a similarity, which task {self.task} lacks; use mode itm"
            )
        answers = _answer_list(answers)
        items, texts, one = self._pairs(images, texts)
        found = []
        for (_, columns, (pictures,)), text in zip(self._batches(items, 1), texts, strict=True):
            phrase = split_words(text, self.model, self.tokenizer)
            maps = self._explain(torch.cat(columns), phrase, answers, mode, block_num)
            arrays = [value.cpu().numpy() for value in (maps.whole, maps.by_word)]
            whole, by_word = arrays if len(pictures) == 2 else (array[0] for array in arrays)
            heat = HeatMap(
                whole=whole,
                by_word=by_word,
                words=phrase.words if mode == "itm" else [],
                verdict=maps.verdict,
                text=phrase.text,
                pictures=[picture.permute(1, 2, 0).numpy() for picture in pictures],
                kind="question" if self.can("answer") else "text",
            )
            found.append(heat)
        return found[0] if one else found

    def _explain(
        self,
        image: Tensor,
        phrase: Phrase,
        answers: list[str],
        mode: str,
        block_num: int | None,
    ) -> HeatMaps:
        """Explain the decision on one or two images [I, 3, R, R], as in `heat_map`."""
        if mode == "itc":
            return explain_similarity(self.model, image, phrase, block_num)
        if self.can("answer"):
            return explain_answer(
                self.model, image, phrase, answers, self.tokenizer, block_num=block_num
            )
        return explain_class(self.task, self.model, image, phrase, block_num=block_num)

    @serves(exact=True)
    def fill_in(self, images: Any, texts: Any) -> list:
        """Return the words that the momentum model expects in place of each word (Figure 2).

        Returns:
            A list [(word, candidates), ...] for each pair of image and caption. A candidate has
            text, score (its probability) and hit (whether the caption has it).
        """
        if any(name.startswith("text_encoder_m.") for name in self.report.copied):
            raise InputError(
                f"fill_in: {self.source} has no momentum model (text_encoder_m.*); load the"
                " checkpoint of the run or an export with --momentum"
            )
        items, texts, one = self._pairs(images, texts)
        found: list[list[tuple[str, list[Candidate]]]] = []
        for (_, (image,), _), text in zip(self._batches(items, 1), texts, strict=True):
            phrase = split_words(text, self.model, self.tokenizer)
            image_embeds, _ = self.model.encode_image(image, momentum=True)
            candidates = word_targets(self.model, image_embeds, phrase, self.tokenizer)
            found.append(list(zip(phrase.words, candidates, strict=True)))
        return found[0] if one else found

    # ----------------------------------------------------------------------------------------------
    # inputs of the methods

    def _clean(self, texts: Any) -> tuple[list[str], bool]:
        """Return cleaned-up texts, and whether a single one was given."""
        form = {"relevance": Ad, "vqa": Question}.get(self.task, Entry)
        clean = functools.partial(form.clean, max_words=self.config.max_words)
        return as_texts(texts, clean, self.tokenizer)

    def _tokenize(self, texts: list[str], limit: int | None = None) -> Text:
        return tokenize(texts, self.tokenizer, self.config.max_tokens or limit).to(self.device)

    def _batch_config(self, **keys: Any) -> Config:
        return msgspec.structs.replace(self.config, batch_size_test=self.batch_size, **keys)

    def _encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        return encode_texts(self.model, texts, self.tokenizer, self._batch_config(), self.device)

    def _itm(
        self,
        images: list,
        texts: list[str],
        pairs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the ITM logits and the probabilities of a match of pairs, float32 [NI, NT].

        Arguments as in `itm_scores` of the models.
        """
        data = Images(images, self.transform, self.config.exif)
        image_embeds = ImageEmbeds(self.model, data, self._batch_config(), self.device, keep=False)
        text_embeds, _, mask = self._encode_texts(texts)
        pairs, progress = pairs.to(self.device), functools.partial(progress_bar, what="matching")
        logits, probs = self.model.itm_scores(
            image_embeds, text_embeds, mask, pairs, progress=progress
        )
        return logits.cpu(), probs.cpu()

    def _rerank(
        self, images: list, texts: list[str], candidates: Tensor, by_text: bool
    ) -> tuple[Tensor, Tensor]:
        """Rank candidates by their ITM logits; return probabilities and indices [Q, K].

        Args:
            images: All images.
            texts: All texts.
            candidates: Indices of the candidates of each query [Q, K].
            by_text: Whether the queries are texts and the candidates images.
        """
        query = torch.arange(len(candidates))[:, None].expand_as(candidates)
        image, text = (candidates, query) if by_text else (query, candidates)
        own_images, i = image.unique(return_inverse=True)
        own_texts, t = text.unique(return_inverse=True)
        pairs = torch.zeros(len(own_images), len(own_texts), dtype=torch.bool)
        pairs[i, t] = True
        chosen = [images[n] for n in own_images], [texts[n] for n in own_texts]
        logits, probs = (scores[i, t] for scores in self._itm(*chosen, pairs))
        order = logits.argsort(dim=1, descending=True, stable=True)
        return probs.gather(1, order), candidates.gather(1, order)

    def _pairs(self, images: Any, texts: Any) -> tuple[list, list[str], bool]:
        """Return the one or two images of each pair, the texts, and whether there is one pair."""
        texts, one = self._clean(texts)
        if "pairs" in find_task(self.task).traits:
            items = [images] if one else as_list(images, "pairs of images")
            if any(not isinstance(item, list | tuple) or len(item) != 2 for item in items):
                raise InputError(
                    f"task {self.task} takes two images for each text; give a list of two"
                    " images, or for several texts a list of such lists"
                )
        else:
            images, one_image = as_images(images)
            items, one = [[image] for image in images], one and one_image
        count = max(len(items), len(texts))
        items = items * count if len(items) == 1 else items
        texts = texts * count if len(texts) == 1 else texts
        if len(items) != len(texts):
            raise InputError(
                f"{len(items)} images and {len(texts)} texts are not pairs; give equally many,"
                " or a single image or text"
            )
        return items, texts, one

    def _batches(
        self, items: list, size: int | None = None
    ) -> Iterator[tuple[slice, list[Tensor], list[list[Tensor]]]]:
        """Yield batches of items, each of one or two images.

        Yields:
            The slice of items, their first and perhaps second images [B, 3, R, R] on the device,
            and the images of each item, uint8 [3, H, W].
        """
        size = size or self.batch_size
        for start in range(0, len(items), size):
            part = slice(start, start + size)
            pictures = [
                [read_image(image, f"image {number}", self.config.exif) for image in item]
                for number, item in enumerate(items[part], start)
            ]
            columns = [
                torch.stack([self.transform(picture) for picture in column])
                for column in zip(*pictures, strict=True)
            ]
            yield part, [normalize(column.to(self.device)) for column in columns], pictures


# --------------------------------------------------------------------------------------------------
# without a model


def most_similar(
    queries: Any, candidates: Any, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the candidates that are most similar to each query, block by block.

    Args:
        queries: Features [Q, D], a tensor or array of any float type.
        candidates: Features [N, D], perhaps memory-mapped.
        k: Number of candidates.
        device: Device of the computation.

    Returns:
        Similarities and indices [Q, min(k, N)] on the CPU, the best first.
    """
    values = torch.empty(len(queries), 0, device=device)
    best = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    for start, sim in similarity_blocks(queries, candidates, device):
        numbers = torch.arange(start, start + sim.shape[1], device=device).expand_as(sim)
        values, best = torch.cat([values, sim], dim=1), torch.cat([best, numbers], dim=1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        best = best.gather(1, order)
    return values.cpu(), best.cpu()


def similarity_blocks(
    queries: Any, candidates: Any, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first candidate of each block of BLOCK, and the similarities [Q, B] with it.

    Args:
        queries: Features [Q, D].
        candidates: Features [N, D].
        device: Device of the computation.
    """
    queries = as_float(queries).to(device)
    for start in range(0, len(candidates), BLOCK):
        block = as_float(candidates[start : start + BLOCK]).to(device)
        yield start, _check_finite(feature_similarity(queries, block))


def best_rectangle(heat: np.ndarray, height: int, width: int) -> list[float]:
    """Return the box [x, y, w, h] of whole patches with the most heat over the root of its area.

    Args:
        heat: Heat map [h, w].
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    rows, columns = heat.shape
    # above and left of each corner
    total = np.pad(heat.astype(np.float64).cumsum(axis=0).cumsum(axis=1), (1, 0))
    sums = (
        total[None, :, None, :]
        - total[:, None, None, :]
        - total[None, :, :, None]
        + total[:, None, :, None]
    )
    tall, wide = (
        np.arange(count + 1)[None] - np.arange(count + 1)[:, None] for count in (rows, columns)
    )
    area = tall[:, :, None, None] * wide
    valid = (tall[:, :, None, None] > 0) & (wide > 0)
    scores = np.where(valid, sums / np.sqrt(np.where(valid, area, 1)), -np.inf)
    top, bottom, left, right = map(int, np.unravel_index(scores.argmax(), scores.shape))
    return [
        left * width / columns,
        top * height / rows,
        (right - left) * width / columns,
        (bottom - top) * height / rows,
    ]


def as_float(values: Any) -> Tensor:
    """Convert features, an array or tensor of any float type, to a float32 tensor."""
    values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return values.float()


def _matrix(features: Any) -> Any:
    """Return the features of a single input [D] as [1, D]."""
    return features if features.ndim == 2 else features[None]


def _features(values: Any, embed: Callable[[Any], Tensor]) -> Tensor:
    """Return values as float32 if they are features, else embed them."""
    return as_float(values) if is_features(values) else embed(values)


def _rankable(
    what: str, values: Any, features: Any, read: Callable, embed: Callable
) -> tuple[Any, Any, bool]:
    """Return values as a list, their features [N, D], and whether a single one was given."""
    values, one = (None, features.ndim == 1) if values is None else read(values)
    found = _matrix(embed(values) if features is None else features)
    if values is not None and len(values) != len(found):
        raise InputError(
            f"rank: {len(values)} {what}s have {len(found)} features; give one feature for each"
            f" {what}"
        )
    return values, found, one


def _check_finite(similarities: Tensor) -> Tensor:
    """Return similarities. Raises InputError if features are NaN or infinite."""
    if not similarities.isfinite().all():
        raise InputError("features of images or texts are not finite; embed them again")
    return similarities


def _check_rank(k: int, rerank: int, of: str) -> None:
    if of not in ("images", "texts"):
        raise InputError(f"rank: of is {of!r}; it must be 'images' or 'texts'")
    if k < 1 or rerank < 0:
        raise InputError(
            f"rank: k={k} and rerank={rerank}; give a positive k, and rerank from 0 on"
        )


def _check_mode(mode: str) -> None:
    if mode not in ("itm", "itc"):
        raise InputError(f"mode is {mode!r}; it must be itm or itc")


def _box_lists(boxes: Any, count: int, one: bool) -> Any:
    """Return the candidate boxes of each pair, None for the pairs without candidates."""
    boxes = [boxes] * count if one or boxes is None else boxes
    if len(boxes) != count:
        raise InputError(
            f"ground: {len(boxes)} lists of boxes for {count} pairs of image and text; give one"
            " list for each pair"
        )
    for box in (box for given in boxes if given is not None for box in given):
        check_box(box)
    return boxes


def _unwrap(matrix: Tensor, one_row: bool, one_column: bool) -> Tensor | float:
    """Return [NI, NT] without the dimension of a single image or text."""
    matrix = matrix[0] if one_row else matrix
    matrix = matrix[..., 0] if one_column else matrix
    return matrix if matrix.ndim else matrix.item()


def _answer_list(answers: Any) -> list[str]:
    if isinstance(answers, str | Path):
        return load_answer_list(answers)
    values: list[Any] = list(answers or ())
    for answer in values:
        if not isinstance(answer, str):
            raise InputError(f"answer {reprlib.repr(answer)} is not a text; give a list of strings")
    return values
