"""One object for what a trained model can do: features, similarity, matching, ranking, answers,
heat maps, pseudo-targets.
"""

import argparse
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configs.schema import require
from dataset import nlvr, ve
from dataset.entries import Entry
from dataset.relevance import Ad
from dataset.text import MAX_TOKENS, tokenize
from dataset.transforms import normalize, test_transform
from dataset.vqa import Question, load_answer_list
from engine.configuration import DEFAULTS, choose_config, task_in
from engine.device import autocast, use_device
from engine.processes import find_device
from evaluation.divide import progress_bar
from evaluation.metrics import box_scores
from evaluation.retrieval import ImageEmbeds, encode_images, encode_texts
from evaluation.vqa import answer_questions, tokenize_answers
from inference.inputs import (
    Images,
    as_images,
    as_list,
    as_texts,
    check_box,
    check_features,
    check_number,
    is_features,
    read_image,
)
from models import ALIGNED, build_model, task_of
from models.contrastive import feature_similarity, matched
from models.gradcam import text_gradcam
from models.tokenizer import tokenizer_of
from models.weights import find_checkpoint, load_checkpoint, named_tensors, read_checkpoint
from utils import InputError, alone
from visualize.draw import draw_heat_maps
from visualize.explain import (
    explain_answer,
    explain_class,
    explain_similarity,
    split_words,
    unknown_words,
    word_targets,
)

TEXTS = 4096  # that are encoded at a time; of which the features alone are kept
# of candidates: their features as float32 stay in the cache of a core, which is several times
# faster
BLOCK = 2048
PAIRS = ("nlvr", "nlvr_pretrain")  # tasks with two images for each text


class HeatMap(NamedTuple):
    """Where in an image a decision comes from, on the grid of patches; with two images both have a
    map, [2, ...].
    """

    whole: np.ndarray  # [h, w], the text as a whole
    by_word: np.ndarray  # [W, h, w]
    words: list  # the W words of the text, " [UNK]" after those that the vocabulary lacks
    verdict: str  # the decision and its score
    text: str  # after clean-up
    pictures: list  # the images, uint8 [H, W, 3]
    kind: str  # text or question

    @property
    def panels(self):
        """The maps as `visualize.draw` takes them: (label, [1 or 2, h, w]) of the whole text and of
        each word.
        """
        whole, by_word = (
            maps if len(self.pictures) == 2 else maps[None] for maps in (self.whole, self.by_word)
        )
        return [(f"whole {self.kind}", whole), *zip(self.words, by_word.swapaxes(0, 1))]

    def draw(self, to):
        """Draw the maps over the image to a file, .png, .jpg, .pdf or .svg."""
        draw_heat_maps(
            self.pictures,
            self.panels,
            [self.text.strip(), self.verdict, *unknown_words(self.words)],
            to,
        )


def load_model(source, device=None, precision=None, config=None, overrides=()):
    """Return the Inference model of a checkpoint, in eval mode.

    source: a .pth or .safetensors file, released or ours, the folder of a run (its best checkpoint,
    else its last) or of an export, or a repository of the hub, USER/NAME or USER/NAME@REVISION.
    device: cuda, cuda:1, ... or cpu, by default cuda where there is a GPU. precision: fp32 or bf16,
    by default the configuration's. config: the YAML file of the training, where the checkpoint has
    no configuration and the default of its task does not fit. overrides: KEY=VALUE of more keys, as
    --set takes them. Raises InputError.
    """
    device = find_device(device)
    source = find_checkpoint(source) if Path(source).is_dir() else source
    content = read_checkpoint(source)
    task = task_of(named_tensors(content, source))
    overrides = [*overrides, f"precision={precision}"] if precision else list(overrides)
    args = argparse.Namespace(config=config, set=overrides, evaluate=True)
    choice = choose_config(task_in(content, task, source), args, source, DEFAULTS[task])
    return Inference(task, choice.config, source, device)


def check_task(model, tasks, what):
    """Raise InputError unless the task of an Inference model is one of `tasks`."""
    if model.task not in tasks:
        raise InputError(
            f"{what}: {model.source} is of task {model.task}, which cannot do it: load a checkpoint of "
            f"{' or '.join(tasks)}"
        )


def serves(*tasks, exact=False):
    """Make a method one of checkpoints of these tasks: for others it raises InputError. exact: in
    float32 whatever the key.
    """

    def decorate(method):
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            check_task(self, tasks, method.__name__)
            with (
                alone(),
                torch.no_grad(),
                nullcontext() if exact else autocast(self.config, self.device),
            ):
                return method(self, *args, **kwargs)

        return call

    return decorate


class Inference:
    """A model in eval mode with all it needs: .model, .config, .tokenizer, .transform, .task,
    .device, .report of its loading.

    Images are paths, pictures of Pillow, arrays uint8 [H, W, 3] or tensors uint8 [3, H, W], one or
    a list of them; texts are strings, one or a list. Results for one alone lack that dimension.
    Methods compute batch by batch, of batch_size_test images (`model.config["batch_size_test"] =
    8`), and raise InputError, one line, for what they cannot use.
    """

    def __init__(self, task, config, source, device, allow_missing=False):
        require(config, "bert_config", "image_res")
        self.task, self.source, self.device = task, source, device
        self.tokenizer = tokenizer_of(config)
        self.model = build_model(task, config, self.tokenizer)
        self.report = load_checkpoint(self.model, source, allow_missing, complete=True)
        self.model.to(device).eval()
        self.config = self.model.config
        self.transform = test_transform(config["image_res"])  # uint8 [3, H, W] -> uint8 [3, R, R]
        if device.type == "cuda":
            use_device(self.config, device)

    # ----------------------------------------------------------------------------------------------
    # images and texts by themselves and together: pre-training, retrieval, grounding

    @serves(*ALIGNED)
    def embed_images(self, images, workers=0):
        """Return the features of images, normalized, float32 [N, D] on the CPU; of one alone [D].

        A hundred thousand paths take no more memory than a batch and the features. workers:
        processes that read and resize them, 0 for this one.
        """
        images, one = as_images(images)
        config = {
            **self.config,
            "image_embeds": "recompute",
            "num_workers": check_number(workers, "workers", 0),
        }
        _, features = encode_images(self.model, Images(images, self.transform), config, self.device)
        return features.cpu()[0] if one else features.cpu()

    @serves(*ALIGNED)
    def embed_texts(self, texts):
        """Return the features of texts, normalized, float32 [N, D] on the CPU; of one alone [D]."""
        texts, one = self._captions(texts)
        parts = (texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS))
        encoded = (
            encode_texts(self.model, part, self.tokenizer, self.config, self.device)
            for part in parts
        )
        features = torch.cat([text_feat.cpu() for _, text_feat, _ in encoded])
        return features[0] if one else features

    @serves(*ALIGNED)
    def similarity(self, images, texts):
        """Return the contrastive similarities (ITC) of all images with all texts, from -1 to 1:
        [NI, NT], one pair a float.

        Either may be given as features, from embed_images and embed_texts.
        """
        image_feat, text_feat = (
            _features(images, self.embed_images),
            _features(texts, self.embed_texts),
        )
        _check_widths(image_feat, text_feat)
        sim = _check_finite(feature_similarity(_matrix(image_feat), _matrix(text_feat)))
        return _unwrap(sim, image_feat.ndim == 1, text_feat.ndim == 1)

    @serves(*ALIGNED)
    def match(self, images, texts):
        """Return the probabilities that images and texts belong together (ITM), of all pairs: [NI,
        NT], one pair a float.
        """
        (images, one_image), (texts, one_text) = as_images(images), self._captions(texts)
        pairs = torch.ones(len(images), len(texts), dtype=torch.bool)
        probs = self._itm(images, texts, pairs, lambda logits: logits.softmax(dim=1)[:, 1])
        return _unwrap(probs, one_image, one_text)

    @serves(*ALIGNED)
    def rank(
        self, images, texts, k=10, rerank=None, of="images", image_features=None, text_features=None
    ):
        """Return the k best images for each text, [(index, score), ...], the best first; with
        of="texts" texts for each image.

        As in the evaluation (Section 5), the `rerank` candidates with the highest similarity
        (default: k_test) are ranked by their ITM logit, which is their score. The others follow by
        similarity, which is their score. image_features, text_features: from embed_images and
        embed_texts, arrays of any float type, perhaps memory-mapped. With features, images and
        texts are read for the candidates only, and the ranked ones may be None if `rerank` is 0. A
        single query gives a single list.
        """
        if of not in ("images", "texts"):
            raise InputError(f"rank: of={of!r}, it is images or texts")
        check_number(k, "k", 1)
        rerank = self.config["k_test"] if rerank is None else check_number(rerank, "rerank", 0)
        if rerank and (images is None or texts is None):
            raise InputError(
                "rank: re-ranking reads images and texts themselves: give them beside their features, or rerank=0"
            )
        (images, one_image) = (
            (None, np.ndim(image_features) == 1) if images is None else as_images(images)
        )
        (texts, one_text) = (
            (None, np.ndim(text_features) == 1) if texts is None else self._captions(texts)
        )
        image_feat = (
            self.embed_images(images)
            if image_features is None
            else check_features(image_features, "image_features")
        )
        text_feat = (
            self.embed_texts(texts)
            if text_features is None
            else check_features(text_features, "text_features")
        )
        _check_widths(image_feat, text_feat)
        for what, values, features in (("images", images, image_feat), ("texts", texts, text_feat)):
            if values is not None and len(values) != len(_matrix(features)):
                raise InputError(
                    f"rank: {len(values)} {what} and {len(_matrix(features))} features: give one for each"
                )
        by_text = of == "images"
        queries, others = (text_feat, image_feat) if by_text else (image_feat, text_feat)
        # [Q, K]
        scores, best = most_similar(_matrix(queries), _matrix(others), max(k, rerank), self.device)
        if rerank:
            candidates = best[:, :rerank]
            query = torch.arange(len(best))[:, None].expand_as(candidates)
            image, text = (candidates, query) if by_text else (query, candidates)
            (own_images, i), (own_texts, t) = (
                numbers.unique(return_inverse=True) for numbers in (image, text)
            )
            pairs = torch.zeros(len(own_images), len(own_texts), dtype=torch.bool)
            pairs[i, t] = True
            matching = self._itm(
                [images[n] for n in own_images], [texts[n] for n in own_texts], pairs
            )[i, t]
            scores[:, :rerank], order = matching.sort(dim=1, descending=True, stable=True)
            best[:, :rerank] = candidates.gather(1, order)
        rows = [list(zip(*row)) for row in zip(best[:, :k].tolist(), scores[:, :k].tolist())]
        return rows[0] if (one_text if by_text else one_image) else rows

    def _itm(self, images, texts, pairs, score=matched):
        """Return the score of the pairs of images and texts, float32 [NI, NT].

        Arguments as ContrastiveModel.itm_scores takes them.
        """
        config = {**self.config, "image_embeds": "recompute"}
        image_embeds = ImageEmbeds(self.model, Images(images, self.transform), config, self.device)
        text_embeds, _, mask = encode_texts(
            self.model, texts, self.tokenizer, self.config, self.device
        )
        pairs, progress = pairs.to(self.device), functools.partial(progress_bar, what="matching")
        scores = self.model.itm_scores(
            image_embeds, text_embeds, mask, pairs, score=score, progress=progress
        )
        return scores.cpu()

    @serves(*ALIGNED)
    def ground(self, images, texts, boxes=None, mode="itm", block_num=None):
        """Return the boxes of a referring expression in its image, [([x, y, w, h], score), ...] in
        pixels, the best first.

        The score is Section 5's: the sum of the heat map in a box, divided by the root of its area.
        boxes: the candidates, as a detector finds them, for several pairs a list of such lists;
        without, the result is the best rectangle of whole patches. mode: itm or itc; block_num: the
        layer, by default the third multimodal one. Pairs as in `answer`.
        """
        items, texts, one = self._pairs(images, self._captions(texts))
        _check_explanation(mode, block_num)
        boxes = (
            [boxes] * len(items) if one or boxes is None else as_list(boxes, "lists of boxes", 0)
        )
        if len(boxes) != len(items):
            raise InputError(
                f"ground: {len(boxes)} lists of boxes for {len(items)} pairs of image and text: give one for each"
            )
        boxes = [
            None if candidates is None else as_list(candidates, "boxes", 0) for candidates in boxes
        ]
        for box in (box for candidates in boxes if candidates is not None for box in candidates):
            check_box(box)
        found, maps, sizes = [], [], []
        for part, image, part_sizes in self._batches(items):
            tokens = tokenize(
                texts[part], self.tokenizer, self.config["max_tokens"] or MAX_TOKENS
            ).to(self.device)
            heat = text_gradcam(self.model, *image, tokens, mode, block_num)
            # the mean over its own tokens, however many the longest text of the batch has
            if mode == "itm":
                heat *= (tokens.attention_mask.shape[1] / tokens.attention_mask.sum(dim=1))[
                    :, None, None
                ]
            maps += heat.cpu()
            sizes += part_sizes
        for heat, size, candidates in zip(maps, sizes, boxes):
            candidates = [best_rectangle(heat.numpy(), *size)] if candidates is None else candidates
            scored = zip(candidates, box_scores(heat, *size, candidates))
            found.append(sorted(scored, key=lambda box: -box[1]))
        return found[0] if one else found

    # ----------------------------------------------------------------------------------------------
    # the fine-tuned tasks

    @serves("vqa")
    def answer(self, images, questions, answers=None):
        """Return the answers to a question about an image with probabilities, [(text, p), ...], the
        best first.

        answers: a list to choose from, or the JSON file of one; p is the softmax over the k_test
        candidates with the likeliest first token, as in the evaluation. Without, the one answer
        that beam search finds, with its own probability. Several images and questions go in pairs;
        a single one goes with each of the others. The result is then a list of such lists.
        """
        items, questions, one = self._pairs(images, self._questions(questions))
        answers = _answer_list(answers)
        tokens = tokenize_answers(answers, self.model, self.tokenizer) if answers else None
        found = []
        for part, (image,), _ in self._batches(items):
            question = tokenize(questions[part], self.tokenizer, self.config["max_tokens"]).to(
                self.device
            )
            found += answer_questions(self.model, image, question, answers, tokens, self.tokenizer)
        return found[0] if one else found

    @serves("ve")
    def entails(self, images, texts):
        """Return whether a text follows from an image: {"contradiction": p, "neutral": p,
        "entailment": p}. Pairs: `answer`.
        """
        probs, one = self._predict(images, texts)
        found = [dict(zip(ve.LABELS, row)) for row in probs]
        return found[0] if one else found

    @serves("nlvr")
    def true_of(self, images, texts):
        """Return the probability that a text is true of a pair of images; for a list of texts, and
        of pairs, a list.
        """
        probs, one = self._predict(images, texts)
        found = [row[nlvr.LABELS["True"]] for row in probs]
        return found[0] if one else found

    def _predict(self, images, texts):
        """Return the probabilities of the classes of every pair of image and text, and whether
        there was one alone.
        """
        items, texts, one = self._pairs(images, self._captions(texts))
        probs = []
        for part, image, _ in self._batches(items):
            tokens = tokenize(texts[part], self.tokenizer, self.config["max_tokens"]).to(
                self.device
            )
            probs += self.model.predict(*image, tokens).softmax(dim=1).tolist()
        return probs, one

    # ----------------------------------------------------------------------------------------------
    # what the model looks at and expects

    @serves(*ALIGNED, "vqa", "ve", "nlvr", "relevance", "nlvr_pretrain", exact=True)
    def heat_map(self, images, texts, answers=None, mode="itm", block_num=None):
        """Return the HeatMap of the decision on an image and a text or question, by Grad-CAM
        (Figures 4 to 6).

        The decision is "match" in pre-training and retrieval, else the class or answer that the
        model finds; answers: as in `answer`. mode: itm, or itc for the contrastive similarity,
        which has no words. block_num: the layer, by default the third with cross-attention but
        never the last. Pairs as in `answer`, of two images as in `true_of`.
        """
        _check_explanation(mode, block_num)
        if mode == "itc" and self.task not in ALIGNED:
            raise InputError(
                f"heat_map: mode itc explains a contrastive similarity, which task {self.task} has none of"
            )
        vqa, answers = self.task == "vqa", _answer_list(answers)
        items, texts, one = self._pairs(
            images, self._questions(texts) if vqa else self._captions(texts)
        )
        found = []
        for (part, image, _), item, text in zip(self._batches(items, 1), items, texts):
            image, phrase = torch.cat(image), split_words(text, self.model, self.tokenizer)
            if mode == "itc":
                maps = explain_similarity(self.model, image, phrase, block_num)
            elif vqa:
                maps = explain_answer(self.model, image, phrase, answers, self.tokenizer, block_num)
            else:
                maps = explain_class(self.task, self.model, image, phrase, block_num)
            whole, by_word = (values.cpu().numpy() for values in (maps.whole, maps.by_word))
            whole, by_word = (whole, by_word) if len(item) == 2 else (whole[0], by_word[0])
            pictures = [read_image(picture).permute(1, 2, 0).numpy() for picture in item]
            words = phrase.words if mode == "itm" else []
            kind = "question" if vqa else "text"
            found.append(HeatMap(whole, by_word, words, maps.verdict, phrase.text, pictures, kind))
        return found[0] if one else found

    @serves("pretrain", exact=True)
    def fill_in(self, images, texts):
        """Return what the momentum model expects for each word of a caption (Figure 2), [(word,
        candidates), ...].

        A candidate for a word, which is masked, has text, score (its probability) and hit. Pairs as
        in `answer`.
        """
        if any(name.startswith("text_encoder_m.") for name in self.report.copied):
            raise InputError(
                f"fill_in: {self.source} has no momentum model (text_encoder_m.*): load that of the run, or one "
                "that tools.export --momentum has written"
            )
        items, texts, one = self._pairs(images, self._captions(texts))
        found = []
        for (part, (image,), _), text in zip(self._batches(items, 1), texts):
            phrase = split_words(text, self.model, self.tokenizer)
            image_embeds, _ = self.model.encode_image(image, momentum=True)
            found.append(
                list(
                    zip(
                        phrase.words, word_targets(self.model, image_embeds, phrase, self.tokenizer)
                    )
                )
            )
        return found[0] if one else found

    # ----------------------------------------------------------------------------------------------
    # what the methods are given

    def _captions(self, texts):
        return self._cleaned(texts, Ad if self.task == "relevance" else Entry)

    def _questions(self, texts):
        return self._cleaned(texts, Question)

    def _cleaned(self, texts, form):
        return as_texts(
            texts, functools.partial(form.clean, max_words=self.config["max_words"]), self.tokenizer
        )

    def _pairs(self, images, texts):
        """Return (the images of each pair of image and text, a list of one or two; the texts;
        whether there is one pair alone).

        texts: from as_texts. Raises InputError where they do not pair up.
        """
        texts, one = texts
        if self.task in PAIRS:
            items = [images] if one else as_list(images, "pairs of images")
            if any(not isinstance(item, (list, tuple)) or len(item) != 2 for item in items):
                raise InputError(
                    f"task {self.task} takes two images for each text: give a list of both, for several texts a "
                    "list of such lists"
                )
        else:
            images, one_image = as_images(images)
            items, one = [[image] for image in images], one and one_image
        count = max(len(items), len(texts))
        items, texts = (values * count if len(values) == 1 else values for values in (items, texts))
        if len(items) != len(texts):
            raise InputError(
                f"{len(items)} images and {len(texts)} texts are not pairs: give as many of each, or one of one"
            )
        return items, texts, one

    def _batches(self, items, size=None):
        """Yield (slice of items; their first and perhaps second images [B, 3, R, R]; the first
        ones' (height, width)).
        """
        size = size or self.config["batch_size_test"]
        for start in range(0, len(items), size):
            part, sizes, columns = slice(start, start + size), [], []
            for number, item in enumerate(items[part], start):
                pictures = [read_image(image, f"image {number}") for image in item]
                sizes.append(tuple(pictures[0].shape[1:]))
                columns.append([self.transform(picture) for picture in pictures])
            yield (
                part,
                [normalize(torch.stack(column).to(self.device)) for column in zip(*columns)],
                sizes,
            )


# --------------------------------------------------------------------------------------------------
# without a model


def most_similar(queries, candidates, k, device="cpu"):
    """Return similarities and indices [Q, min(k, N)] of the candidates most similar to each query,
    the best first.

    queries [Q, D], candidates [N, D]: tensors or arrays of any float type, perhaps memory-mapped;
    they are read block by block.
    """
    queries = as_float(queries).to(device)
    values = torch.empty(len(queries), 0, device=device)
    best = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    for start in range(0, len(candidates), BLOCK):
        sim = _check_finite(
            feature_similarity(queries, as_float(candidates[start : start + BLOCK]).to(device))
        )
        numbers = torch.arange(start, start + sim.shape[1], device=device).expand_as(sim)
        values, best = torch.cat([values, sim], dim=1), torch.cat([best, numbers], dim=1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        best = best.gather(1, order)
    return values.cpu(), best.cpu()


def best_rectangle(heat, height, width):
    """Return the box [x, y, w, h] in pixels, of whole patches, with the most heat [h, w] over the
    root of its area.
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
    top, bottom, left, right = np.unravel_index(scores.argmax(), scores.shape)
    return [
        left * width / columns,
        top * height / rows,
        (right - left) * width / columns,
        (bottom - top) * height / rows,
    ]


def as_float(values):
    """Return features, an array or tensor of any float type, as a tensor float32."""
    return (
        values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    ).float()


def _matrix(features):
    """Features of one alone [D] as [1, D], others as they are."""
    return features if features.ndim == 2 else features[None]


def _features(values, embed):
    """Return values as float32 if they are features, else `embed` of them."""
    return as_float(check_features(values, "features")) if is_features(values) else embed(values)


def _check_finite(similarities):
    """Return similarities. Raises InputError if features are NaN or infinite."""
    if not similarities.isfinite().all():
        raise InputError("features of images or texts are not finite: embed them anew")
    return similarities


def _check_widths(image_feat, text_feat):
    """Raise InputError if image and text features have different widths."""
    if image_feat.shape[-1] != text_feat.shape[-1]:
        raise InputError(
            f"features of {image_feat.shape[-1]} numbers for images and of {text_feat.shape[-1]} for texts do not "
            "compare: take both from one model; an array that is an image is uint8"
        )


def _check_explanation(mode, block_num):
    """Raise InputError for wrong arguments of a heat map; whether the model has the block is not
    checked.
    """
    if mode not in ("itm", "itc"):
        raise InputError(f"mode={mode!r}, it is itm or itc")
    if block_num is not None:
        check_number(block_num, "block_num", 0)


def _unwrap(matrix, one_row, one_column):
    """Return [NI, NT] without the dimension of a single image or text; a float for a single pair."""
    matrix = matrix[0] if one_row else matrix
    matrix = matrix[..., 0] if one_column else matrix
    return matrix if matrix.ndim else matrix.item()


def _answer_list(answers):
    if isinstance(answers, (str, Path)):
        return load_answer_list(answers)
    answers = [] if answers is None else as_list(answers, "answers", 0)
    if other := [answer for answer in answers if not isinstance(answer, str)]:
        raise InputError(
            f"answers: {other[0]!r} is not a text: give a list of texts, or the JSON file of one"
        )
    return answers
