"""Captions of scenes, true and noisy, and how this data set says things."""
from .scenes import BACKGROUNDS, COLORS, FILLS, POSITIONS, RELATIONS, SHAPES, SIZES, combination_of

MAX_WORDS = 16      # with [CLS] 17 ids: padding to the longest caption is what a text costs
OPENINGS = ("there is", "here is", "a picture of", "an image of", "picture of", "a drawing of", "an image with",
            "a scene with", "this picture shows", "we see", "i can see")
GROUNDS = ("on a {} background", "on {}", "against a {} background", "with a {} background")
NUMBERS = ("", "one", "two", "three", "four", "five")
UNNAMED = {"color": "colored", "shape": "thing"}    # said where a noisy caption misses the fact
JUNK = ("click here for free download", "best price buy online now free shipping", "img {} jpg", "untitled {}",
        "photo {} of {} next page", "free clip art and wallpaper hd {}", "all rights reserved",
        "share this on my page", "top {} shapes for kids you must see")
NOISE_KINDS = ("wrong", "missing", "other", "junk")
TRAIN_DETAIL = (0.5, 0.8, 1.1, 1.4)     # of captions, see describe(): one of them at random
EVAL_DETAIL = (1.6, 1.4, 1.2, 0.6, 0.2)     # for 1 to 5 objects, so that the caption identifies its scene
PARTIAL = 0.08                          # share of train captions that leave objects out


def say(rng, words):
    """One of several words for the same thing, mostly the usual one."""
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def plural(noun):
    """The plural of a shape word."""
    return noun + ("es" if noun.endswith("s") else "s")


def indefinite(words):
    """The article for a phrase: "an" for "orange star"."""
    return "an" if words[0] in "aeiou" else "a"


def noun_phrase(rng, group, detail):
    """Words for the objects of one color and shape: "a big striped red star", "two green hearts"."""
    color, shape = group[0]["color"], group[0]["shape"]
    color, noun = say(rng, COLORS.get(color, (color,))), say(rng, SHAPES.get(shape, (shape,)))
    sizes, fills = ({o[key] for o in group} for key in ("size", "fill"))
    adjectives = []
    if len(sizes) == 1 and rng.random() < detail:
        adjectives.append(say(rng, SIZES[sizes.pop()]))
    if len(fills) == 1 and rng.random() < detail * (0.3 if "solid" in fills else 1):
        adjectives.append(say(rng, FILLS[fills.pop()]))
    if len(group) > 1:
        return " ".join([NUMBERS[len(group)], *adjectives, color, plural(noun)])
    words = [*adjectives, noun, "in", color] if rng.random() < 0.06 else [*adjectives, color, noun]
    words = " ".join(words)
    return f"{rng.choice(('one', 'the', *[indefinite(words)] * 10))} {words}"


def describe(rng, scene, detail, partial=False):
    """One caption of a scene, of any length. It names all objects, or only some of them if `partial`.

    An optional fact (an object's size, fill, position or relation, the background) is said with a probability of
    `detail` times a weight from 0.3 to 1.
    """
    objects, groups = scene["objects"], {}
    for i in rng.sample(range(len(objects)), len(objects)):
        groups.setdefault((objects[i]["color"], objects[i]["shape"]), []).append(i)
    groups = list(groups.values())
    if partial:
        groups = groups[:rng.randint(1, max(1, len(groups) - 1))]
    phrases = {g[0]: noun_phrase(rng, [objects[i] for i in g], detail) for g in groups}
    single = {g[0] for g in groups if len(g) == 1}
    related = [r for r in scene["relations"] if r[0] in single and r[2] in single]
    if related and rng.random() < 0.2 + 0.5 * detail:
        i, name, j = rng.choice(related)
        phrases[i] += f" {rng.choice(RELATIONS[name])} {phrases.pop(j)}"
        single -= {i, j}
    for i in single:
        if rng.random() < 0.6 * detail:
            phrases[i] += f" {rng.choice(POSITIONS[objects[i]['position']])}"
    phrases = rng.sample(list(phrases.values()), len(phrases))
    joint = rng.choice((" and ", " with ", ", ")) if len(phrases) == 2 else " and "
    text = joint.join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    if rng.random() < 0.35:
        opening = rng.choice(OPENINGS)
        text = f"{opening.replace(' is', ' are') if text.split()[0] in NUMBERS[2:] else opening} {text}"
    if rng.random() < 0.7 * detail:
        text += " " + rng.choice(GROUNDS).format(say(rng, BACKGROUNDS[scene["background"]]))
    return text


def caption(rng, scene, detail, partial=False):
    """A caption of at most MAX_WORDS words: said again, in less detail, while it is longer."""
    text = describe(rng, scene, detail, partial)
    while len(text.split()) > MAX_WORDS:
        detail *= 0.8
        text = describe(rng, scene, detail, partial)
    return text


def noisy_caption(rng, scene, other, kind):
    """A caption as on the web: with a wrong fact, with no colors or no shapes, of another scene, or with junk."""
    detail = rng.choice(TRAIN_DETAIL)
    if kind == "other":
        return caption(rng, other, detail)
    if kind == "junk":
        text = rng.choice(JUNK)
        text = text.format(*(rng.randint(1, 9) for _ in range(text.count("{}"))))
        longer = f"{caption(rng, scene, 0, partial=True)} {text}"
        return longer if rng.random() < 0.3 and len(longer.split()) <= MAX_WORDS else text
    key, names = rng.choice((("color", COLORS), ("shape", SHAPES)))
    objects = [dict(o) if kind == "wrong" else {**o, key: UNNAMED[key]} for o in scene["objects"]]
    if kind == "wrong":
        rng.choice(objects)[key] = rng.choice([name for name in names if name not in {o[key] for o in objects}])
    return caption(rng, {**scene, "objects": objects}, detail)


def write_captions(rng, scene, split, count, noise, others):
    """`count` different captions as a list of {"caption", "noise"}; noise is None (true) or one of NOISE_KINDS.

    Those of val and test are true, name every object, and say the more of each the fewer there are.
    """
    captions = {}
    while len(captions) < count:
        kind = None
        if split != "train":
            text = caption(rng, scene, EVAL_DETAIL[len(scene["objects"]) - 1])
        elif rng.random() < noise:
            kind, other = rng.choice(NOISE_KINDS), rng.choice(others)
            if kind == "other" and combination_of(other) == combination_of(scene):
                kind = "junk"
            text = noisy_caption(rng, scene, other, kind)
        else:
            text = caption(rng, scene, rng.choice(TRAIN_DETAIL), partial=rng.random() < PARTIAL)
        captions.setdefault(text, kind)
    return [{"caption": text, "noise": kind} for text, kind in captions.items()]
