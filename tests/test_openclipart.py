"""The openclipart data set: cleaning, captions, near-duplicates, splits, formats, broken files and packages."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import exit_status, refusal
from PIL import Image

from dataset import openclipart
from dataset.openclipart import Drawing, captions, clean_file_name, clean_text, duplicate_groups, series_name

SVG = """<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag><rdf:li></rdf:li><rdf:li>hash(0x8a4caac)</rdf:li><rdf:li>fruit</rdf:li></rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>Linda Kim</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


@pytest.mark.parametrize("raw, cleaned", [
    ("hash(0x8a4caac)", ""),
    ("0x9371fbc", ""),
    ("jean.victor.balin@gmail.com", ""),
    ("EPS converted from http://aiga.org", ""),
    ("unsorted", ""),
    ("...", ""),
    ("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", "Flat Icon Collection"),
    ("1989 Chevrolet Celebrity Wagon [www.chevycelebrity.com]", "1989 Chevrolet Celebrity Wagon"),
    ("A picture of John Coltrane converted to vector grpahics in Inkscape.", "A picture of John Coltrane"),
    ("Made by Filip Mielniczuk 2005, distributed by Marcin Wilk 2005. Released under Public Domain License.", ""),
    ('<a rel="license" href="x"><br /></a> This work is dedicated to the <a>Public Domain</a> by Bob.', ""),
    ("Iraqi flag &amp;quot;1959&amp;quot;", 'Iraqi flag "1959'),
    ("L&Atilde;&copy;zard", "Lézard"),
    ("Woman Police 01", "Woman Police"),
    ("GPS Geko 202.", "GPS Geko 202"),
    ("FlowerAndPot", "Flower And Pot"),
    ("shopping_cart", "shopping cart"),
    ("Tatoo tatuaggio tatuaggio by Linda Kim", "Tatoo tatuaggio"),
    ("Crawfish (B and W)", "Crawfish (black and white)"),
    ("Hash Browns", "Hash Browns"),
])
def test_clean_text(raw, cleaned):
    assert clean_text(raw, "Linda Kim") == cleaned


@pytest.mark.parametrize("stem, creator, cleaned", [
    ("cavallo_architetto_franc_05", "Architetto Francesco Rollandin", "cavallo"),
    ("bulldog_puppy_ganson", "Gerald Ganson", "bulldog puppy"),
    ("arrow3-2-2", "Nicu Buculei", "arrow"),
    ("house_juliane_krug_r", "Juliane Krug", "house"),
    ("white_c_9", "Nicu Buculei", "9 of clubs"),
    ("simple_h_q", "Nicu Buculei", "queen of hearts"),
    ("star_82pt09step", "", "star with 82 points, step 9"),
    ("folder_new", "", "folder new"),
])
def test_clean_file_name(stem, creator, cleaned):
    assert clean_file_name(stem, creator) == cleaned


@pytest.mark.parametrize("key, title, count, name, collection", [
    ("icons/folder_new", "Lemon SVG theme", 411, "folder new", "Lemon SVG theme"),
    ("apps/tv", "Lemon SVG theme", 411, "tv", "Lemon SVG theme"),
    ("apps/clipart", "Lemon SVG theme", 411, "Lemon SVG theme", ""),
    ("fruit/orange", "Clipart by Nicu Buculei - pear", 10, "orange", ""),
    ("weather/clouds_jon_phillips_07", "Clouds", 10, "Clouds", ""),
    ("stickmen/sm_006", "stick man", 23, "stick man", ""),
    ("flowchart/fc04", "Clipart by Nicu Buculei - fc23", 28, "flowchart", ""),
    ("x/damselfly_leigh_purdie_r", "Damselfly", 1, "Damselfly", ""),
])
def test_a_shared_title_is_a_collection_or_another_drawing(key, title, count, name, collection):
    assert openclipart.name_and_collection(Drawing(key, title), count) == (name, collection)


def test_captions_are_different_non_empty_views_and_short():
    drawing = Drawing("food/desserts/pie_cherry", "Cherry Pie", "Baked this morning " * 20,
                      ("dessert", "food", "pie", "hash", "", "11", "sweet", "Linda Kim"), "Linda Kim")
    name, train, test = captions(drawing, 1, Counter({"food": 9, "dessert": 3, "sweet": 1}))
    assert name == train[0] == "Cherry Pie"
    assert train[1] == "a drawing of Cherry Pie, desserts, food"
    assert train[2] == "Cherry Pie, sweet, dessert, food"
    assert train[3].startswith("Cherry Pie. Baked this morning")
    assert test.startswith("Cherry Pie, sweet, dessert, food. Baked") and len(test.split()) == 25
    assert all(len(caption.split()) <= 30 for caption in train)
    assert captions(Drawing("..."), 1, Counter())[1] == []


def test_metadata_of_good_and_broken_svg(tmp_path):
    svg = tmp_path / "a.svg"
    svg.write_text(SVG.format(title="Apple &amp; pear", description=""), encoding="utf-8")
    expected = Drawing("a", "Apple & pear", "", ("hash(0x8a4caac)", "fruit"), "Linda Kim")
    assert openclipart.parse_metadata("a", svg) == expected
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><title>Sheep</title><desc>Shaggy.</desc></svg>')
    assert openclipart.parse_metadata("a", svg)[1:3] == ("Sheep", "Shaggy.")
    for broken in (b"<svg><metadata>", b"\xff\xfe\x00", b'<?xml version="1.0" encoding="nonsense"?><svg/>'):
        svg.write_bytes(broken)
        assert openclipart.parse_metadata("a", svg) == Drawing("a")


def test_pictures_are_centered_on_white_without_their_transparent_margin(tmp_path):
    image = Image.new("RGBA", (300, 400))
    image.paste((255, 0, 0, 255), (10, 20, 110, 70))
    image.save(tmp_path / "a.png")
    ink = openclipart.render((tmp_path / "a.png", tmp_path / "out/a.jpg"), 64)
    with Image.open(tmp_path / "out/a.jpg") as jpeg:
        assert jpeg.size == (64, 64) and jpeg.mode == "RGB"
        pixels = np.asarray(jpeg).astype(int)
    red = pixels[:, :, 1] < 128
    assert red[17:47].all() and not red[:15].any() and not red[49:].any()  # 100 x 50 becomes 64 x 32, centered
    assert pixels[:14].min() > 240
    assert ink.shape == (16, 16, 3) and ink[8, 8, 1] > 250 and ink[0].max() < 10


@pytest.mark.parametrize("content", ["garbage", "truncated", "empty", "bomb"])
def test_unreadable_pictures_are_skipped(tmp_path, content, monkeypatch):
    png = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(png)
    if content == "garbage":
        png.write_bytes(b"no picture")
    elif content == "truncated":
        png.write_bytes(png.read_bytes()[:3000])
    elif content == "empty":
        Image.new("RGBA", (50, 50)).save(png)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert openclipart.render((png, tmp_path / "a.jpg"), 64) is None
    assert not (tmp_path / "a.jpg").exists()


def test_near_duplicates_form_groups():
    rng = np.random.default_rng(0)
    inks = rng.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    inks[1] = np.clip(inks[0].astype(int) + rng.integers(-3, 4, inks[0].shape), 0, 255)
    series = [series_name(f"fruit/{i}", name) for i, name in
              enumerate(["Apple", "Red fruit", "Pear", "pear 02", "Pear (sliced)", "Plum"])]
    groups = duplicate_groups(inks, series)
    assert groups[0] == groups[1] and groups[2] == groups[3] == groups[4]
    assert len(set(groups)) == 3
    assert series_name("a/x", "7 of clubs") != series_name("a/y", "8 of clubs")
    assert series_name("a/x", "Pear") != series_name("b/x", "Pear")


def test_split_keeps_groups_together_and_is_deterministic():
    groups = [i // 3 for i in range(90)] + [99] * 50 + list(range(100, 120))
    texts = [f"caption {i}" for i in range(140)] + ["The same!", "the SAME"] * 10
    sizes = {"test": 12, "val": 8}
    splits = openclipart.split_groups(groups, texts, sizes, seed=0)
    assert {split: len(splits[split]) for split in sizes} == sizes
    members = {split: [groups[i] for i in indices] for split, indices in splits.items()}
    for split in sizes:
        assert len(set(members[split])) == sizes[split]
        assert len({texts[i].lower().strip("!") for i in splits[split]}) == sizes[split]
    assert not set(members["test"]) & set(members["val"])
    assert not set(members["train"]) & set(members["test"] + members["val"])
    assert Counter(members["train"])[99] == openclipart.SERIES_LIMIT
    assert openclipart.split_groups(groups, texts, sizes, seed=0) == splits
    for seed in range(1, 6):
        others = openclipart.split_groups(groups, texts, sizes, seed)
        assert others != splits and 99 not in {groups[i] for i in others["test"] + others["val"]}  # too long a series
    assert "ask for fewer" in refusal(openclipart.split_groups, groups, texts, {"test": 60, "val": 0}, 0)


def test_image_names_are_ascii_and_unique():
    names = openclipart.image_names(["a/é", "a/è", "a/b", "a/B", "a/c.d", "a/c_d"])
    assert len({name.lower() for name in names}) == 6
    assert all(re.fullmatch(r"images/a/[A-Za-z0-9_\-]+\.jpg", name) for name in names)


def run(monkeypatch, output, packages, val=2):
    arguments = ["--output", output, "--image_res", 32, "--test", 3, "--val", val, "--packages", *packages]
    monkeypatch.setattr(sys, "argv", ["openclipart", *map(str, arguments)])
    return exit_status(openclipart.main)


def test_command_writes_the_formats_survives_broken_files_and_runs_once(tmp_path, monkeypatch, capsys):
    """14 drawings, of which one PNG and one SVG are broken and a link repeats one."""
    png, svg = (tmp_path / kind / "usr/share/openclipart" / kind / "food/fruit" for kind in ("png", "svg"))
    png.mkdir(parents=True)
    svg.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "apple pear plum peach grape lemon lime orange banana cherry fig kiwi mango melon".split():
        Image.fromarray(rng.integers(0, 200, (4, 6, 3), dtype=np.uint8)).resize((60, 40)).save(png / f"{name}.png")
        (svg / f"{name}.svg").write_text(SVG.format(title=name, description=f"Ripe {name}."), encoding="utf-8")
    (png / "fig.png").write_bytes(b"broken")
    (svg / "kiwi.svg").write_text("<svg")
    (png.parent / "apple.png").symlink_to("fruit/apple.png")
    (svg.parent / "apple.svg").symlink_to("fruit/apple.svg")
    output = tmp_path / "out"
    assert run(monkeypatch, output, [tmp_path / "png"]) == 2
    assert "no drawing has both" in capsys.readouterr().err and not list(output.iterdir())

    assert run(monkeypatch, output, [tmp_path / "png", tmp_path / "svg"]) == 0
    assert "drawings 14, skipped 1" in capsys.readouterr().out
    entries = {split: json.loads((output / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    assert {split: len(entries[split]) for split in entries} == {"train": 8, "val": 2, "test": 3}
    every = sum(entries.values(), [])
    images = [entry["image"] for entry in every]
    assert len(set(images)) == 13 and "images/food/fruit/fig.jpg" not in images
    for entry in every:
        assert set(entry) == {"image", "caption"} and all(openclipart.words(text) for text in entry["caption"])
        with Image.open(output / entry["image"]) as image:
            assert image.size == (32, 32) and image.format == "JPEG"
    kiwi = every[images.index("images/food/fruit/kiwi.jpg")]  # its SVG is broken
    assert set(kiwi["caption"]) <= {"kiwi", "a drawing of kiwi, fruit, food", "kiwi, fruit, food"}
    assert all((len(entry["caption"]) > 1) == (split == "train") for split in entries for entry in entries[split])

    (output / images[0]).unlink()
    assert run(monkeypatch, output, [tmp_path / "png", tmp_path / "svg"]) == 0
    assert "is complete" in capsys.readouterr().out and not (output / images[0]).exists()
    with monkeypatch.context() as patch:
        patch.setattr(openclipart, "split_groups", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run(monkeypatch, output, [tmp_path / "png", tmp_path / "svg"], val=1) == 130
    assert run(monkeypatch, output, [tmp_path / "png", tmp_path / "svg"]) == 0 and (output / images[0]).exists()
    assert "drawings 14" in capsys.readouterr().out
    assert entries["train"] == json.loads((output / "train.json").read_text())


def test_a_folder_that_is_missing_or_cannot_be_written_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path / "out", ["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: --packages nowhere: no such folder")
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, tmp_path / "file/out", [tmp_path]) == 2
    error = capsys.readouterr().err
    assert "file/out" in error and error.count("\n") == 1


def test_a_missing_or_failing_apt_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch = openclipart.fetch_packages, tmp_path / "packages"
    assert re.match("apt-get is missing.*--packages", refusal(*fetch))
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    assert re.search("Unable to locate package.*apt-get update", refusal(*fetch))
