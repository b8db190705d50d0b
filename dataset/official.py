"""Official annotation files: recognition by their form and conversion to JSON lists.

Supported are COCO's captions, Karpathy's splits, the questions and annotations of VQA v2, and the
line files of NLVR2 and SNLI-VE.
"""

import codecs
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from dataset.text import MAX_WORDS, is_blank, pre_caption
from utils import InputError

T = TypeVar("T")
Lists = dict[str, list]  # entries by split
_Filled = Annotated[list[T], Meta(min_length=1)]
_FOLDER = re.compile(r"(train|val|test)\d{4}")  # folders of COCO's images
SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val", "test": "test"}


class CaptionedFile(NamedTuple):
    """An image with its captions, before it becomes entries of a list."""

    image: str
    captions: list[str]
    image_id: int | None = None


class Official(msgspec.Struct):
    """The fields that are read from an official file or one of its lines."""

    title: ClassVar[str]
    lines: ClassVar[bool] = False  # one object per line


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Caption(msgspec.Struct):
    image_id: int
    caption: str


class CocoCaptions(Official):
    """COCO's captions, such as captions_train2014.json."""

    title = "COCO's captions"
    images: _Filled[_Image]
    annotations: _Filled[_Caption]


class _Sentence(msgspec.Struct):
    raw: str


class _SplitImage(msgspec.Struct):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str = ""
    cocoid: int | None = None
    imgid: int | None = None


class KarpathySplit(Official):
    """Karpathy's splits, such as dataset_coco.json."""

    title = "a Karpathy split"
    images: _Filled[_SplitImage]


class _Question(msgspec.Struct):
    question_id: int
    image_id: int
    question: str


class VqaQuestions(Official):
    """A file of questions of VQA v2."""

    title = "questions of VQA v2"
    data_type: Literal["mscoco"]
    data_subtype: str
    questions: _Filled[_Question]


class _Answer(msgspec.Struct):
    answer: str


class _Answers(msgspec.Struct):
    question_id: int
    image_id: int
    answers: _Filled[_Answer]
    answer_type: str


class VqaAnnotations(Official):
    """A file of answers of VQA v2."""

    title = "annotations of VQA v2"
    data_type: Literal["mscoco"]
    data_subtype: str
    annotations: _Filled[_Answers]


class Nlvr2Line(Official):
    """A line of a file of NLVR2."""

    title, lines = "lines of NLVR2", True
    identifier: Annotated[str, Meta(pattern=r"^(train|dev|test\d*)-\d+-\d+-\d+$")]
    sentence: str
    label: Literal["True", "False"]
    directory: int | str = ""


class SnliVeLine(Official):
    """A line of a file of SNLI-VE."""

    title, lines = "lines of SNLI-VE", True
    image: str = msgspec.field(name="Flickr30K_ID")
    sentence: str = msgspec.field(name="sentence2")
    label: str = msgspec.field(name="gold_label")


FORMS = (CocoCaptions, KarpathySplit, VqaQuestions, VqaAnnotations, Nlvr2Line, SnliVeLine)
_LABELS = ("entailment", "neutral", "contradiction")


def recognize(data: bytes) -> type[Official] | None:
    """Return the form of an official file, None for other files.

    The keys and the first value of each list decide.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    for text in (data, data[: data.find(b"\n") + 1]):
        try:
            parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            head = {key: _head(value) for key, value in parts.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        return next((form for form in FORMS if _fits(head, form)), None)
    return None


def _head(value: msgspec.Raw) -> Any:
    """Return a JSON value, reduced to its first element if it is a list."""
    if bytes(memoryview(value)[:1]) != b"[":
        return msgspec.json.decode(value)
    return list(map(msgspec.json.decode, msgspec.json.decode(value, type=list[msgspec.Raw])[:1]))


def _fits(head: dict[str, Any], form: type[Official]) -> bool:
    try:
        msgspec.convert(head, form)
        return True
    except msgspec.ValidationError:
        return False


def advice(path: Path | str) -> str:
    """Return the title of an official file with the command that converts it, "" for other files.

    Raises OSError.
    """
    form = recognize(Path(path).read_bytes())
    if form is None:
        return ""
    names = {
        VqaQuestions: f"{path} ANNOTATIONS.json",
        VqaAnnotations: f"QUESTIONS.json {path}",
    }.get(form, path)
    return (
        f"holds {form.title}; convert it with python -m tools.to_json {names} --image_root DIR"
        " --output DIR"
    )


class ImageFinder:
    """Find images in a folder that may lack the publisher's subfolders.

    Attributes:
        paths: Path in the lists by the publisher's path.
        files: Path of the file under the folder by the path in the lists.
        missing: Paths of the images that do not exist.
    """

    def __init__(self, image_root: str) -> None:
        self.image_root, self.paths, self.files, self.missing = image_root, {}, {}, []

    def __call__(self, path: str, suffix: str = "") -> str:
        """Return the longest tail of a path that is a file with this suffix, else the path.

        Args:
            path: The publisher's path, without the suffix.
            suffix: Suffix that the entries of the lists leave out.
        """
        if path not in self.paths:
            parts = path.split("/")
            for tail in ("/".join(parts[i:]) for i in range(len(parts))):
                if os.path.isfile(os.path.join(self.image_root, tail + suffix)):
                    break
            else:
                tail = path
                self.missing.append(path + suffix)
            self.paths[path] = tail
            self.files[tail] = tail + suffix
        return self.paths[path]


def convert(
    files: dict[str, bytes], forms: dict[str, type[Official]], find: ImageFinder
) -> tuple[dict[str, list], list[str]]:
    """Convert official files of one kind.

    Args:
        files: Content by path.
        forms: Form by path, as `recognize` returns it.
        find: Finder of the images.

    Returns:
        The entries of each split, train, val or test, and the problems of entries that are left
        out. Entries of captions are CaptionedFile, others are dicts as scripts read them.

    Raises:
        InputError: A part of a file has another form, or the files do not belong together.
    """
    kinds, lists, problems = set(forms.values()), defaultdict(list), []
    contents: dict[str, Any] = {}  # an object of a form, or the rows of one
    for path, data in files.items():
        data, form = data.removeprefix(codecs.BOM_UTF8), forms[path]
        contents[path] = (
            _read_lines(path, data, form, problems) if form.lines else _read_whole(path, data, form)
        )
    if kinds <= {VqaQuestions, VqaAnnotations}:
        _convert_vqa(contents, find, lists, problems)
    elif len(kinds) == 1:
        steps: dict[type[Official], Callable[..., None]] = {
            CocoCaptions: _convert_coco,
            KarpathySplit: _convert_karpathy,
            Nlvr2Line: _convert_nlvr2,
            SnliVeLine: _convert_snli_ve,
        }
        for path, content in contents.items():
            steps[forms[path]](path, content, find, lists, problems)
    else:
        held = ", ".join(f"{path} holds {form.title}" for path, form in forms.items())
        raise InputError(f"{held}; convert one kind at a time")
    return dict(lists), problems


def _read_whole(path: str, data: bytes, form: type[Official]) -> Official:
    try:
        return msgspec.json.decode(data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: holds {form.title}, but a part is malformed ({error}); download it again"
        ) from None


def _read_lines(
    path: str, data: bytes, form: type[Official], problems: list[str]
) -> list[tuple[str, Official]]:
    """Return (name of the line, object) of the lines. Mistakes are added to `problems`."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append((f"{path} line {number}", msgspec.json.decode(line, type=form)))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                problems.append(f"{path} line {number}: {error}")
    return rows


def _usable(captions: list[str], where: str, problems: list[str]) -> list[str]:
    """Return the captions that are not blank."""
    usable = [caption for caption in captions if not is_blank(pre_caption(caption, MAX_WORDS))]
    if len(usable) < max(1, len(captions)):
        problems.append(
            f"{where}: {len(usable)} of {len(captions)} captions can be used; the others are empty"
        )
    return usable


def _convert_coco(
    path: str, content: CocoCaptions, find: ImageFinder, lists: Lists, problems: list[str]
) -> None:
    captions = {image.id: (image.file_name, []) for image in content.images}
    for number, annotation in enumerate(content.annotations):
        if annotation.image_id in captions:
            captions[annotation.image_id][1].append(annotation.caption)
        else:
            problems.append(
                f"{path} annotation {number} (counting from 0): no image has the id"
                f" {annotation.image_id}"
            )
    for image_id, (name, texts) in captions.items():
        folder = _FOLDER.search(f"{name} {os.path.basename(path)}")
        where = f"{path} image {image_id}"
        if usable := _usable(texts, where, problems):
            split = folder[1] if folder else "train"
            image = find(f"{folder[0]}/{name}" if folder else name)
            lists[split].append(CaptionedFile(image, usable, image_id))


def _convert_karpathy(
    path: str, content: KarpathySplit, find: ImageFinder, lists: Lists, problems: list[str]
) -> None:
    for number, image in enumerate(content.images):
        where = f"{path} image {number} (counting from 0)"
        if image.split not in SPLITS:
            problems.append(f"{where}: its split {image.split!r} is unknown")
        elif usable := _usable([sentence.raw for sentence in image.sentences], where, problems):
            name = find("/".join(filter(None, (image.filepath, image.filename))))
            image_id = next((key for key in (image.cocoid, image.imgid) if key is not None), number)
            lists[SPLITS[image.split]].append(CaptionedFile(name, usable, image_id))


def _convert_vqa(
    contents: dict[str, VqaQuestions | VqaAnnotations],
    find: ImageFinder,
    lists: Lists,
    problems: list[str],
) -> None:
    """Join questions with the annotations of their subtype.

    Questions of a subtype without annotations go into the test list.
    """
    annotated = defaultdict(dict)  # annotations by subtype and question_id
    for content in contents.values():
        if isinstance(content, VqaAnnotations):
            by_id = {answers.question_id: answers for answers in content.annotations}
            annotated[content.data_subtype] |= by_id
    questions = {path: of for path, of in contents.items() if isinstance(of, VqaQuestions)}
    asked = {content.data_subtype for content in questions.values()}
    for path, content in contents.items():
        if content.data_subtype not in asked:
            raise InputError(
                f"{path} holds the annotations of {content.data_subtype}, but no file has the"
                " questions; name the file of questions too"
            )
    for path, content in questions.items():
        subtype = content.data_subtype
        folder = subtype.replace("-dev", "")
        split = next((split for split in ("train", "val") if subtype.startswith(split)), "test")
        for question in content.questions:
            where = f"{path} question {question.question_id}"
            image = find(f"{folder}/COCO_{folder}_{question.image_id:012d}.jpg")
            entry = {
                "image": image,
                "question": question.question,
                "question_id": question.question_id,
                "dataset": "vqa",
            }
            if subtype not in annotated:
                lists["test"].append(entry)
                continue
            answers = annotated[subtype].get(question.question_id)
            if answers is None or answers.image_id != question.image_id:
                of = answers and f"its annotation belongs to image {answers.image_id}"
                problems.append(
                    f"{where} of image {question.image_id}: {of or 'there is no annotation'}"
                )
                continue
            given = [answer.answer for answer in answers.answers]
            lists[split].append(entry | {"answer": given, "answer_type": answers.answer_type})


def _convert_nlvr2(
    path: str, rows: list[tuple], find: ImageFinder, lists: Lists, problems: list[str]
) -> None:
    for _, row in rows:
        split = row.identifier.partition("-")[0]
        folder = f"images/train/{row.directory}" if split == "train" else split
        stem = row.identifier.rpartition("-")[0]
        images = [find(f"{folder}/{stem}-img{number}.png") for number in (0, 1)]
        entry = {"images": images, "sentence": row.sentence, "label": row.label}
        lists[SPLITS[split.rstrip("0123456789")]].append(entry)


def _convert_snli_ve(
    path: str, rows: list[tuple], find: ImageFinder, lists: Lists, problems: list[str]
) -> None:
    named = re.search("train|val|dev|test", os.path.basename(path))
    split = SPLITS[named[0]] if named else "train"
    for where, row in rows:
        if row.label in _LABELS:
            image = find(row.image.removesuffix(".jpg"), ".jpg")
            lists[split].append({"image": image, "sentence": row.sentence, "label": row.label})
        else:
            problems.append(f"{where}: its gold_label {row.label!r} is not a class")
