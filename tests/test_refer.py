"""Files of REFER: accepted content, and content that is refused without running anything."""

import json
import os
import pickle
import struct

import pytest
from conftest import refusal

from dataset.refer import load_detections, load_refer

REFS = [
    {
        "ref_id": 0,
        "ann_id": 10,
        "image_id": 5,
        "split": "train",
        "sentences": [{"sent_id": 1, "raw": "caf\xe9"}],
    },
    {
        "ref_id": 1,
        "ann_id": 11,
        "image_id": 5,
        "split": "val",
        "sent_ids": [2, 3],
        "file_name": "COCO_5.jpg",
    },
    {"ref_id": 2, "ann_id": 12, "image_id": 6, "split": "testB", "category_id": 2**40},
]
INSTANCES = {
    "images": [
        {"id": 5, "height": 30, "width": 40, "file_name": "5.jpg", "license": 1},
        {"id": 6, "height": 20, "width": 10, "file_name": "6.jpg"},
    ],
    "annotations": [
        {"id": 10, "bbox": [0, 0, 5, 5], "image_id": 5},
        {"id": 11, "bbox": [1.5, 2.25, 5, 6], "image_id": 5},
        {"id": 12, "bbox": [3, 3, 4, 4], "image_id": 6, "segmentation": []},
    ],
}
DETECTIONS = {"5": [[0, 0, 3.5, 4, 0.9], [1, 1, 2, 2]], "6": [[0, 0, 1, 1, 1]], "7": []}


# REFS as Python 2 writes them: strings of bytes
PYTHON_2 = [
    b"(lp0\n(dp1\nS'ref_id'\nI0\nsS'ann_id'\nI10\nsS'image_id'\nL5L\nsS'split'\nS'train'\ns"
    b"S'raw'\nS'caf\\xe9'\nsa(dS'ref_id'\nI1\nsS'ann_id'\nI11\nsS'image_id'\nI5\nsS'split'\n"
    b"S'val'\nsa(dS'ref_id'\nI2\nsS'ann_id'\nI12\nsS'image_id'\nI6\nsS'split'\nS'testB'\nsa.",
    b"\x80\x02](}(U\x06ref_idK\x00U\x06ann_idK\nU\x08image_idK\x05U\x05splitU\x05train"
    b"U\x03rawU\x04caf\xe9u}(U\x06ref_idK\x01U\x06ann_idK\x0bU\x08image_idK\x05U\x05splitU\x03val"
    b"u}(U\x06ref_idK\x02U\x06ann_idK\x0cU\x08image_idK\x06U\x05splitU\x05testBue.",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "refcoco+").mkdir()
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(PYTHON_2[1])
    (tmp_path / "refcoco+/instances.json").write_text(json.dumps(INSTANCES))
    return tmp_path


def refused(path, data):
    """The message on a file of REFER with this content; it names the file."""
    path.write_bytes(data)
    message = refusal(load_refer, path.parent.parent)
    assert message.startswith(str(path))
    return message


def refused_refs(folder, data):
    return refused(folder / "refcoco+/refs(unc).p", data)


def refused_instances(folder, text):
    return refused(folder / "refcoco+/instances.json", text.encode())


@pytest.mark.parametrize(
    "data",
    [
        *PYTHON_2,
        *(pickle.dumps(REFS, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_refs_of_every_protocol_are_read(folder, data):
    (folder / "refcoco+/refs(unc).p").write_bytes(data)
    refer = load_refer(str(folder))
    assert refer.refs == {
        0: {"image_id": 5, "split": "train"},
        1: {"image_id": 5, "split": "val"},
        2: {"image_id": 6, "split": "testB"},
    }
    assert refer.boxes == {0: [0, 0, 5, 5], 1: [1.5, 2.25, 5, 6], 2: [3, 3, 4, 4]}
    assert refer.images == {
        5: {"height": 30, "width": 40, "file_name": "5.jpg"},
        6: {"height": 20, "width": 10, "file_name": "6.jpg"},
    }


class Command:
    """Pickled as a call of os.system, as attacks do."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Plain:
    """Pickled by protocol 2 and later as a new object with a state."""


def touching(path):
    """Pickles of which each creates the file `path` if it is read by pickle.load, with the name
    each imports.
    """
    command = f"touch {path}"
    calls = {
        f"{os.name}.system": [pickle.dumps([Command(command)], protocol) for protocol in range(6)]
    }
    quoted = repr(command).encode()
    calls["os.system"] = [
        b"cos\nsystem\n(S%s\ntR." % quoted,
        b"(S%s\nios\nsystem\n." % quoted,  # INST
        b"(cos\nsystem\nS%s\no." % quoted,  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(S%s\ntR." % quoted,  # STACK_GLOBAL
    ]
    return [(data, name) for name, group in calls.items() for data in group]


@pytest.mark.parametrize("case", range(10))
def test_pickle_that_runs_a_command_is_refused(folder, case):
    data, name = touching(folder / "created")[case]
    pickle.loads(data)
    assert (folder / "created").exists()  # the attack works where pickles are trusted
    (folder / "created").unlink()
    message = refused_refs(folder, data)
    assert f"it would import and run '{name}'" in message
    assert "this is not the released file of REFER; download it again" in message
    assert not (folder / "created").exists()


@pytest.mark.parametrize("data", [b"Psome id\n.", b"S'some id'\nQ."])
def test_persistent_id_is_refused(folder, data):
    message = refused_refs(folder, data)
    assert "UnpicklingError" in message and "persistent" in message


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_harmless_objects_are_refused_too(folder, protocol):
    assert "it would import and run" in refused_refs(folder, pickle.dumps([Plain()], protocol))
    assert "'collections.OrderedDict'" in refused_refs(folder, b"ccollections\nOrderedDict\n)R.")


@pytest.mark.parametrize("container", [b"}", b"]", b")", b"S'text'\n", b"I1\n", b"N"])
@pytest.mark.parametrize(
    "operation",
    [
        b"}S'x'\nI1\nsb",  # BUILD with a state
        b"N}S'__class__'\nI1\ns\x86b",  # BUILD with a state of slots
        b")R",  # REDUCE
        b")\x81",  # NEWOBJ
        b")}\x92",  # NEWOBJ_EX
    ],
)
def test_containers_cannot_be_called_or_given_attributes(folder, container, operation):
    message = refused_refs(folder, b"\x80\x04" + container + operation + b".")
    assert "cannot be read" in message and "download it again" in message


def test_name_of_an_import_cannot_break_the_message(folder):
    message = refused_refs(folder, b"\x80\x04\x8c\x05a\nb\x1b[\x8c\x01c\x93.")
    assert r"'a\nb\x1b[.c'" in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle at all",
        PYTHON_2[0][:-40],
        PYTHON_2[1][:-40],
        b"\x80\x09.",  # a protocol to come
        b"<!DOCTYPE html>",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x",  # a string longer than any memory
        b"\x80\x02}](I1\nI2\neI3\ns.",  # a list as key
    ],
)
def test_damaged_pickle_is_refused(folder, data):
    message = refused_refs(folder, data)
    assert "cannot be read" in message and message.endswith("download it again")


def test_missing_files_are_named_with_their_place(folder):
    for name in "refs(unc).p", "instances.json":
        path = folder / "refcoco+" / name
        content = path.read_bytes()
        path.unlink()
        message = refusal(load_refer, folder)
        assert message.startswith(f"{path} does not exist")
        assert f"into {folder / 'refcoco+'}" in message and f"refcoco_data ({folder})" in message
        path.write_bytes(content)


def test_the_data_set_is_the_named_one(folder):
    refs = [{**REFS[1], "split": "test", "image_id": 6, "ann_id": 12}]
    for name, file in (("refcoco", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        assert str(folder / name / file) in refusal(load_refer, folder, name)
        (folder / name).mkdir()
        (folder / name / file).write_bytes(pickle.dumps(refs))
        (folder / name / "instances.json").write_text(json.dumps(INSTANCES))
        assert load_refer(folder, name).refs == {1: {"image_id": 6, "split": "test"}}
    assert (
        load_refer(folder).refs[1]
        == load_refer(folder, "refcoco+").refs[1]
        == {"image_id": 5, "split": "val"}
    )


def test_ids_that_do_not_mean_the_same_are_refused(folder):
    message = refused_refs(folder, pickle.dumps([{**REFS[1], "image_id": 6}]))
    assert "ref 1: its image_id is 6, but its annotation 11 in" in message
    for part, what in (("images", "image 6"), ("annotations", "annotation 12")):
        twice = [*INSTANCES[part], {**INSTANCES[part][-1], "height": 7, "bbox": [0, 0, 9, 9]}]
        assert f"{what} occurs twice" in refused_instances(
            folder, json.dumps({**INSTANCES, part: twice})
        )
        (folder / "refcoco+/refs(unc).p").write_bytes(PYTHON_2[1])
        (folder / "refcoco+/instances.json").write_text(
            json.dumps({**INSTANCES, part: INSTANCES[part] * 2})
        )
        assert load_refer(folder).refs.keys() == {0, 1, 2}


def test_refs_of_another_structure_are_refused(folder):
    def changed(**values):
        return pickle.dumps([REFS[0], {**REFS[1], **values}])

    assert "ref 1: ann_id 99 is not in" in refused_refs(folder, changed(ann_id=99))
    assert "ref 1: image_id 99 is not in" in refused_refs(folder, changed(image_id=99))
    assert "ref 0 occurs twice" in refused_refs(folder, changed(ref_id=0))
    assert "'str', got 'int' - at '$[1].split'" in refused_refs(folder, changed(split=3))
    assert "'int', got 'str' - at '$[1].ref_id'" in refused_refs(folder, changed(ref_id="one"))
    without = {key: value for key, value in REFS[1].items() if key != "ref_id"}
    assert "missing required field 'ref_id' - at '$[1]'" in refused_refs(
        folder, pickle.dumps([REFS[0], without])
    )
    for content in {}, [], {"ref_id": 1}, ["text"]:
        assert "download it again" in refused_refs(folder, pickle.dumps(content))


def test_instances_of_another_structure_are_refused(folder):
    def changed(part, **values):
        return json.dumps(
            {**INSTANCES, part: [*INSTANCES[part][:-1], {**INSTANCES[part][-1], **values}]}
        )

    assert "not valid JSON" in refused_instances(folder, json.dumps(INSTANCES)[:-20])
    for content in (
        {},
        [],
        {"images": []},
        {"images": [1], "annotations": []},
        {**INSTANCES, "images": [{"id": 5}]},
    ):
        assert "download it again" in refused_instances(folder, json.dumps(content))
    assert "length >= 4 - at '$.annotations[2].bbox'" in refused_instances(
        folder, changed("annotations", bbox=[1, 2, 3])
    )
    assert ">= 1 - at '$.images[1].width'" in refused_instances(folder, changed("images", width=0))


@pytest.fixture
def refer(folder):
    return load_refer(folder)


def detections_file(folder, content):
    path = folder / "dets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_detections_are_read(folder, refer):
    assert load_detections(detections_file(folder, DETECTIONS), refer) == {
        int(key): DETECTIONS[key] for key in DETECTIONS
    }


def test_images_of_evaluated_refs_need_a_box(folder, refer):
    for lacking in {"5": DETECTIONS["5"]}, {**DETECTIONS, "6": []}:
        path = detections_file(folder, lacking)
        message = refusal(load_detections, path, refer)
        assert message.startswith(f"{path}: no box for image 6 (ref 2, split testB)")
    only_train = refer._replace(refs={0: refer.refs[0]})
    assert load_detections(detections_file(folder, {}), only_train) == {}


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([], "Expected 'object', got 'array'"),
        ('{"5": [[1, 2', "not valid JSON"),
        ("", "not valid JSON"),
        ({"COCO_5.jpg": []}, "'COCO_5.jpg' is not an image id"),
        *(
            ({"5": boxes}, "image 5: Expected")
            for boxes in (
                [[1, 2, 3]],
                [[1, 2, 3, 4, 5, 6]],
                [[1, 2, 3, "4"]],
                [[1, 2, 3, True]],
                [1, 2, 3, 4],
                {"box": [1, 2, 3, 4]},
                None,
            )
        ),
        ({"5": [[1, 2, 3, float("nan")]]}, "not valid JSON"),
    ],
)
def test_detections_of_another_structure_are_refused(folder, refer, content, complaint):
    path = detections_file(folder, content)
    message = refusal(load_detections, path, refer)
    assert (
        message.startswith(f"{path}: ")
        and complaint in message
        and "{image_id: [[x, y, w, h, score], ...]}" in message
    )


@pytest.mark.parametrize(
    "box", [[40, 0, 5, 5], [0, 30, 5, 5, 0.9], [-6, 0, 10, 5], [20, 20, 30, 30]]
)
def test_boxes_outside_of_the_image_of_their_id_are_refused(folder, refer, box):
    path = detections_file(folder, {**DETECTIONS, "5": [*DETECTIONS["5"], box], "7": [box]})
    message = refusal(load_detections, path, refer)
    assert (
        message.startswith(f"{path}: image 5: box {list(map(float, box[:4]))}")
        and "5.jpg, which has 40 x 30" in message
    )


def test_boxes_that_a_detector_did_not_clip_are_read(folder, refer):
    content = {**DETECTIONS, "5": [[-1, -0.5, 42, 31], [38, 28, 2.5, 2.2], [0, 0, 0, 0]]}
    assert load_detections(detections_file(folder, content), refer)[5] == content["5"]


def test_missing_detections_are_named(folder, refer):
    assert refusal(load_detections, folder / "none.json", refer).startswith(
        f"{folder / 'none.json'}: cannot be read"
    )
