"""What the tabs of the page show: functions from a model, images and a text to HTML, which page.css
arranges.
"""

import itertools
from html import escape

from matplotlib.colors import to_hex
from PIL import Image

from dataset.vqa import reachable_answers
from visualize.draw import HEAT, paint_heat_maps
from visualize.explain import UNKNOWN, unknown_words
from visualize.page import image_source

SHOWN = 5  # answers
HEIGHT, WIDTH = 400, 640  # pixels that the pictures of a heat map take at most
_names = itertools.count()  # of groups of radio buttons, one for each heat map


def show_match(model, image, text):
    """Return the probability of a match, the similarity, and the heat maps of the match."""
    probability, similarity = model.match(image, text), model.similarity(image, text)
    said = (
        "ITM: the probability that the image and the text belong together.",
        f"ITC: the similarity of their features is {similarity:.2f}, on a scale from −1 to 1.",
    )
    return (
        show_bars([("match", probability)])
        + show_lines(*said)
        + show_heat(model.heat_map(image, text))
    )


def show_answers(model, image, question):
    """Return the best answers with probabilities, and the heat maps of the best one."""
    answers = reachable_answers(model.config)
    found = model.answer(image, question, answers)
    said = "Generated, as no list of answers is within reach; the probability is that of its words."
    if answers:
        said = f"Probabilities among the {len(found)} likeliest of {len(answers)} answers."
    return (
        show_bars(found[:SHOWN])
        + show_lines(said)
        + show_heat(model.heat_map(image, question, answers))
    )


def show_entailment(model, image, text):
    """Return the probabilities that the text follows, does not, or contradicts, and the heat maps
    of the likeliest.
    """
    found = sorted(model.entails(image, text).items(), key=lambda row: -row[1])
    said = "Does the statement follow from the image (entailment), contradict it, or neither (neutral)?"
    return show_bars(found) + show_lines(said) + show_heat(model.heat_map(image, text))


def show_truth(model, first, second, text):
    """Return the probability that the text is true of two images, and the heat maps of True or
    False on both.
    """
    images = [first, second]
    true = model.true_of(images, text)
    said = "Is the statement true of the two images together?"
    return (
        show_bars([("True", true), ("False", 1 - true)])
        + show_lines(said)
        + show_heat(model.heat_map(images, text))
    )


def show_pseudo_targets(model, image, text):
    """Return what the momentum model expects in place of each word of the text: Figure 2."""
    words = model.fill_in(image, text)
    cards = "".join(
        f"<div class='card'><h4>{show_word(word)}</h4>{show_bars(candidates)}</div>"
        for word, candidates in words
    )
    said = (
        "The momentum model's five likeliest words in place of each word, which is masked: in training they are its soft "
        "targets. ✓ marks the word itself."
    )
    return (
        show_lines(said, *unknown_words(word for word, _ in words))
        + f"<div class='cards'>{cards}</div>"
    )


# --------------------------------------------------------------------------------------------------
# parts


def show_lines(*lines):
    """Return lines of explanation."""
    return "".join(f"<p class='said'>{escape(line)}</p>" for line in lines)


def show_error(error):
    """Return the sentence of an error in place of a result."""
    return f"<p class='sentence' role='alert'>{escape(str(error))}</p>"


def show_bars(rows):
    """Return a bar with its percentage for each (text, probability) or Candidate."""
    bars = []
    for text, probability, *hit in rows:
        mark = " ✓" if any(hit) else ""
        bars.append(
            f"<div class='bar' style='--share: {probability:.2%}'><span>{escape(text or '(empty)')}{mark}</span>"
            f"<b>{probability:.1%}</b></div>"
        )
    return f"<div class='bars'>{''.join(bars)}</div>"


def show_word(word):
    """Return a word of a model, marked where the vocabulary lacks it."""
    lacking = " class='unknown' title='not in the vocabulary'" if word.endswith(UNKNOWN) else ""
    return f"<span{lacking}>{escape(word.removesuffix(UNKNOWN))}</span>"


def show_heat(heat):
    """Return the words of a HeatMap as radio buttons; the pictures of the chosen word are visible."""
    # of the pictures side by side
    aspect = sum(image.shape[1] / image.shape[0] for image in heat.pictures)
    height, name, words = min(HEIGHT, round(WIDTH / aspect)), next(_names), []
    for label, pictures in paint_heat_maps(heat.pictures, heat.panels, height):
        # from uint8 [H, W, 3]
        sources = [image_source(Image.fromarray(picture)) for picture in pictures]
        shown = "".join(
            f"<img src='{source}' alt='heat map of {escape(label, True)}'>" for source in sources
        )
        checked = "" if words else " checked"
        words.append(
            f"<label><input type='radio' name='heat{name}'{checked}>{show_word(label)}<span>{shown}</span></label>"
        )
    colors = ", ".join(to_hex(color, keep_alpha=True) for color in HEAT(range(0, 256, 51)))
    scale = f"<p class='said scale'>none <i style='background: linear-gradient(to right, {colors})'></i> most</p>"
    said = f"Where “{heat.verdict}” comes from, by Grad-CAM. Point at a word, or click it, to see its share."
    maps = f"<div class='heat' style='padding-bottom: {height}px'>{''.join(words)}</div>"
    return show_lines(said, *unknown_words(heat.words)) + maps + scale
