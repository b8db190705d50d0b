"""Pictures of a run (--output_dir): curves.png from its TensorBoard files, retrieval.png from its result/retrieval.json.

Pictures of what a model sees (--checkpoint): heat maps of its decision on an image and a text (Figures 4 to 6 of the paper),
and with --pseudo_targets the words and texts that the momentum model proposes (Figure 2).
"""

from configs.flags import Flags
from utils import begin_script, run_script

flags = Flags(__doc__, '--checkpoint refcoco.pth --image photo.jpg --text "a man with a hat"')
flags.add_argument("--output_dir", help="the folder of a run, whose curves and rankings to draw")
flags.add_argument("--queries", type=int, default=5, help="queries of each direction in retrieval.png")
flags.add_argument("--checkpoint", help="the weights to explain, of any task")
flags.add_argument("--image", nargs="+", help="an image file, two for NLVR2 and text assignment")
flags.add_argument("--text", help="the text to explain, or the caption of --pseudo_targets")
flags.add_argument("--question", help="for VQA, in place of --text")
flags.add_argument("--answer", help="explain this answer; else the best of the answer list, else a generated one")
flags.add_argument("--gradcam_mode", choices=["itm", "itc"], default="itm",
                   help="itm: cross-attention, a map for each word; itc: the image encoder's self-attention")  # fmt: skip
flags.add_argument("--block_num", type=int, help="the layer, counted from 0: by default the third with cross-attention "
                   "(8 of 12) but never the last, for itc the last of the image encoder")  # fmt: skip
flags.add_argument("--pseudo_targets", action="store_true", help="the momentum model's words and texts for an image")
flags.add_argument("--texts", help="texts to choose from: one a line, or a JSON list with captions; test_file by default")
flags.add_argument("--to", help="the picture to write: heatmap.png or pseudo_targets.png by default")
flags.add_argument("--config", help="for a checkpoint without one: the YAML file it was trained with")
flags.add_set()
flags.add_argument("--allow_missing", action="store_true", help="weights missing in --checkpoint stay random")
flags.add_argument("--device", help="cuda, cuda:1, ... or cpu; by default cuda where there is a GPU")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
from pathlib import Path

import torch

from dataset.annotations import check_entry, read_json_list
from dataset.caption import Captioned
from dataset.images import load_image
from dataset.text import MAX_QUESTION_WORDS, MAX_WORDS, pre_caption, pre_question
from dataset.transforms import normalize, test_transform
from dataset.vqa import load_answer_list
from visualize.explain import (
    UNKNOWN, explain_answer, explain_class, explain_similarity, split_words, text_targets, word_targets,
)  # fmt: skip
from engine.configuration import choose_config
from engine.curves import read_curves
from engine.processes import init_process_group
from models import build_model, task_of
from models.checkpoint import load_checkpoint, named_tensors, read_checkpoint
from models.tokenizer import tokenizer_of
from visualize.draw import TITLES, draw_curves, draw_heat_maps, draw_pseudo_targets, draw_retrieval
from configs.schema import require
from utils import InputError

ALIGNED = ("pretrain", "retrieval")  # tasks whose models have a contrastive similarity
PAIRED = ("nlvr", "nlvr_pretrain")  # tasks of two images


# ---------------------------------------------------------------------------------------------------------------------
# a run


def picture_run(folder, queries):
    """Draws curves.png and retrieval.png of a run, as far as it has what they show."""
    tensorboard, result = folder / "tensorboard", folder / "result/retrieval.json"
    if not (tensorboard.is_dir() or result.exists()):
        raise InputError(f"--output_dir {folder}: no run there, it has neither tensorboard nor result/retrieval.json")
    if tensorboard.is_dir():
        curves = read_curves(tensorboard)
        if not TITLES.keys() & curves.keys():
            raise InputError(f"{tensorboard}: no curves there yet, train first")
        draw_curves(curves, folder / "curves.png")
        print(f"wrote {folder / 'curves.png'}")
    if result.exists():
        rankings = json.loads(result.read_text())
        try:
            draw_retrieval(rankings, rankings["image_root"], folder / "retrieval.png", queries)
        except OSError as error:
            raise InputError(f"{result}: image {error}") from None
        print(f"wrote {folder / 'retrieval.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# a model


def check_flags(args, task, state):
    """Raises InputError where the flags do not go with the task of the checkpoint, before anything slow."""
    where = f"checkpoint {args.checkpoint} is of task {task}"
    count = 2 if task in PAIRED else 1
    if len(args.image) != count:
        raise InputError(f"--image: {where}, which takes {count} image{'s' * (count - 1)}; {len(args.image)} given")
    if args.pseudo_targets:
        if task != "pretrain":
            raise InputError(f"--pseudo_targets: {where}; only pre-training has a momentum model of words and texts")
        if not any(name.startswith("text_encoder_m.") for name in state):
            raise InputError(f"--pseudo_targets: checkpoint {args.checkpoint} has no momentum model (text_encoder_m.*)")
    wanted, other = ("question", "text") if task == "vqa" else ("text", "question")
    if getattr(args, other) is not None:
        raise InputError(f"--{other}: {where}; pass --{wanted} instead")
    if getattr(args, wanted) is None:
        raise InputError(f"--{wanted} is missing: {where}")
    if args.answer and task != "vqa":
        raise InputError(f"--answer: {where}; only VQA has answers")
    if args.gradcam_mode == "itc" and task not in ALIGNED:
        raise InputError(f"--gradcam_mode itc: {where}; only pre-training and retrieval have a contrastive similarity")


def load_model(args):
    """The task, the model in eval mode on --device, and the tokenizer of --checkpoint."""
    device = init_process_group(args.device)
    file = read_checkpoint(args.checkpoint)
    state = named_tensors(file, args.checkpoint)
    task = task_of(state)
    check_flags(args, task, state)
    del file, state  # load_checkpoint reads the file again
    config, _, text = choose_config(task, args, args.checkpoint)
    print(f"configuration: {text}")
    require(config, "bert_config", "image_res")
    tokenizer = tokenizer_of(config)
    model = build_model(task, config, tokenizer)
    print(load_checkpoint(model, args.checkpoint, args.allow_missing, complete=True))
    return task, model.to(device).eval(), tokenizer


def read_images(paths):
    """Images of --image: list of uint8 [3, H, W]."""
    try:
        return [load_image(path) for path in paths]
    except OSError as error:
        raise InputError(f"--image: {error}") from None


def read_texts(path):
    """The texts of a file, cleaned up, each once: captions of a JSON list, else the lines."""
    if Path(path).suffix == ".json":
        texts = []
        for number, entry in read_json_list(path):
            texts += check_entry(entry, Captioned, path, number).texts
    else:
        try:
            texts = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--texts {path}: cannot be read as text, one a line: {error}") from None
    texts = list(dict.fromkeys(pre_caption(text, MAX_WORDS) for text in texts))
    return [text for text in texts if text]


def candidate_texts(args, config):
    """The texts to compare an image with: of --texts, else of the configuration's test_file; none if it is out of reach."""
    if args.texts:
        texts = read_texts(args.texts)
        if not texts:
            raise InputError(f"--texts {args.texts}: no text in it")
        return texts
    files = [path for path in config["test_file"] or [] if Path(path).is_file()]
    if not files:
        print("note: no texts to compare with, as --texts is not given and the checkpoint's test_file is out of reach")
    return list(dict.fromkeys(text for path in files for text in read_texts(path)))


def candidate_answers(args, config):
    """The answers to choose from: --answer, else those of the configuration's answer_list; none if it is out of reach."""
    if args.answer:
        return [args.answer]
    path = config["answer_list"]
    if not path or not Path(path).is_file():
        print("note: the answer is generated, as --answer is not given and the checkpoint's answer_list is out of reach")
        return []
    return load_answer_list(path)


def read_phrase(args, model, tokenizer):
    """The text or question as the model reads it. Raises InputError where clean-up leaves nothing of it."""
    text = pre_caption(args.text, MAX_WORDS) if args.text is not None else pre_question(args.question, MAX_QUESTION_WORDS)
    phrase = split_words(text, model, tokenizer)
    if not phrase.words:
        flag, given = ("text", args.text) if args.text is not None else ("question", args.question)
        raise InputError(f"--{flag} {given!r}: nothing is left of it after clean-up, give a text with words")
    return phrase


def about_unknown(phrase):
    """A line on the words that the vocabulary lacks, where there are some: the model cannot tell them apart."""
    lacking = [word.removesuffix(UNKNOWN) for word in phrase.words if word.endswith(UNKNOWN)]
    return [f"not in the vocabulary, all the same to the model: {', '.join(lacking)}"] if lacking else []


def picture_heat_maps(args, images, image, task, model, tokenizer):
    """Draws the heat maps of a decision. images: uint8 [H, W, 3] each; image [I, 3, R, R]: as the model takes them."""
    phrase = read_phrase(args, model, tokenizer)
    if args.gradcam_mode == "itc":
        maps = explain_similarity(model, image, phrase, args.block_num)
    elif task == "vqa":
        answers = candidate_answers(args, model.config)
        maps = explain_answer(model, image, phrase, answers, tokenizer, args.block_num)
    else:
        maps = explain_class(task, model, image, phrase, args.block_num)
    whole, by_word = maps.whole.cpu().numpy(), maps.by_word.cpu().numpy()
    panels = [(f"whole {'question' if task == 'vqa' else 'text'}", whole)]
    panels += [(word, by_word[:, number]) for number, word in enumerate(phrase.words[: by_word.shape[1]])]
    draw_heat_maps(images, panels, [phrase.text.strip(), maps.verdict, *about_unknown(phrase)], args.to)


def picture_pseudo_targets(args, images, image, model, tokenizer):
    """Draws the momentum model's words and texts for an image and its caption. Arguments as in picture_heat_maps."""
    phrase = read_phrase(args, model, tokenizer)
    texts = candidate_texts(args, model.config)
    with torch.no_grad():
        image_embeds, image_feat = model.encode_image(image, momentum=True)
    words = list(zip(phrase.words, word_targets(model, image_embeds, phrase, tokenizer)))
    best = text_targets(model, image_feat, texts, phrase.text, tokenizer) if texts else []
    title = [f"caption: {phrase.text}", *about_unknown(phrase), "what the momentum model expects in place of each word:"]
    draw_pseudo_targets(images[0], words, best, title, f"the most similar of {len(texts)} texts:", args.to)


def picture_model(args):
    """Draws what a checkpoint makes of an image and a text."""
    args.to = Path(args.to or ("pseudo_targets.png" if args.pseudo_targets else "heatmap.png"))
    if args.to.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise InputError(f"--to {args.to}: the name of a picture ends in .png, .jpg, .pdf or .svg")
    if args.to.is_dir() or not os.access(args.to.parent, os.W_OK):
        raise InputError(f"--to {args.to}: cannot write there, name a file in a folder that exists")
    if not args.image:
        raise InputError("--image is missing: name the image to explain")
    images = read_images(args.image)
    task, model, tokenizer = load_model(args)
    resize = test_transform(model.config["image_res"])
    image = normalize(torch.stack([resize(picture) for picture in images])).to(next(model.parameters()).device)
    images = [picture.permute(1, 2, 0).numpy() for picture in images]
    if args.pseudo_targets:
        picture_pseudo_targets(args, images, image, model, tokenizer)
    else:
        picture_heat_maps(args, images, image, task, model, tokenizer)
    print(f"wrote {args.to}")


def main():
    args = flags.parse_args()
    if bool(args.output_dir) == bool(args.checkpoint):
        raise InputError("name either --output_dir, a run to draw, or --checkpoint, a model to explain")
    if args.output_dir:
        picture_run(Path(args.output_dir), args.queries)
    else:
        picture_model(args)


if __name__ == "__main__":
    run_script(main)
