"""The key exif: `upright` turns images as Pillow does, on every way from a file to a model."""

import io
import json
import re
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from helpers.files import encoded, to_tensor
from helpers.tasks import DATA, data_of
from PIL import ExifTags, Image, ImageOps

from configs.config import as_config
from dataset import images
from dataset.build import build_dataset
from dataset.images import decode_image, load_image, turn_upright
from dataset.report import Check
from inference import index as indexing
from inference import load_model
from tools.demo_page import picture_of
from tools.to_shards import convert
from visualize import draw

TURNED = range(2, 9)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def exif(orientation):
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(jpeg, *segments):
    """A JPEG with segments before its own ones."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def lying(jpeg, orientation=6):
    """A JPEG with an EXIF orientation and the same pixels."""
    return with_segments(jpeg, segment(0xE1, exif(orientation).tobytes()))


def expected(data):
    """What Pillow makes of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture
def small(picture):
    return picture.crop((0, 0, 61, 43))


@pytest.mark.parametrize("orientation", [0, 1, *TURNED, 9])
@pytest.mark.parametrize(
    "mode, format", [("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("L", "WEBP")]
)
def test_upright_is_what_pillow_makes_of_a_file(small, mode, format, orientation):
    data = encoded(small.convert(mode), format, exif=exif(orientation))
    stored, upright = decode_image(data, "a"), decode_image(data, "a", "upright")
    assert torch.equal(upright, expected(data)) and stored.shape == (3, 43, 61)
    assert torch.equal(stored, upright) == (orientation not in TURNED)
    if orientation in TURNED:
        with pytest.raises(images.ImageError, match="^a: turned by EXIF "):
            decode_image(data, "a", "refused")
    else:
        assert torch.equal(decode_image(data, "a", "refused"), stored)


@pytest.mark.parametrize("exif_key", ["stored", "upright", "refused"])
def test_tiff_is_turned_by_pillow_alone_and_only_once(small, exif_key):
    data = encoded(small, "TIFF", exif=exif(6))
    assert torch.equal(decode_image(data, "a", exif_key), expected(data))
    assert torch.equal(to_tensor(turn_upright(Image.open(io.BytesIO(data)))), expected(data))


def test_orientations_at_unusual_places_are_found(small):
    jpeg = encoded(small, "JPEG")
    profile, app1 = segment(0xE2, b"ICC\xff\xda\xff\xd9"), segment(0xE1, exif(8).tobytes())
    for data in (
        with_segments(jpeg, profile, app1),
        with_segments(jpeg, b"\xff\xff" + app1),  # fill bytes
        with_segments(jpeg, profile, b"stray", app1),
        encoded(small, "JPEG", xmp=XMP % 8),
        encoded(small, "WEBP", xmp=XMP % 8),
    ):
        assert torch.equal(decode_image(data, "a", "upright"), expected(data))
        assert decode_image(data, "a", "upright").shape == (3, 61, 43)


def test_damaged_exif_turns_nothing(small):
    jpeg, good = encoded(small, "JPEG"), exif(6).tobytes()
    assert decode_image(with_segments(jpeg, segment(0xE1, good)), "a", "upright").shape[1] == 61
    for bad in (good[:8], b"Exif\0\0", b"Exif\0\0nonsense", good[:-8] + b"\xff" * 8):
        data = with_segments(jpeg, segment(0xE1, bad))
        assert torch.equal(decode_image(data, "a", "upright"), decode_image(jpeg, "a"))
        assert turn_upright(Image.open(io.BytesIO(data))).size == (61, 43)


def test_exif_that_pillow_cannot_encode_again_turns_the_image(small):
    orientation = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    resolution = struct.pack(">HHI4s", ExifTags.Base.XResolution, 2, 4, b"non\0")  # a text
    entries = struct.pack(">H", 2) + orientation + resolution + bytes(4)
    app1 = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries
    for format in ("JPEG", "PNG"):
        data = encoded(small, format, exif=app1)
        with pytest.raises(TypeError):
            ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert decode_image(data, "a", "upright").shape == (3, 61, 43)
        assert turn_upright(Image.open(io.BytesIO(data))).size == (43, 61)


def test_the_header_is_read_again_only_if_there_is_metadata(small, monkeypatch):
    jpeg, opened = encoded(small, "JPEG"), []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kw: opened.append(1) or real(*args, **kw))
    decode_image(jpeg, "a", "upright")
    decode_image(encoded(small, "JPEG", progressive=True), "a", "upright")
    decode_image(lying(jpeg), "a")
    assert not opened
    decode_image(lying(jpeg), "a", "upright")
    assert opened


# --------------------------------------------------------------------------------------------------
# every way to a model


@pytest.fixture(scope="module")
def folders(shapes, tmp_path_factory):
    """Copies of the shapes: every image lying, with an orientation; and the same turned."""
    folder = tmp_path_factory.mktemp("exif")
    for name in ("lying", "turned"):
        shutil.copytree(shapes, folder / name)
    for path in (folder / "lying").rglob("*.jpg"):
        data = lying(path.read_bytes())
        path.write_bytes(data)
        turned = Image.fromarray(expected(data).permute(1, 2, 0).numpy())
        (folder / "turned" / path.relative_to(folder / "lying")).write_bytes(encoded(turned, "PNG"))
    return folder / "lying", folder / "turned"


def keys_of(task, folder):
    """The keys of a task's data in a copy of the shapes."""
    script = {"nlvr_pretrain": "Pretrain_nlvr"}.get(task, task)
    script = next(name for name in DATA if name.lower() == script.lower())
    return {"image_root": str(folder), **data_of(script, folder)}


def images_of(sample):
    return sample if isinstance(sample, torch.Tensor) else sample[0]


WAYS = [
    (task, split)
    for task in ("pretrain", "nlvr_pretrain", "retrieval", "vqa", "ve", "nlvr", "relevance")
    for split in ("train", "test")
    if (task, split) != ("nlvr_pretrain", "test")
]


@pytest.mark.parametrize("task, split", [*WAYS, ("grounding", "train")])
def test_data_sets_turn_images(folders, tiny_config, task, split):
    def sample(folder, key):
        config = {**tiny_config, **keys_of(task, folder), "exif": key, "randaugment": False}
        return images_of(build_dataset(task, split, config, seed=1)[1])

    flat, turned = folders
    assert torch.equal(sample(flat, "upright"), sample(turned, "stored"))
    assert not torch.equal(sample(flat, "upright"), sample(flat, "stored"))


def test_shards_turn_images(folders, tiny_config, tmp_path):
    flat, turned = folders
    samples = []
    for number, (folder, key) in enumerate(
        ((flat, "upright"), (turned, "stored"), (flat, "stored"))
    ):
        output = tmp_path / str(number)
        convert([str(flat / "pretrain.json")], str(folder), output, samples=20, workers=1)
        config = {**tiny_config, "train_file": [f"{output}/*.tar"], "exif": key}
        samples.append(build_dataset("pretrain", "train", config, seed=1)[1].image)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("task", ["grounding", "attributes"])
def test_images_with_boxes_are_not_turned_but_refused(folders, shapes, tiny_config, task):
    flat, _ = folders
    upright = {**tiny_config, **keys_of(task, flat), "exif": "upright", "batch_size": 1}
    message = refusal(build_dataset(task, "test", upright).__getitem__, 0)
    assert str(flat / "images") in message and "exif" in message
    stored = build_dataset(task, "test", {**upright, "exif": "stored"})
    plain = build_dataset(task, "test", {**upright, "image_root": str(shapes)})
    assert torch.equal(images_of(stored[0]), images_of(plain[0]))
    for key, kinds in (("upright", {"turned by EXIF"}), ("stored", set())):
        reports = Check(task, as_config({**upright, "exif": key}), None, map).report_files()
        unusable = {of["key"]: set(of["unusable"]) for of in reports}
        assert unusable == {**dict.fromkeys(unusable, set()), "test_file": kinds}


def test_check_counts_images_with_an_orientation(small, tiny_config, tmp_path):
    for number, orientation in enumerate((0, 1, 6, 3)):
        for suffix, format in (("jpg", "JPEG"), ("png", "PNG")):
            data = encoded(small, format, exif=exif(orientation))
            (tmp_path / f"{number}.{suffix}").write_bytes(data)
    small.save(tmp_path / "4.jpg")
    (tmp_path / "5.jpg").write_bytes(lying(b"no image"))
    entries = [{"image": path.name, "caption": "red"} for path in sorted(tmp_path.iterdir())]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    keys = {"image_root": str(tmp_path), "train_file": [str(tmp_path / "list.json")]}
    for key in ("stored", "upright"):
        config = as_config({**tiny_config, **keys, "test_file": None, "exif": key})
        (report,) = Check("pretrain", config, None, map).report_files()
        assert (report["looked_at"], report["with_exif_orientation"]) == (10, 4)


# --------------------------------------------------------------------------------------------------
# inference


@pytest.fixture
def pair(folders):
    """A lying photo and the same upright one."""
    return [str(folder / "images/test/000000.jpg") for folder in folders]


def test_a_loaded_model_reads_images_as_it_was_trained(files, pair):
    flat, turned = pair
    text = "a red circle"
    stored = load_model(files["retrieval"], "cpu")
    upright = load_model(files["retrieval"], "cpu", overrides=["exif=upright"])
    right = stored.similarity(turned, text)
    assert upright.similarity(flat, text) == right != stored.similarity(flat, text)
    assert upright.similarity(Image.open(flat), text) == right
    assert upright.similarity(np.array(Image.open(turned)), text) == right
    assert upright.match(flat, text) == stored.match(turned, text) != stored.match(flat, text)
    heat = upright.heat_map(flat, text)
    assert np.array_equal(heat.pictures[0], np.array(Image.open(turned)))


def test_a_run_keeps_the_key_in_its_checkpoint(pretrain, tmp_path, pair):
    assert pretrain(exif="upright")[0] == 0
    model = load_model(tmp_path / "out", "cpu")
    flat, turned = pair
    assert model.config.exif == "upright"
    assert torch.equal(model.embed_images(flat), model.embed_images(turned))


def test_weights_that_were_trained_with_another_value_are_noted(
    run_script, pretrain, few_shapes, tiny_config, tmp_path
):
    assert pretrain("--output_dir", tmp_path / "before", exif="upright")[0] == 0
    config = {**tiny_config, **data_of("VE", few_shapes), "scheduler": {"epochs": 1}}
    flags = "--checkpoint", tmp_path / "before", "--output_dir"
    for key, noted in (("stored", True), ("upright", False)):
        status, printed = run_script("VE", *flags, tmp_path / key, **{**config, "exif": key})
        lines = [line for line in printed.splitlines() if "exif" in line]
        assert status == 0 and len(lines) == noted, printed
        assert not noted or re.match(
            "note: exif is stored, but .*before/.* was trained with exif upright", lines[0]
        )


def test_an_index_keeps_the_key_and_names_it(folders, files, tmp_path, run_main, pair):
    def run(*arguments):
        return run_main("tools.search", *arguments, "--device", "cpu")

    flat, turned = (folder / "images/test" for folder in folders)
    checkpoint = ["--checkpoint", files["retrieval"]]
    indexes = {}
    for name, folder, *flags in (
        ("upright", flat, "--set", "exif=upright"),
        ("turned", turned),
        ("stored", flat),
    ):
        status, out, _ = run("index", folder, *checkpoint, "--output", tmp_path / name, *flags)
        assert status == 0 and f"exif: {'upright' if flags else 'stored'}" in out
        indexes[name] = indexing.read_index(tmp_path / name)
    assert np.array_equal(indexes["upright"].features, indexes["turned"].features)
    assert not np.array_equal(indexes["upright"].features, indexes["stored"].features)
    assert indexing.load_model_of(indexes["upright"], tmp_path / "upright").config.exif == "upright"
    # an example lies, too
    _, out, err = run("query", tmp_path / "upright", "--image", pair[0], "-k", 1, "--json")
    assert json.loads(out)["path"] == pair[0] and "exif: upright" in err
    status, _, err = run("index", flat, *checkpoint, "--output", tmp_path / "upright")
    assert status == 2 and str(tmp_path / "upright") in err and "exif=upright" in err


def test_pictures_for_people_are_upright(pair, files, tmp_path, monkeypatch, call):
    flat, turned = pair
    assert np.array_equal(np.array(picture_of(flat)), np.array(picture_of(turned)))
    shown = []
    argv = ["--checkpoint", files["pretrain"], "--pseudo_targets", "--device", "cpu"]
    argv += ["--image", flat, "--text", "a red circle", "--output", tmp_path / "a.png"]
    monkeypatch.setattr(draw, "draw_pseudo_targets", lambda image, *_: shown.append(image))
    call("tools.visualize", *argv, "--set", "exif=upright")
    assert np.array_equal(shown.pop(), np.array(Image.open(turned)))
    axis = SimpleNamespace(imshow=shown.append)
    draw._show_image(axis, pair[0])
    draw._show_image(axis, pair[0], exif="stored")
    for picture, exif_key in zip(shown, ("upright", "stored"), strict=True):
        assert np.array_equal(picture, load_image(pair[0], exif_key).permute(1, 2, 0).numpy())
