"""Downstream tasks on scenes: questions, hypotheses, statements, referring expressions and detected boxes.

All are pure functions. *Facts* are a dict such as {"color": "red", "shape": "star"}: they fit the objects that have these
values, and {} fits every object.
"""
from itertools import combinations, product
from typing import Callable, NamedTuple

from dataset.refer import box_iou

from .captions import NUMBERS, indefinite, plural, say
from .scenes import COLORS, FILLS, GRID, SHAPES, SIZES, visible_objects

TABLES = {"size": SIZES, "fill": FILLS, "color": COLORS, "shape": SHAPES}   # in the order of English adjectives
NOUNS = ("object", "one", "thing")      # where the shape is not said
PLAIN = (("color", "shape"), ("color", "shape"), ("color", "shape"), ("shape",), ("color",))    # keys of facts

ANNOTATORS = 10
AGREEING = {10: 35, 9: 25, 8: 25, 7: 10, 6: 5}      # annotators who give the true answer: weights
YES_NO = ("yes", "no")
EXISTENCE = ("is there {}?", "can you see {}?")
COUNT = ("how many {} are there?", "how many {} do you see?")
COLOR = {False: "what color is the {}?", True: "what color are the {}?"}    # of several objects?
SHAPE = "what shape is the {}?"
SIZE = "is the {} big or small?"
MORE = "are there more {} than {}?"
SAME = {"color": "are the {} and the {} the same color?", "size": "are the {} and the {} the same size?"}
BIGGER = "is the {} bigger than the {}?"
# What an annotator who disagrees may say: another word for it (added from the tables) or what is easily taken for it.
MISTAKEN = {"yes": ("no",), "no": ("yes",), "big": ("small",), "small": ("big",),
            "red": ("orange", "pink"), "orange": ("red", "yellow"), "yellow": ("orange",), "green": ("cyan",),
            "blue": ("purple", "cyan"), "cyan": ("blue", "green"), "purple": ("blue", "pink"), "pink": ("red", "purple"),
            "circle": ("moon",), "square": ("diamond",), "triangle": ("diamond",), "star": ("cross",),
            "heart": ("triangle",), "cross": ("star",), "diamond": ("square",), "moon": ("circle",),
            **{str(n): tuple(str(m) for m in (n - 1, n + 1) if 0 <= m <= 5) for n in range(6)}}
SYNONYMS = {words[0]: words[1:] for table in (SIZES, COLORS, SHAPES) for words in table.values()}

HYPOTHESES = {
    True: ("there is {}", "the scene has {}", "the scene contains {}", "{} is part of the scene", "this scene includes {}"),
    False: ("there is no {}", "the scene has no {}", "the scene contains no {}", "no {} is part of the scene",
            "this scene includes no {}")}
# Hypotheses for six pictures as (label, positive), by whether a curtain covers the picture. What is not in sight is
# neutral only behind a curtain, and what is in sight can be neither affirmed falsely nor denied truly: so these are the
# numbers with a third for each label, as many positive as negative ones in each, and every possible case.
PREMISES = {
    True: [("entailment", True), ("contradiction", False), *[("neutral", True), ("neutral", False)] * 2],
    False: [("entailment", True), ("contradiction", False), *[("entailment", False), ("contradiction", True)] * 2]}

TESTA_SHAPES = ("circle", "heart", "moon")  # curved; the others are testB
FALSE_IOU = 0.45                            # of a distractor with any object at most; 0.5 would be right


# Facts and their words

def facts_of(obj, keys):
    """What holds for an object under these keys."""
    return {key: obj[key] for key in keys}


def matching(objects, facts):
    """The objects that the facts fit."""
    return [o for o in objects if all(o[key] == value for key, value in facts.items())]


def absent_facts(rng, objects, keys):
    """Facts that fit no object, mostly near misses: each value occurs, though not together, or one of them does."""
    present = {tuple(o[key] for key in keys) for o in objects}
    seen = {value for values in present for value in values}
    free = [values for values in product(*(TABLES[key] for key in keys)) if values not in present]
    common = [sum(value in seen for value in values) for values in free]
    least = min(rng.choices((2, 1, 0), (5, 4, 1))[0], max(common))
    return dict(zip(keys, rng.choice([values for values, count in zip(free, common) if count >= least])))


def phrase(rng, facts, count=1, noun=NOUNS[0]):
    """Facts in words, without an article: "big red star", "objects"; `noun` is said where they name no shape."""
    words = [say(rng, TABLES[key][facts[key]]) for key in TABLES if key in facts]
    if "shape" not in facts:
        words.append(noun)
    return " ".join([*words[:-1], words[-1] if count == 1 else plural(words[-1])])


def a_phrase(rng, facts):
    """Facts in words, with an article: "an orange star"."""
    words = phrase(rng, facts)
    return f"{indefinite(words)} {words}"


# Questions (VQA)

def ask_existence(rng, objects):
    """Whether there is such an object; as often yes as no."""
    keys, answer = rng.choice((*PLAIN, ("size", "shape"))), rng.choice(YES_NO)
    facts = facts_of(rng.choice(objects), keys) if answer == "yes" else absent_facts(rng, objects, keys)
    return rng.choice(EXISTENCE).format(a_phrase(rng, facts)), answer


def ask_count(rng, objects):
    """How many such objects there are; 0 for a few, and the others so that not nearly all are 1."""
    drawn = rng.random()
    if drawn < 0.2:
        facts = {}
    elif drawn < 0.3:
        facts = absent_facts(rng, objects, rng.choice(PLAIN))
    else:
        by_count = {}
        for facts in (facts_of(obj, keys) for obj in objects for keys in sorted(set(PLAIN))):
            by_count.setdefault(len(matching(objects, facts)), []).append(facts)
        facts = rng.choice(by_count[rng.choice(sorted(by_count))])
    return rng.choice(COUNT).format(phrase(rng, facts, count=2)), str(len(matching(objects, facts)))


def ask_color(rng, objects):
    """The color of a shape that occurs in one color only."""
    colors = {shape: {o["color"] for o in objects if o["shape"] == shape} for shape in SHAPES}
    shapes = [shape for shape in SHAPES if len(colors[shape]) == 1]
    if shapes:
        facts = {"shape": rng.choice(shapes)}
        count = len(matching(objects, facts))
        return COLOR[count > 1].format(phrase(rng, facts, count)), *colors[facts["shape"]]


def ask_shape(rng, objects):
    """The shape of the only object of a color."""
    single = [o for o in objects if len(matching(objects, facts_of(o, ["color"]))) == 1]
    if single:
        obj = rng.choice(single)
        return SHAPE.format(phrase(rng, facts_of(obj, ["color"]))), obj["shape"]


def ask_size(rng, objects):
    """The size of an object that its shape, or color and shape, single out."""
    named = [(facts_of(o, keys), o["size"]) for o in objects for keys in (("shape",), ("color", "shape"))]
    single = [(facts, size) for facts, size in named if len(matching(objects, facts)) == 1]
    if single:
        facts, size = rng.choice(single)
        return SIZE.format(phrase(rng, facts)), SIZES[size][0]


def ask_comparison(rng, objects):
    """Yes-no questions on two shapes: their numbers, or color and size of the two objects; each as often yes as no."""
    answer, forms = rng.choice(YES_NO), []
    counts = {shape: len(matching(objects, {"shape": shape})) for shape in SHAPES}
    present = [shape for shape in SHAPES if counts[shape]]
    pairs = [(a, b) for a in present for b in present if a != b and (counts[a] > counts[b]) == (answer == "yes")]
    if not pairs:
        pairs = [(a, b) for a in SHAPES for b in SHAPES if (counts[a] > counts[b] if answer == "yes" else
                                                           counts[a] < counts[b])]
    forms.append((MORE, *rng.choice(pairs)))
    single = [o for o in objects if counts[o["shape"]] == 1]
    if len(single) > 1:
        a, b = rng.sample(single, 2)
        # 1 pair in 8 has the same color: asked about all others, nearly every answer would be no
        if (a["color"] == b["color"]) == (answer == "yes") and (answer == "yes" or rng.random() < 1 / (len(COLORS) - 1)):
            forms += 2 * [(SAME["color"], a["shape"], b["shape"])]
        larger, smaller = (a, b) if a["size"] == "large" else (b, a)
        if rng.random() < 0.5:
            if (a["size"] == b["size"]) == (answer == "yes"):
                forms += 2 * [(SAME["size"], a["shape"], b["shape"])]
        elif a["size"] != b["size"]:
            first, second = (larger, smaller) if answer == "yes" else (smaller, larger)
            forms += 2 * [(BIGGER, first["shape"], second["shape"])]
    form, *shapes = rng.choice(forms)
    return form.format(*(phrase(rng, {"shape": shape}, 2 if form == MORE else 1) for shape in shapes)), answer


ASK = {"existence": ask_existence, "count": ask_count, "color": ask_color, "shape": ask_shape, "size": ask_size,
       "comparison": ask_comparison}


def ask(rng, scene, count):
    """`count` questions of different kinds on a scene, at most as many as it allows: a list of (question, true answer)."""
    questions = (ask_kind(rng, scene["objects"]) for ask_kind in rng.sample(list(ASK.values()), len(ASK)))
    return [pair for pair in questions if pair][:count]


def answer_type(answer):
    """The type of a true answer, as in VQA: yes/no, number or other."""
    return "yes/no" if answer in YES_NO else "number" if answer.isdigit() else "other"


def annotate(rng, answer):
    """What ten annotators answer: 6 to 10 of them the truth, the others another word for it or something similar."""
    agreeing = rng.choices(list(AGREEING), AGREEING.values())[0]
    others = (*2 * SYNONYMS.get(answer, ()), *MISTAKEN[answer])
    return rng.sample([answer] * agreeing + rng.choices(others, k=ANNOTATORS - agreeing), ANNOTATORS)


# Hypotheses (visual entailment)

def plan_entailment(rng):
    """What six scenes become: a list of six (covered?, two hypotheses as (label, positive))."""
    plans = []
    for covered, hypotheses in PREMISES.items():
        hypotheses = rng.sample(hypotheses, len(hypotheses))
        plans += [(covered, hypotheses[i:i + 2]) for i in range(0, len(hypotheses), 2)]
    return rng.sample(plans, len(plans))


def hypothesis(rng, scene, cover, label, positive):
    """A sentence that affirms or denies (positive or not) that there is some object, for which the label is right.

    What is in sight is true; what is not is false, or undecided if there is a curtain: the scene behind it plays no part.
    """
    keys, seen = rng.choice(PLAIN), visible_objects(scene, cover)
    hidden = [facts for facts in (facts_of(o, keys) for o in scene["objects"]) if not matching(seen, facts)]
    if label != "neutral" and (label == "entailment") == positive:
        facts = facts_of(rng.choice(seen), keys)
    elif hidden and rng.random() < 0.5:
        facts = rng.choice(hidden)
    else:
        facts = absent_facts(rng, seen, keys)
    return rng.choice(HYPOTHESES[positive]).format((a_phrase if positive else phrase)(rng, facts))


# Statements on pairs of images (NLVR2)

class Statement(NamedTuple):
    """Sentences that mean the same, and when that is true.

    truth(l, r, n) says it for l objects in the left and r in the right image that the facts fit, and None where people
    may differ or where the answer is too easy; truth(l, r, l2, r2) does where there are two kinds of facts. `numbers` are
    those that a sentence may name: for all objects, and for those of a color, shape or both.
    """
    sentences: tuple[str, ...]
    truth: Callable
    kinds: int = 1
    numbers: tuple = ((0,), (0,))


SETS = (
    Statement(("both images have {a}", "there is {a} in both images"), lambda l, r, n: l > 0 and r > 0),
    Statement(("only one of the images has {a}", "exactly one of the images has {a}"), lambda l, r, n: (l > 0) != (r > 0)),
    Statement(("neither image has {a}", "there is no {kind} in either image"), lambda l, r, n: l == r == 0),
    Statement(("the left image has {a}", "there is {a} in the left image"), lambda l, r, n: l > 0),
    Statement(("the right image has {a}", "there is {a} in the right image"), lambda l, r, n: r > 0),
    Statement(("the left image has no {kind}", "there is no {kind} in the left image"), lambda l, r, n: l == 0),
    Statement(("the right image has no {kind}", "there is no {kind} in the right image"), lambda l, r, n: r == 0),
    Statement(("there is {a} in one of the images", "one of the images has {a}"),
              lambda l, r, n: None if l and r else l + r > 0),
    Statement(("one image has {a} and the other one has {a2}", "there is {a} in one image and {a2} in the other one"),
              lambda l, r, l2, r2: l * r2 + r * l2 > 0 if l + r + l2 + r2 else None, kinds=2))
NUMERIC = (
    Statement(("there {are} {n} {kind} in total", "the images have {n} {kind} in total"),
              lambda l, r, n: l + r == n if abs(l + r - n) < 2 else None, numbers=((2, 3, 4, 5), (1, 2, 2, 3))),
    Statement(("there are more {kinds} in the left image than in the right image",
               "the left image has more {kinds} than the right image"), lambda l, r, n: l > r if l or r else None),
    Statement(("there are more {kinds} in the right image than in the left image",
               "the right image has more {kinds} than the left image"), lambda l, r, n: r > l if l or r else None),
    Statement(("one image has exactly {n} {kind}", "there {are} exactly {n} {kind} in one of the images"),
              lambda l, r, n: None if l == r == n or min(abs(l - n), abs(r - n)) > 1 else n in (l, r),
              numbers=((1, 2, 3, 4), (1, 2))),
    Statement(("each image has at least {n} {kind}", "there {are} at least {n} {kind} in each image"),
              lambda l, r, n: None if min(l, r) < n - 1 else min(l, r) >= n, numbers=((2, 3), (1,))))
NUMERIC_SHARE = 0.3


def index_scenes(scenes):
    """The numbers of the scenes with some object, by the values of the facts on it: {("red", "star"): [0, 7], ...}."""
    index = {(): range(len(scenes))}
    for number, scene in enumerate(scenes):
        for values in sorted({tuple(o[key] for key in keys) for o in scene["objects"] for keys in PLAIN}):
            index.setdefault(values, []).append(number)
    return index


def find_pair(rng, scenes, index, facts, true_of, label, tries=60):
    """Numbers (left, right) of two scenes with true_of(left, right) == label, or None if chance finds none."""
    for _ in range(tries):
        pair = []
        for wanted in rng.choices(facts, k=2) if len(facts) == 1 else rng.sample(facts, 2):
            values, drawn = tuple(wanted.values()), rng.random()
            if 0.55 < drawn < 0.85 and values:  # a near miss, perhaps: one value is right
                values = (rng.choice(values),)
            pair.append(rng.choice(index[values if drawn < 0.85 else ()]))
        if pair[0] != pair[1] and true_of(*(scenes[number] for number in pair)) is label:
            return pair


def state(rng, scenes, index, tries=100):
    """A statement on pairs of these scenes: (sentence, {True: pair, False: pair}), each pair two numbers (left, right).

    With the same sentence once true and once false, the sentence alone tells nothing. None if chance finds none, as
    for scenes that are all alike. `index` is that of index_scenes.
    """
    for _ in range(tries):
        numeric = rng.random() < NUMERIC_SHARE
        statement = rng.choice(NUMERIC if numeric else SETS)
        keys = () if numeric and rng.random() < 0.4 else rng.choice(PLAIN)
        facts = [facts_of(rng.choice(rng.choice(scenes)["objects"]), keys) for _ in range(statement.kinds)]
        n = rng.choice(statement.numbers[bool(keys)])
        if statement.kinds == 2 and facts[0] == facts[1]:
            continue

        def true_of(*pair):
            counts = [len(matching(scene["objects"], wanted)) for wanted in facts for scene in pair]
            return statement.truth(*counts) if statement.kinds == 2 else statement.truth(*counts, n)

        pairs = {label: find_pair(rng, scenes, index, facts, true_of, label) for label in (True, False)}
        if all(pairs.values()):
            words = {"a": a_phrase(rng, facts[0]), "a2": a_phrase(rng, facts[-1]), "n": NUMBERS[n],
                     "kind": phrase(rng, facts[0], max(n, 1)), "kinds": phrase(rng, facts[0], 2),
                     "are": "is" if n == 1 else "are"}
            return rng.choice(statement.sentences).format(**words), pairs
    return None


# Referring expressions and detected boxes (grounding)

def refer(rng, objects, target, count=2):
    """Up to `count` different expressions that fit the target alone, by its size, fill, color and shape, never its place.

    They say as little as needed or one fact more. [] if another object is like it in all of these.
    """
    unique = [set(keys) for size in range(1, len(TABLES) + 1) for keys in combinations(TABLES, size)
              if len(matching(objects, facts_of(target, keys))) == 1]
    minimal = [keys for keys in unique if not any(fewer < keys for fewer in unique)]
    texts = {}
    for _ in range(4 * count if minimal else 0):
        keys = rng.choice(minimal)
        more = [key for key in TABLES if key not in keys]
        if more and rng.random() < 0.4:
            keys = keys | {rng.choice(more)}
        facts = facts_of(target, [key for key in TABLES if key in keys])
        if {"color", "shape"} <= keys and rng.random() < 0.15:
            color = facts.pop("color")
            text = f"{phrase(rng, facts)} in {say(rng, COLORS[color])}"
        else:
            text = phrase(rng, facts, noun=rng.choice(NOUNS))
        texts[text] = f"the {text}" if rng.random() < 0.4 else text
    return list(texts.values())[:count]


def ref_split(split, target):
    """The split of RefCOCO+ that a reference to this object of a scene belongs to: train, val, testA or testB."""
    return split if split != "test" else "testA" if target["shape"] in TESTA_SHAPES else "testB"


def detect(rng, scene):
    """Boxes as of a detector, best first: [[x, y, w, h, score], ...] in pixels, score from 0 to 1.

    Each object's box, up to 6% of its sides off, and three or four that are right for none: background, a part of an
    object, or a box too large, around one object or two.
    """
    side, objects = scene["image_size"], [o["box"] for o in scene["objects"]]
    cell = side / GRID

    def within(x, y, w, h):
        w, h = min(w, side), min(h, side)
        return [round(v, 2) for v in (min(max(x, 0), side - w), min(max(y, 0), side - h), w, h)]

    def distractor():
        kind, (x, y, w, h) = rng.choice(("background", "part", "around", "group")), rng.choice(objects)
        if kind == "background":
            return within(rng.uniform(0, side), rng.uniform(0, side), *(cell * rng.uniform(0.4, 1) for _ in range(2)))
        if kind == "group":
            u, v, a, b = rng.choice(objects)
            return within(min(x, u), min(y, v), max(x + w, u + a) - min(x, u), max(y + h, v + b) - min(y, v))
        a, b = (rng.uniform(*((0.5, 0.65) if kind == "part" else (1.5, 2.2))) for _ in range(2))
        return within(x + (1 - a) * w * rng.random(), y + (1 - b) * h * rng.random(), a * w, b * h)

    boxes = []
    for x, y, w, h in objects:
        dx, dy, dw, dh = (rng.uniform(-0.06, 0.06) for _ in range(4))
        boxes.append([*within(x + dx * w, y + dy * h, (1 + dw) * w, (1 + dh) * h), round(rng.uniform(0.5, 0.99), 3)])
    count = len(boxes) + rng.choice((3, 3, 4))
    while len(boxes) < count:
        box = distractor()
        if max(box_iou(box, other) for other in objects) < FALSE_IOU:
            boxes.append([*box, round(rng.uniform(0.3, 0.8), 3)])
    return sorted(boxes, key=lambda box: -box[4])


def said_texts():
    """All words of these tasks beyond those for the facts, in texts with {} for what varies."""
    statements = [text for statement in SETS + NUMERIC for text in statement.sentences]
    return [*NOUNS, plural(NOUNS[0]), *YES_NO, *EXISTENCE, *COUNT, *COLOR.values(), SHAPE, SIZE, MORE, *SAME.values(),
            BIGGER, *HYPOTHESES[True], *HYPOTHESES[False], *statements]
