"""tools.visualize: a picture for every task, words, candidates of the momentum model, bad input."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from configs.tasks import detect_task
from models import build_model
from models.gradcam import default_block, itm_gradcam
from models.tokenizer import build_tokenizer
from tools import visualize as tool
from utils import InputError, Text, TrainingStopped, seed_everything
from visualize import draw
from visualize.draw import Effect, Panel, draw_effects, draw_heat_maps, draw_panels
from visualize.explain import (
    explain_answer,
    explain_class,
    find_answer,
    join_pieces,
    split_words,
    text_targets,
    word_targets,
)

MATPLOTLIB = "DejaVu Sans", "STIXGeneral"  # fonts that it brings
VOCAB = ROOT / "tests/golden/vocab.txt"
TASKS = ["pretrain", "retrieval", "vqa", "ve", "nlvr", "nlvr_pretrain"]
TEXT = {task: ["--text", "Two surfing dogs!"] for task in TASKS} | {
    "vqa": ["--question", "what is the dog riding?"]
}


@pytest.fixture
def config(tiny_config):
    """A tiny configuration with a vocabulary that is known here."""
    size = len(VOCAB.read_text().splitlines())
    bert = {**tiny_config["bert_config"], "vocab_size": size}
    return {**tiny_config, "bert_config": bert, "tokenizer": str(VOCAB)}


@pytest.fixture
def tokenizer():
    return build_tokenizer(str(VOCAB))


@pytest.fixture
def make(config, tokenizer):
    """Builds the random tiny model of a task in eval mode, with more keys of the configuration."""

    def build(task, **keys):
        seed_everything(1)
        return build_model(task, {**config, **keys}, tokenizer).eval()

    return build


@pytest.fixture
def pictures(tmp_path):
    """A landscape and a portrait photo."""
    random = np.random.default_rng(0)
    for name, size in (("wide.jpg", (40, 90, 3)), ("tall.jpg", (120, 60, 3))):
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(tmp_path / name)
    return [str(tmp_path / "wide.jpg"), str(tmp_path / "tall.jpg")]


@pytest.fixture
def visualize(make, pictures, tmp_path, monkeypatch, run_main):
    """Runs the tool on a task's checkpoint and fitting images.

    Returns (exit status, stdout, stderr).
    """

    def call(task, *flags, images=None, keys=(), checkpoint=None):
        if checkpoint is None:
            model = make(task, **dict(keys))
            checkpoint = {"model": model.state_dict(), "config": model.config.to_dict()}
        torch.save(checkpoint, tmp_path / f"{task}.pth")
        images = pictures[: 2 if "nlvr" in task else 1] if images is None else images
        monkeypatch.chdir(tmp_path)
        arguments = ["--checkpoint", tmp_path / f"{task}.pth", "--image", *images]
        return run_main("tools.visualize", *arguments, "--device", "cpu", *flags)

    return call


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_a_picture(visualize, tmp_path, task):
    status, out, err = visualize(task, *TEXT[task])
    assert status == 0, err
    assert out.splitlines()[-1] == "wrote heatmap.png"
    width, height = Image.open(tmp_path / "heatmap.png").size
    assert width > 500 and height > 150


def test_contrastive_maps_and_another_block_and_name(visualize, tmp_path):
    status, _, err = visualize(
        "retrieval",
        *TEXT["retrieval"],
        "--gradcam_mode",
        "itc",
        "--block_num",
        "0",
        "--output",
        "itc.pdf",
    )
    assert status == 0, err
    assert (tmp_path / "itc.pdf").read_bytes().startswith(b"%PDF")


def test_overrides_reach_the_saved_configuration(visualize):
    status, out, err = visualize("ve", *TEXT["ve"], "--set", "image_res=48")
    assert status == 0 and "resized: 2 (visual_encoder" in err
    status, _, err = visualize("ve", *TEXT["ve"], "--set", "image_rse=48")
    assert status == 2 and "--set image_rse" in err and "did you mean image_res?" in err


def test_a_bare_state_dict_takes_a_configuration(visualize, make, tmp_path):
    state = make("retrieval").state_dict()
    (tmp_path / "config.yaml").write_text(
        json.dumps(make("retrieval").config.to_dict())
    )  # JSON is YAML
    flags = ["--text", "dog", "--config", "config.yaml"]
    assert visualize("retrieval", *flags, checkpoint=state)[0] == 0


def test_pictures_of_pseudo_targets(visualize, tmp_path):
    status, out, err = visualize("pretrain", "--pseudo_targets", "--text", "two red dogs")
    assert (
        status == 0 and out.splitlines()[-1] == "wrote pseudo_targets.png" and "note" not in err
    ), err
    with_texts = Image.open(tmp_path / "pseudo_targets.png").size
    status, out, err = visualize(
        "pretrain", "--pseudo_targets", "--text", "two red dogs", keys={"test_file": None}
    )
    assert status == 0 and "so no texts are ranked" in err
    assert Image.open(tmp_path / "pseudo_targets.png").height < with_texts[1]


def test_titles_are_cut_only_if_they_do_not_fit():
    long = "x" * 80
    assert draw._fit(long, 12, 12) == (long, 12)
    cut, size = draw._fit(long, 2, 12)
    assert cut == "x" * 35 + "…" and size == pytest.approx(2 * 72 / 0.6 / 36)
    assert draw._fit("dog", 2, 12) == ("dog", 12)


def test_texts_are_lines_or_captions(tmp_path):
    (tmp_path / "texts.txt").write_text("A red dog!\n\n ?\na red dog\ntwo cats\n")
    assert tool.read_texts(tmp_path / "texts.txt", 30) == ["a red dog", "two cats"]
    (tmp_path / "texts.json").write_text(
        json.dumps([{"caption": ["A dog", "a cat"]}, {"caption": "a dog."}])
    )
    assert tool.read_texts(tmp_path / "texts.json", 30) == ["a dog", "a cat"]
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "a dog"}]))
    with pytest.raises(InputError, match="texts.json: entry 0 .* missing required field 'caption'"):
        tool.read_texts(tmp_path / "texts.json", 30)


def pieces(tokenizer, ids):
    """The word pieces of token ids."""
    return [tokenizer.convert_ids_to_tokens(int(token)) for token in ids]


def test_the_pieces_of_a_word_are_joined(make, tokenizer):
    phrase = split_words("the unableness is $5", make("retrieval"), tokenizer)
    assert pieces(tokenizer, phrase.tokens.input_ids[0]) == [
        "[CLS]",
        "the",
        "un",
        "##able",
        "##ness",
        "is",
        "$",
        "5",
    ]
    assert phrase.words == ["the", "unableness", "is", "$", "5"]
    assert phrase.pieces == [[1], [2, 3, 4], [5], [6], [7]]
    heat = torch.arange(8.0)[None, :, None, None].expand(2, 8, 3, 3)
    joined = join_pieces(heat, phrase.pieces)
    assert joined.shape == (2, 5, 3, 3)
    assert joined[1, :, 2, 2].tolist() == [1, 3, 5, 6, 7]


def test_maps_of_matching_are_those_of_the_released_function(make, tokenizer):
    model, image = make("retrieval"), torch.randn(1, 3, 32, 32)
    phrase = split_words("two dogs walking", model, tokenizer)
    maps = explain_class("retrieval", model, image, phrase)
    heat = itm_gradcam(model, image, phrase.tokens, default_block(model, words=True))
    assert torch.equal(maps.whole, heat.mean(dim=1))
    assert torch.equal(maps.by_word, join_pieces(heat, phrase.pieces))
    with torch.no_grad():
        fused = model.fuse(
            model.encode_text(phrase.tokens)[0],
            phrase.tokens.attention_mask,
            model.encode_image(image)[0],
        )
        prob = model.itm_logits(fused).softmax(dim=1)[0, 1]
    assert maps.verdict == f"match {100 * prob:.1f}%"


@pytest.mark.parametrize(
    "task, names",
    [
        ("ve", ["contradiction", "neutral", "entailment"]),
        ("nlvr", ["False", "True"]),
        ("nlvr_pretrain", ["first", "second", "neither"]),
    ],
)
def test_the_verdict_is_the_prediction(make, tokenizer, task, names):
    model = make(task)
    images = torch.randn(2 if "nlvr" in task else 1, 3, 32, 32)
    phrase = split_words("a dog", model, tokenizer)
    maps = explain_class(task, model, images, phrase)
    assert maps.by_word.shape == (len(images), 2, 2, 2)
    with torch.no_grad():
        probs = model.predict(*images[:, None], phrase.tokens).softmax(dim=1)[0]
    assert maps.verdict == f"{names[probs.argmax()]} {100 * probs.max():.1f}%"


@torch.no_grad()
def test_an_answer_is_ranked_or_generated_and_scored(make, tokenizer):
    model, image = make("vqa", k_test=3), torch.randn(1, 3, 32, 32)
    question = split_words("what is red", model, tokenizer)
    answers = ["two dogs", "red", "surfboard"]
    listed = tokenizer([f"{answer}[SEP]" for answer in answers], padding=True, return_tensors="pt")
    best = model.rank_answers(
        image, question.tokens, Text(listed["input_ids"], listed["attention_mask"]), 3
    )[0][0, 0]
    answer, ids = find_answer(model, image, question, answers, tokenizer)
    assert answer == answers[best]
    assert pieces(tokenizer, ids[0]) == [
        "[CLS]",
        *pieces(tokenizer, tokenizer(answer)["input_ids"])[1:],
        "[SEP]",
    ]

    states = model.encode_question(image, question.tokens)
    ids = tokenizer("two dogs[SEP]", return_tensors="pt")["input_ids"]
    log_probs = model.answer_logits(states, ids, torch.tensor([0]))[0].log_softmax(dim=1)
    log_p = log_probs[range(ids.shape[1] - 1), ids[0, 1:]].sum()
    maps = explain_answer(model, image, question, ["two dogs"], tokenizer)
    assert maps.verdict == f"answer: two dogs, log p {log_p:.2f}"

    model.generate = lambda image, question, beams: (
        [tokenizer("blue")["input_ids"][1:]],
        torch.zeros(1),
    )
    answer, ids = find_answer(model, image, question, [], tokenizer)
    assert answer == "blue" and pieces(tokenizer, ids[0]) == [
        "[CLS]",
        "blue",
        "[SEP]",
    ]


def test_answers_come_from_the_flag_or_the_list(visualize, tmp_path):
    (tmp_path / "answers.json").write_text('["red", "blue"]')
    answers = {"answer_list": str(tmp_path / "answers.json")}
    assert "generates" in visualize("vqa", "--question", "what color")[2]
    assert "generates" not in visualize("vqa", "--question", "what color", keys=answers)[2]
    assert "generates" not in visualize("vqa", "--question", "what color", "--answer", "red")[2]
    (tmp_path / "answers.json").write_text('{"red": 1}')
    status, _, err = visualize("vqa", "--question", "what color", keys=answers)
    assert status == 2 and "answers.json" in err and "answer_list" in err


@torch.no_grad()
def test_words_of_a_hand_made_head(make, tokenizer):
    """The head of the momentum model maps a token's embedding to its bias alone; then the words are
    those of the bias.
    """
    model = make("pretrain")
    head = model.text_encoder_m.cls.predictions
    head.transform.LayerNorm.weight.zero_()
    head.transform.LayerNorm.bias.zero_()
    expected = ["dog", "cat", "##ness", "water", "ball"]
    head.bias[[tokenizer.convert_tokens_to_ids(token) for token in expected]] = torch.tensor(
        [9.0, 8, 7, 6, 5]
    )
    phrase = split_words("unableness of cat", model, tokenizer)
    embeds, _ = model.encode_image(torch.randn(1, 3, 32, 32), momentum=True)
    words = word_targets(model, embeds, phrase, tokenizer)
    assert [[candidate.text for candidate in row] for row in words] == [expected] * 3
    assert [[candidate.hit for candidate in row] for row in words] == [
        [False] * 5,
        [False] * 5,
        [False, True] + [False] * 3,
    ]
    assert words[0][0].score == pytest.approx(head.bias.softmax(dim=0).max().item())


@torch.no_grad()
def test_a_masked_word_is_predicted_from_its_own_position(make, tokenizer):
    model = make("pretrain")
    phrase = split_words("two unable dogs", model, tokenizer)
    embeds, _ = model.encode_image(torch.randn(1, 3, 32, 32), momentum=True)
    masked = phrase.tokens.input_ids.clone()
    masked[0, [2, 3]] = tokenizer.mask_token_id  # "unable"
    mask, bert = phrase.tokens.attention_mask, model.bert_m
    fused = bert.fuse(bert.encode_text(masked, mask), mask, bert.image_keys_values(embeds))
    probs = model.text_encoder_m.cls.predictions(fused[0, 2]).softmax(dim=0)
    found = word_targets(model, embeds, phrase, tokenizer)[1]
    assert [c.score for c in found] == pytest.approx(probs.topk(5).values.tolist(), rel=1e-4)


@torch.no_grad()
def test_texts_are_the_most_similar_by_momentum_features(make, tokenizer):
    model = make("pretrain")
    texts = [
        f"{color} {animal}"
        for color in ("red", "blue", "green")
        for animal in ("dog", "cat", "tail walking slowly")
    ]
    feats = torch.cat(
        [
            model.encode_text(split_words(text, model, tokenizer).tokens, momentum=True)[1]
            for text in texts
        ]
    )
    image_feat = feats[7:8]  # an image whose feature is that of text 7
    found = text_targets(model, image_feat, texts, texts[7], tokenizer)
    assert len(found) == 5 and found[0].text == texts[7] and found[0].hit and not found[1].hit
    values, best = (feats @ image_feat[0] / model.temp).softmax(dim=0).topk(5)
    assert [candidate.text for candidate in found] == [texts[i] for i in best]
    assert [candidate.score for candidate in found] == pytest.approx(values.tolist(), abs=1e-5)
    assert len(text_targets(model, image_feat, texts[:2], "", tokenizer)) == 2


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from here on."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kwargs: (found.append(figure), save(figure, *args, **kwargs)),
    )
    return found


def test_heat_maps_share_a_scale_and_a_color_bar_and_show_the_image(figures, tmp_path):
    images = [np.full((40, 80, 3), 128, np.uint8), np.full((80, 40, 3), 255, np.uint8)]
    heats = [np.zeros((2, 2, 4)), np.full((2, 2, 4), 3.0)]
    heats[0][1, 0, 3] = 7
    draw_heat_maps(
        images, [("whole text", heats[0]), ("dog", heats[1])], ["dog"], tmp_path / "a.png"
    )
    *axes, bar = figures[0].axes
    maps = [axis.images[1] for axis in axes if len(axis.images) > 1]
    assert [heat.get_clim() for heat in maps] == [(0, 7)] * 4 == [bar.get_ylim()] * 4
    assert [axis.get_title() for axis in axes if axis.get_title()] == [
        "images",
        "whole text",
        "dog",
    ]
    # over all of its image
    sizes = [(80, 40), (80, 40), (40, 80), (40, 80)]
    for heat, (width, height) in zip(maps, sizes, strict=True):
        assert heat.get_extent() == [0, width, height, 0] == heat.axes.images[0].get_extent()
        opacity = heat.to_rgba(np.array([0, 3.5, 7]))[:, 3]
        assert opacity[0] == 0 < opacity[1] < opacity[2] < 0.7
    red, green, blue, _ = maps[0].to_rgba(7)
    assert red > 2 * green and red > 2 * blue


def test_without_any_heat_there_is_a_picture(figures, tmp_path):
    draw_heat_maps(
        [np.zeros((40, 80, 3), np.uint8)],
        [("whole text", np.zeros((1, 2, 2)))],
        ["dog"],
        tmp_path / "a.png",
    )
    assert figures[0].axes[1].images[1].get_clim() == (0, 1)


def test_a_text_is_drawn_in_the_fonts_that_have_its_characters(figures, tmp_path, monkeypatch):
    regular = [
        f for f in font_manager.fontManager.ttflist if (f.style, f.weight) == ("normal", 400)
    ]
    fonts = {font.name: font for font in regular}
    characters = {name: set(FT2Font(fonts[name].fname).get_charmap()) for name in MATPLOTLIB}
    rare = map(chr, sorted(characters["STIXGeneral"] - characters["DejaVu Sans"]))
    rare = next(character for character in rare if character.isalpha())

    def draw(*names):
        installed = [fonts[name] for name in names]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", installed)
        image, panels = np.zeros((40, 80, 3), np.uint8), [(rare, np.zeros((1, 2, 2)))]
        draw_heat_maps([image], panels, [f"{rare} 赤 ด $5 $6 é"], tmp_path / "a.png")
        assert figures[-1].get_suptitle() == f"{rare} 赤 ด $5 $6 é"
        return figures[-1].axes[1].title.get_fontfamily()

    with pytest.warns(UserWarning, match="CJK UNIFIED IDEOGRAPH-8D64.* missing from font"):
        draw("DejaVu Sans")
    with pytest.warns(UserWarning, match="missing from font") as caught:
        assert "STIXGeneral" in draw(*MATPLOTLIB)
    assert not [warning for warning in caught if str(ord(rare)) in str(warning.message)]


def test_words_that_the_vocabulary_lacks_are_marked(visualize, figures, make, tokenizer):
    phrase = split_words("two щ dogs", make("retrieval"), tokenizer)
    assert phrase.words == ["two", "щ [UNK]", "dogs"]
    # a byte that is not UTF-8
    assert split_words("two\udcff dogs", make("retrieval"), tokenizer).words == ["two", "dogs"]
    for flags in [], ["--pseudo_targets"]:
        status, _, err = visualize("pretrain", "--text", "Two щ dogs!", *flags)
        assert status == 0, err
        labels = [axis.get_title() or axis.get_title("left") for axis in figures[-1].axes]
        assert "щ [UNK]" in labels and "dogs" in labels
        assert (
            "not in the vocabulary, so the model reads each as [UNK]: щ"
            in figures[-1].get_suptitle()
        )


def test_the_task_is_read_from_the_tensors(make):
    for task in TASKS:
        assert detect_task(make(task).state_dict()) == task
    with pytest.raises(InputError, match="cannot tell the task"):
        detect_task({"cls_token": torch.zeros(1)})


DOG = ["--text", "dog"]
CASES = {
    "missing image": ("ve", DOG, ["no.jpg"], ["no.jpg: does not exist"]),
    "folder": ("ve", DOG, ["."], [".: is a folder"]),
    "URL": ("ve", DOG, ["https://host/a.jpg"], ["https://host/a.jpg: is a URL"]),
    "unknown block": ("ve", [*DOG, "--block_num", "1"], None, ["--block_num 1", "2 to 3"]),
    "unknown block of the ViT": (
        "pretrain",
        [*DOG, "--gradcam_mode", "itc", "--block_num", "2"],
        None,
        ["0 to 1"],
    ),
    "no text": ("retrieval", [], None, ["--text is missing"]),
    "answer for VE": ("ve", [*DOG, "--answer", "cat"], None, ["--answer", "only VQA"]),
    "one image for NLVR2": (
        "nlvr",
        DOG,
        ["wide.jpg"],
        ["--image: task nlvr takes 2 images, not 1"],
    ),
    "two images for VE": ("ve", DOG, ["wide.jpg", "tall.jpg"], ["takes 1 image, not 2"]),
    "pseudo-targets of VE": ("ve", [*DOG, "--pseudo_targets"], None, ["fill_in", "task ve"]),
    "similarity of VE": ("ve", [*DOG, "--gradcam_mode", "itc"], None, ["needs a similarity"]),
    "empty text": ("ve", ["--text", " ?! "], None, ["text ' ?! '", "nothing is left"]),
    "empty question": ("vqa", ["--question", "?"], None, ["text '?'", "nothing is left"]),
    "nowhere to write": ("ve", [*DOG, "--output", "no/x.png"], None, ["--output no/x.png"]),
    "no picture format": ("ve", [*DOG, "--output", "x.txt"], None, ["--output x.txt", ".png"]),
    "missing texts": (
        "pretrain",
        [*DOG, "--pseudo_targets", "--texts", "no.txt"],
        None,
        ["--texts no.txt"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(visualize, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    task, flags, images, words = CASES[case]
    status, _, err = visualize(task, *flags, images=images)
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and all(word in last for word in words), err
    assert not (tmp_path / "heatmap.png").exists()


def test_pseudo_targets_need_momentum_weights(visualize, make):
    model = make("pretrain")
    state = {name: value for name, value in model.state_dict().items() if "_m." not in name}
    checkpoint = {"model": state, "config": model.config.to_dict()}
    status, _, err = visualize(
        "pretrain", "--text", "dog", "--pseudo_targets", checkpoint=checkpoint
    )
    assert status == 2 and "no momentum model" in err


def test_a_run_or_a_checkpoint_must_be_named(visualize):
    status, _, err = visualize("ve", "--text", "dog", "--run", "run")
    assert status == 2 and "either --run" in err


@pytest.mark.parametrize(
    "content", ["", "[1, ", "[]", '{"image_to_text": []}', '{"text_to_image": 3, "image_root": ""}']
)
def test_results_that_no_evaluation_has_written_are_one_line(tmp_path, run_main, content):
    (tmp_path / "result").mkdir()
    for name in ("retrieval", "attributes"):
        (tmp_path / f"result/{name}.json").write_text(content)
        status, _, said = run_main("tools.visualize", "--run", tmp_path)
        assert status == 2 and said.count("\n") == 1
        assert f"result/{name}.json: not the result of an evaluation" in said
        (tmp_path / f"result/{name}.json").unlink()


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("before")
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, file, **_: (file.write(b"half"), file.seek(-9)),
    )
    picture, heat = np.zeros((40, 80, 3), np.uint8), np.zeros((1, 2, 2))
    with pytest.raises(TrainingStopped, match=r"cannot write .*a\.png"):
        draw_heat_maps([picture], [("whole text", heat)], ["dog"], tmp_path / "a.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.png", "before")]


def test_rankings_whose_images_are_gone_are_one_line(tmp_path, run_main):
    result = {"probability": 0.5, "hit": True, "image": "a.jpg", "caption": "dog"}
    query = {"image": "a.jpg", "caption": "dog", "results": [result], "itc_results": [result]}
    (tmp_path / "result").mkdir()
    rankings = {"image_root": "gone", "text_to_image": [query], "image_to_text": [query]}
    rankings |= {"k": 4, "ranking": None}
    (tmp_path / "result/retrieval.json").write_text(json.dumps(rankings))
    status, _, said = run_main("tools.visualize", "--run", tmp_path)
    assert status == 2
    assert "result/retrieval.json: image gone/a.jpg: does not exist" in said


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_a_caption_is_drawn_alone_with_its_best_images(
    pictures, tmp_path, monkeypatch, run_main, by
):
    figures, save = [], draw._save
    monkeypatch.setattr(draw, "_save", lambda *args: (figures.append(args[0]), save(*args)))
    result = {"probability": 0.5, "hit": True, "image": pictures[0]}
    other = {"probability": 0.25, "hit": False, "image": pictures[1]}
    query = {"caption": "a dog", "results": [result, other], "itc_results": [other] * 9}
    rankings = {"image_root": "", "text_to_image": [query], "image_to_text": [{}] * 1500, "k": 4}
    rankings["ranking"] = {"by": by, "k": 4, "itc": 30.0, "itm": 20.0}
    (tmp_path / "result").mkdir()
    (tmp_path / "result/retrieval.json").write_text(json.dumps(rankings))
    assert run_main("tools.visualize", "--run", tmp_path, "--caption", "a dog")[0] == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"query.png"}
    titles = [axis.get_title() for axis in figures[0].axes]
    wrong = [f"{place}: 25.0%" for place in range(1, 6)]
    assert titles == (wrong if by == "itc" else ["1: 50.0%", "2: 25.0%"])
    assert figures[0].get_suptitle() == "“a dog”"
    assert f"1,500 images by {by.upper()}" in figures[0].get_supxlabel()
    status, _, error = run_main("tools.visualize", "--run", tmp_path, "--caption", "a cat")
    assert status == 2 and "no such caption" in error


@pytest.mark.parametrize("by", ["itc", "itm", None])
def test_both_rankings_are_drawn_and_the_measured_one_comes_first(pictures, monkeypatch, by):
    figures = []
    monkeypatch.setattr(draw, "_save", lambda figure, path: figures.append(figure))
    result = {"probability": 0.5, "hit": True, "image": pictures[0], "caption": "dog"}
    other = {"probability": 0.25, "hit": False, "image": pictures[1], "caption": "cat"}
    query = {"image": pictures[0], "caption": "?", "results": [result], "itc_results": [other]}
    rankings = {"image_root": "", "text_to_image": [query], "image_to_text": [query], "k": 4}
    rankings["ranking"] = by and {"by": by, "k": 4, "itc": 30.0, "itm": 20.0}
    draw.draw_retrieval(rankings, "retrieval.png")
    titles = [axis.get_title() for axis in figures[0].axes]
    shown = ["ITM 1: 50.0%", "ITC 1: 25.0%"]
    assert [title for title in titles if title] == (shown[::-1] if by == "itc" else shown)
    texts = [text.get_text() for axis in figures[0].axes for text in axis.texts]
    assert (texts.index("ITC") < texts.index("ITM")) == (by == "itc")
    assert " 25.0%  cat" in texts and " 50.0%  dog" in texts
    assert ("better" in figures[0].get_suptitle()) == bool(by)


def test_panels_and_effects_are_drawn(tmp_path):
    image, heat = np.zeros((20, 30, 3), np.uint8), np.eye(3)
    box = [1, 2, 10, 10]
    panels = [Panel(image, heat, "a", right=True, boxes=[box, box]), Panel(image, None, "b")]
    draw_panels([panels, panels[:1]], tmp_path / "panels.png")
    effects = {
        "a": Effect(2, (1, 3), 1.5, "supported"),
        "b": Effect(-40, None, None, "1 of 5 seeds"),
    }
    draw_effects(effects, tmp_path / "effects.png")
    for name in ("panels", "effects"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 10
