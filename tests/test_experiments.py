"""The driver of experiments runs each row once; the reports show finished rows and chance."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from conftest import ROOT, refusal
from PIL import Image
from ruamel.yaml import YAML

from dataset.build import build_dataset
from experiments import page, report
from experiments.claims import effects, holm, judge
from experiments.rows import (
    Claim,
    check_unchanged,
    expand,
    parse_experiments,
    read_experiments,
    select,
    without_pretraining,
)
from experiments.run import Place, run, show

SCRIPT = """
import sys, time, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--to") + 1])
with open(folder / "starts", "a") as file:
    file.write("x")
if "--slow" in sys.argv and len((folder / "starts").read_text()) == 1:
    time.sleep(60)
if "--fail" in sys.argv:
    sys.exit("first line\\nno such photo")
(folder / "log.txt").write_text('{"test_acc": 50.0, "epoch": 0}')
"""
ONE = [Place("one core of a test", {}, None)]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes rows of a script that takes no time: name -> its keys; returns their Rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(SCRIPT)

    def rows(output="out", **keys):
        for row in keys.values():
            row.setdefault("script", "fake.py")
            row["flags"] = "--to {folder} " + row.get("flags", "")
        return rows_of(keys, tmp_path / output)

    return rows


def rows_of(rows, output):
    """The Rows of the rows of a file."""
    return expand(parse_experiments({"output": str(output), "rows": rows}, "file"))


def starts(row):
    return len((row.folder / "starts").read_text())


def test_a_second_call_does_nothing_wherever_the_results_lie(fake, tmp_path):
    rows = fake(a={}, b={"from": "a"})
    for _ in range(2):
        assert run(rows, ONE) == ([], [])
        assert all(row.complete and starts(row) == 1 for row in rows.values())
    assert rows["b"].command[1:3] == ["--checkpoint", str(rows["a"].folder / "checkpoint_last.pth")]
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = fake("moved", a={}, b={"from": "a"})
    check_unchanged(moved)
    assert all(row.complete for row in moved.values())


def test_what_a_row_creates_is_made_again_where_it_is_gone(fake, tmp_path):
    (row,) = fake(a={"creates": "data.json"}).values()
    run({"a": row}, ONE)
    assert not row.complete
    (tmp_path / "data.json").touch()
    assert row.complete


def test_a_failing_row_is_reported_and_the_others_go_on(fake, capsys):
    rows = fake(a={"flags": "--fail"}, b={"from": "a"}, c={})
    assert run(rows, ONE) == (["a"], ["b"])
    said = capsys.readouterr().out
    assert "a: ended with status 1" in said and "    no such photo" in said and rows["c"].complete
    run(rows, ONE)
    assert starts(rows["a"]) == 2 and starts(rows["c"]) == 1


DRIVER = """
from experiments.rows import expand, parse_experiments
from experiments.run import Place, run
from engine.launch import run_script
keys = {"script": "fake.py", "flags": "--to {folder}"}
rows = {"a": keys, "b": {**keys, "flags": "--to {folder} --slow", "needs": ["a"]}}
rows = expand(parse_experiments({"output": "out", "rows": rows}, "file"))
run_script(lambda: run(rows, [Place("one core of a test", {}, None)]))
"""


def test_an_interrupted_run_goes_on_and_counts_all_its_minutes(fake, tmp_path):
    a, b = fake(a={}, b={"flags": "--slow", "needs": ["a"]}).values()
    command, environment = [sys.executable, "-c", DRIVER], {**os.environ, "PYTHONPATH": str(ROOT)}
    for sent in (signal.SIGTERM, signal.SIGKILL):
        driver = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not (b.folder / "starts").exists():
            assert driver.poll() is None, driver.stdout.read()
            time.sleep(0.05)
        time.sleep(0.3)
        driver.send_signal(sent)
        # ends when the run, which has the same output, has ended, too
        driver.communicate(timeout=60)
        record = json.loads((b.folder / "experiment.json").read_text())
        assert not record["complete"] and record["seconds"] > 0.2
        assert ("began" in record) == (sent == signal.SIGKILL)
        (b.folder / "starts").unlink()
    os.utime(b.log, (record["began"] + 90,) * 2)  # until when the killed one has written
    (b.folder / "starts").write_text("x")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert b.complete and starts(b) == 2 and 1.5 < b.minutes < 2
    assert starts(a) == 1


def test_changed_settings_are_refused_also_in_what_a_row_starts_from(fake, tmp_path):
    (tmp_path / "config.yaml").write_text("image_res: 64\n")
    keys = {"a": {"config": "config.yaml"}, "b": {"from": "a"}}

    def rows():
        return fake(**copy.deepcopy(keys))

    run(rows(), ONE)
    check_unchanged(rows())
    (tmp_path / "config.yaml").write_text("image_res: 64\nk_test: 128\n")  # what it was by default
    check_unchanged(rows())
    (tmp_path / "config.yaml").write_text("image_res: 32\n")
    assert "row a has changed since it was run (image_res was 64)" in refusal(
        check_unchanged, rows()
    )
    (rows()["a"].folder / "experiment.json").unlink()
    assert "row b has changed since it was run (a: image_res" in refusal(check_unchanged, rows())
    keys["a"]["set"] = {"k_tset": 3}
    assert "did you mean k_test?" in refusal(check_unchanged, rows())


def test_seeds_come_one_after_the_other_and_what_starts_from_them_takes_its_own(fake):
    rows = fake(
        a={"seeds": [3, 5]}, b={"from": "a", "seeds": [3, 5]}, c={"from": "a/checkpoint_best.pth"}
    )
    assert list(rows) == ["a/seed3", "b/seed3", "c", "a/seed5", "b/seed5"]
    assert rows["b/seed5"].needs == ["a/seed5"] and rows["c"].needs == ["a/seed3"]
    assert list(select(rows, ["c"])) == ["a/seed3", "c"]
    assert list(select(rows, ["b"])) == ["a/seed3", "b/seed3", "a/seed5", "b/seed5"]
    assert "--rows: there is no row d" in refusal(select, rows, ["d"])
    assert "--seed 5" in " ".join(rows["a/seed5"].command)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"b": {"from": "c"}}, "row b: it needs the row c, which is not in the file"),
        ({"a": {"from": "b"}, "b": {"from": "a"}}, "wait for each other in a circle (a, b, a)"),
        ({"a": {"flags": '"'}}, "row a: No closing quotation"),
        ({"a": {"script": "VQA.py", "set": {"image_root": "x"}}}, "row a: --set image_root"),
    ],
)
def test_wrong_rows_are_refused(fake, rows, message):
    assert message in refusal(lambda: fake(**copy.deepcopy(rows)))


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["'object'"]),
        ("output: x", ["'rows'"]),
        ("output: x\nrows: {}", ["$.rows"]),
        ("output: x\nrows: {a: }", ["row a", "'object'"]),
        ("output: x\nrows: {a: {config: configs/VE.yaml}}", ["row a", "'script'"]),
        ("output: x\nrows: {a: {script: VE.py, form: b}}", ["row a", "'form'"]),
        ("output: x\nrows: {a: {script: VE.py, seeds: 3}}", ["row a", "$.seeds"]),
        ("output: x\nrows: {a: {script: VE.py, seeds: []}}", ["row a", "'array' of length >= 1"]),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, words):
    (tmp_path / "file.yaml").write_text(content)
    message = refusal(read_experiments, tmp_path / "file.yaml")
    assert all(word in message for word in ["file.yaml", *words])


@pytest.mark.parametrize("name", ["shapes", "paper"])
def test_rows_have_valid_settings_and_flags(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    content = read_experiments(f"experiments/{name}.yaml")
    rows = expand(msgspec.structs.replace(content, output="output/none"))
    check_unchanged(rows)  # reads every configuration
    for made in content.claims.values():
        assert effects(made, rows) == ({}, 5)
    show(rows, 2)
    said = capsys.readouterr().out
    assert all(f"{row} (" in said for row in rows) and "minutes are left on one core" in said
    assert "(0 min)" not in said


def test_make_shows_the_runs_without_running_them(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in "experiments engine configs utils.py requirements.txt constraints.txt data".split():
        (tmp_path / name).symlink_to(ROOT / name)
    call = subprocess.run(
        ["make", "-n", "paper"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "grounding/itm2/seed4 (1 min): python Grounding.py" in call.stdout
    assert not (tmp_path / "output").exists()


# --------------------------------------------------------------------------------------------------
# reports


def complete(rows, name, seconds=60, **metrics):
    """Leaves what a complete run of a row leaves."""
    row = rows[name]
    row.folder.mkdir(parents=True, exist_ok=True)
    (row.folder / "log.txt").write_text(json.dumps(metrics | {"epoch": 0}) + "\n")
    (row.folder / "experiment.json").write_text(
        json.dumps({"complete": True, "seconds": seconds, "machine": "one core"})
    )


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """experiments/paper.yaml, its rows in a folder of the test, and its page there."""
    monkeypatch.chdir(ROOT)
    content = read_experiments("experiments/paper.yaml")
    places = {"output": str(tmp_path / "out"), "page": str(tmp_path / "docs/results.md")}
    content = msgspec.structs.replace(content, **places)
    return content, expand(content), tmp_path


def test_a_page_has_claims_numbers_and_what_is_missing(paper):
    content, rows, folder = paper
    for seed in range(5):
        recall = {"test_txt_r_mean": 90 + seed, "test_img_r_mean": 80}
        itc = {"test_itc_txt_r_mean": 80, "test_itc_img_r_mean": 69 + seed / 9}
        k16 = {f"test_k16_{key[5:]}": number for key, number in recall.items()}
        complete(rows, f"downstream/ranking/seed{seed}", **recall, **itc, **k16)
        if seed < 2:
            complete(rows, f"full/VE/seed{seed}", test_acc=70 + 4 * seed)
    complete(rows, "baselines", seconds=120, test_ve_text=33.3, test_grounding_object_val_d=36.7)
    complete(rows, "grounding/seed0", seconds=0, val_d=36.6)
    complete(rows, "figure4", seconds=0)
    Image.effect_noise((2000, 100), 50).save(rows["figure4"].folder / "figure.png")
    report.report(content)
    text = (folder / "docs/results.md").read_text()
    assert f"10 of {len(rows)} [runs](results/runs.csv) are complete." in text
    assert "They took 9 minutes in total, each on one core" in text
    assert "Supported: ITM after ITC, number of candidates." in text
    claims = {line.split(":")[0][2:]: line for line in text.splitlines() if " (Table 6) |" in line}
    # 10 + seed and 11 - seed / 9 on the two sides: mean 11.39, its standard error 0.31
    assert "| +11.4 (+10.5 to +12.3) |" in claims["ITM after ITC"]
    assert "| +2.0 | supported |" in claims["ITM after ITC"]
    equal = "| +0.0 (+0.0 to +0.0) | below 0.001 | +0.2 | supported |"
    assert equal in claims["number of candidates"]
    assert "| – | – | +0.3 | 0 of 5 seeds |" in claims["hard negatives in fine-tuning"]
    assert "| Full | – [97.47] | – [92.58] | 72.0 ± 2.8 [80.12] | – [74.42] |" in text
    assert "| most frequent answer for each text | 33.3 | – | – |" in text
    assert "the model finds 36.6% of the objects" in text and "one in 36.7%" in text
    assert text.count("\nNot run yet.\n") == 3  # noise, relevance, momentum
    runs = list(csv.DictReader((folder / "docs/results/runs.csv").open()))
    assert [run["run"] for run in runs] == list(rows)
    found = {run["run"]: run for run in runs}
    assert found["full/VE/seed1"]["metrics"] == "test_acc=74.00"
    assert found["full/VE/seed1"]["minutes"] == "1.0" and not found["full/VE/seed2"]["minutes"]
    with Image.open(folder / "docs/results/claims.png") as picture:
        assert picture.width > 800
    with Image.open(folder / "docs/results/figure4.png") as picture:
        assert picture.size == (1000, 50) and "results/figure5.png" not in text


def claim(**keys):
    return Claim(source="Table 0", text="A test.", plus=["a x"], minus=["b x"], **keys)


@pytest.mark.parametrize(
    ("effects", "margin", "interval", "p", "verdict"),
    [
        ([10, 11, 9], None, (7.52, 12.48), 0.0033, "supported"),
        ([-10, -11, -9], None, (-12.48, -7.52), 0.0033, "contradicted"),
        ([2, 1, 3, -4], None, (-4.45, 5.45), 0.7688, "inconclusive"),
        ([0, 0, 0], None, (0, 0), 1, "inconclusive"),
        ([0.1, -0.1, 0.2, 0.1], 1, (-0.125, 0.275), 0.0003, "supported"),
        ([0.9, -0.1, 0.2, 1.8], 1, (-0.64, 2.04), 0.2643, "inconclusive"),
        ([2.1, 2.2, 2.0], 1, (1.85, 2.35), 0.9986, "contradicted"),
    ],
)
def test_a_claim_has_a_verdict_by_its_interval_and_its_margin(
    effects, margin, interval, p, verdict
):
    (finding,) = judge([claim(margin=margin)], [(dict(enumerate(effects)), len(effects))])
    assert finding.interval == pytest.approx(interval, abs=0.005)
    assert finding.p == pytest.approx(p, abs=0.0001) and finding.verdict == verdict


def test_verdicts_wait_for_all_seeds_and_are_corrected_for_all_claims():
    strong, weak = {0: 10.0, 1: 11.0, 2: 9.0}, {0: 3.0, 1: 4.0, 2: 1.5}
    findings = judge([claim()] * 3, [(strong, 3), (weak, 3), (strong, 5)])
    assert [finding.verdict for finding in findings] == [
        "supported",
        "inconclusive",
        "3 of 5 seeds",
    ]
    assert findings[0].p == pytest.approx(3 * 0.0033, abs=0.0001)  # Holm
    assert findings[1].p == pytest.approx(2 * 0.0599, abs=0.001)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_effects_are_paired_by_seed_and_a_number_names_its_row(fake):
    rows = fake(a={"seeds": [3, 5]}, b={"seeds": [3, 5]}, c={"seeds": [3, 5]})
    for name, numbers in {"a": (50, 60), "b": (40, 58), "c": (10, 20)}.items():
        for seed, number in zip((3, 5), numbers, strict=True):
            complete(rows, f"{name}/seed{seed}", x=number)
    assert effects(claim(times=2), rows) == ({3: 20, 5: 4}, 2)
    both = msgspec.structs.replace(claim(), plus=["a x", "c x"])
    assert effects(both, rows) == ({3: -10, 5: -18}, 2)
    assert effects(msgspec.structs.replace(claim(), plus=["a y"]), rows) == ({}, 2)
    for number in ("a", "d x"):
        wrong = msgspec.structs.replace(claim(), plus=[number])
        assert number in refusal(effects, wrong, rows)


def test_of_pages_without_any_effect_at_most_five_percent_have_a_verdict():
    """Simulates pages of 13 claims on 5 seeds, whose effects are noise."""
    rng, pages, wrong = np.random.default_rng(0), 400, 0
    for drawn in rng.standard_normal((pages, 13, 5)).tolist():
        findings = judge([claim()] * 13, [(dict(enumerate(row)), 5) for row in drawn])
        wrong += any(finding.verdict != "inconclusive" for finding in findings)
    assert wrong / pages <= 0.05 + 2 * (0.05 * 0.95 / pages) ** 0.5
    # a difference as large as the margin is not a claim of equality
    equal = [claim(margin=1)]
    margins = 1 + rng.standard_normal((1000, 5))
    found = [judge(equal, [(dict(enumerate(row)), 5)])[0].verdict for row in margins.tolist()]
    assert found.count("supported") / 1000 <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


def test_the_table_of_tasks_has_chance_scratch_and_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    content = read_experiments("experiments/shapes.yaml")
    content = msgspec.structs.replace(content, output=str(tmp_path / "out"))
    rows, scratch = expand(content), expand(without_pretraining(content))
    assert str(scratch["VE"].folder) == str(tmp_path / "out-scratch/VE")
    assert (
        "Attributes" in rows
        and "Attributes" not in scratch
        and "--checkpoint random" in " ".join(scratch["VE"].command)
    )
    assert "--resume" in rows["VE"].command and "--resume" not in rows["Attributes"].command
    complete(rows, "VE", test_acc=76.7, seconds=426)
    complete(rows, "NLVR_pretrain", seconds=600)
    complete(rows, "NLVR", test_acc=72, seconds=960)
    complete(scratch, "VE", test_acc=66.6)
    report.report(content)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["VE", "accuracy", "33.3", "66.6", "76.7", "7.1"] in lines
    assert ["NLVR", "accuracy", "50.0", "–", "72.0", "26.0"] in lines
    assert lines[-1][3:5] == ["33.1", "minutes,"]


def test_chance_is_that_of_the_data_of_a_rows_configuration(shapes, tiny_config, tmp_path):
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads((shapes / "test.json").read_text())[:6]))
    keys = {key: tiny_config[key] for key in ("test_file", "image_root", "image_res")}
    YAML(typ="safe").dump({**keys, "val_file": str(few)}, tmp_path / "config.yaml")
    retrieval = {"script": "Retrieval.py", "config": str(tmp_path / "config.yaml")}
    rows = rows_of(
        {
            "a": retrieval,
            "few": {**retrieval, "set": {"test_file": str(few)}},
            "no configuration": {"script": "Retrieval.py", "from": "a", "flags": "--evaluate"},
        },
        tmp_path / "out",
    )
    for name, metric, chance in (
        ("a", "test_k16_img_r5", 5 / 12),
        ("a", "test_img_r_mean", (1 + 5 + 10) / 36),
        ("a", "val_img_r5", 5 / 6),
        ("few", "test_img_r5", 5 / 6),
    ):
        assert report.chance(rows[name], metric) == pytest.approx(100 * chance)
    assert report.chance(rows["no configuration"], "test_img_r5") is None
    lines = [("a", [("a", "test_img_r5"), None], [97.5])]
    table = page.NumberTable("Title", "A text.", ["R@5", "none"], lines)
    assert list(page.number_table(table, rows))[4:] == ["Not run yet.", ""]
    complete(rows, "a", test_img_r5=50)
    text = list(page.number_table(table, rows))
    assert text[6:8] == ["| a | 50.0 [97.50] | – |", "| chance | 41.7 | – |"]


def test_chance_of_attributes_is_the_share_of_positives(shapes, tiny_config, tmp_path):
    keys = {"test_file": [str(shapes / "attributes.json")], "image_root": str(shapes)}
    boxes = build_dataset("attributes", "test", {**tiny_config, **keys}).entries
    shares = [
        np.mean([label == 1 for label in labels if label >= 0])
        for labels in zip(*(box.labels for box in boxes), strict=True)
        if 1 in labels
    ]
    YAML(typ="safe").dump({**keys, "image_res": 32}, tmp_path / "attributes.yaml")
    keys = {"script": "Attributes.py", "config": str(tmp_path / "attributes.yaml")}
    (row,) = rows_of({"c": keys}, tmp_path).values()
    assert report.chance(row, "test_map") == pytest.approx(100 * np.mean(shares))
