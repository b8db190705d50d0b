"""Weights in and out: weight files, the conversion of released, foreign and older ones, and a
report on every tensor.

Most failed reproductions come from weights that silently did not load. So an unexpectedly missing
tensor, an unused tensor and an impossible value (NaN, infinity) are errors. A refused file leaves
the model unchanged, unless its values are wrong. engine/saving.py saves and resumes runs.
"""

import json
import re
import reprlib
import zipfile
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from configs.schema import FILE_KEYS
from models.conversions import bert_names, interpolate_pos_embed, task_names
from models.hashes import verify_hash
from models.hub import fetch, find_file
from models.momentum import copy_to_momentum_
from models.tokenizer import FILES, VOCABULARY, difference, vocabulary_of
from utils import InputError

# of use together only; the last is of fine-tuning alone
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
PROJECTIONS = ("vision_proj", "text_proj")  # to the contrastive space
HEADS = ("cls_head", "ta_head")  # that pre-training does not have
SUFFIXES = (".pth", ".bin", ".safetensors")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder or a hub repository
# files of a published export, with alternatives
REPOSITORY = (("model.safetensors",), ("config.json",), FILES)
METADATA = ("config", "epoch", "tokenizer_json")  # of a .safetensors file, in JSON


# --------------------------------------------------------------------------------------------------
# files


def is_repository(path):
    """Return whether a name is no existing path and has the form USER/NAME or USER/NAME@REVISION of
    a hub repository.
    """
    named = (
        re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(path))
        and Path(path).suffix not in SUFFIXES
    )
    return bool(named) and not Path(path).exists()


def find_checkpoint(source: Path | str) -> Path:
    """Return the path of a checkpoint file.

    Args:
        source: A file; the folder of a run or of an export; or a hub repository, USER/NAME or
            USER/NAME@REVISION, which is downloaded into the hub's cache. In a folder,
            checkpoint_best is preferred to checkpoint_last, and both to other weight files.

    Raises:
        InputError: The source is missing, is a URL, or has no checkpoint.
    """
    if str(source).startswith(("http://", "https://")):
        raise InputError(f"checkpoint {source} is a URL: download it first and name the file")
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES]
        if not files:
            raise InputError(
                f"checkpoint {path}: the folder has no weight file ({', '.join(SUFFIXES)}): check"
                " the path"
            )
        order = ("checkpoint_last", "checkpoint_best")
        return max(
            files, key=lambda file: (order.index(file.stem) + 1 if file.stem in order else 0, file)
        )
    if is_repository(source):
        path = fetch(str(source), REPOSITORY, "checkpoint")[0]
        if not config_beside(path):
            raise InputError(
                f"checkpoint {source}: its config.json is not one of Export.py --to FOLDER/"
            )
    elif not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: check the path")
    return path


def read_checkpoint(path):
    """Return the content of a .pth, .bin or .safetensors file as a dict. Raises InputError if it
    cannot be read.

    A SHA-256 that Download.py recorded beside the file is verified. Pickles are read with
    weights_only, so code in them never runs. Tensors lie in a mapping of the file. They are read on
    use, and the system can reclaim their memory, unless the file is older than torch 1.6. A
    .safetensors file gives {"model": tensors by name}, and config, epoch and tokenizer_json if its
    metadata has them, like a .pth file of a run; see write_weights.
    """
    path = find_checkpoint(path)
    verify_hash(path)
    beside = config_beside(path) if path.name == REPOSITORY[0][0] else {}
    try:
        if path.suffix == ".safetensors":
            content = {**_read_safetensors(path), **beside}
        else:
            is_zip = zipfile.is_zipfile(path)
            if is_zip:
                _refuse_compressed(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except (
        RuntimeError,
        SafetensorError,
        EOFError,
        OSError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join((str(error) or repr(error)).split())[:200]
        raise InputError(f"checkpoint {path} cannot be read, it may be cut off: {reason}") from None
    except Exception:  # pickle.UnpicklingError and other errors of broken pickles
        raise InputError(
            f"checkpoint {path} is not a checkpoint, or holds more than tensors, numbers and text; no code in it "
            "was run"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds no named tensors")
    return content


def _refuse_compressed(path):
    """Raise InputError for compressed records: torch.save makes none, and a small file could fill
    the memory.
    """
    with zipfile.ZipFile(path) as file:
        if compressed := [
            record.filename
            for record in file.infolist()
            if record.compress_type != zipfile.ZIP_STORED
        ]:
            raise InputError(
                f"checkpoint {path} has compressed records ({compressed[0]}), which torch.save does not write: save "
                "it again with torch.save"
            )


def _read_safetensors(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        more = {key: json.loads(metadata[key]) for key in METADATA if key in metadata}
        return {"model": {name: file.get_tensor(name) for name in file.keys()}, **more}


def config_beside(path):
    """Return config and tokenizer_json from the files beside the weights of an exported folder, {}
    if they are missing.

    Such a folder may come from anybody, so its configuration may name only files beside it. Raises
    InputError.
    """
    file = Path(path).with_name("config.json")
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or "image_res" not in config:  # such as BERT's config.json
        return {}
    for key in FILE_KEYS:
        name = config.get(key)
        if not name or (key == "bert_config" and isinstance(name, dict)):
            continue
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not file.with_name(name).is_file()
        ):
            raise InputError(
                f"{file}: {key} is {reprlib.repr(name)}, which is not a file beside it: remove the key, and name the "
                "file by --set"
            )
        config[key] = str(file.with_name(name))
    vocabulary = file.with_name(VOCABULARY)
    if config.get("tokenizer") != str(vocabulary):
        return {"config": config}
    return {"config": config, "tokenizer_json": vocabulary.read_text(encoding="utf-8")}


def named_tensors(content, path):
    """Return the tensors of a checkpoint by name; unwraps {"model": ...} and the like. path: for
    the message of InputError.
    """
    for wrapper in ("model", "state_dict"):
        content = content[wrapper] if isinstance(content.get(wrapper), dict) else content
    prefix = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
    tensors = {
        prefix.sub("", str(name)): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise InputError(f"checkpoint {path} holds no named tensors")
    return tensors


def is_momentum(name):
    """Whether a tensor is of the momentum model or its queues."""
    return name.split(".")[0].endswith("_m") or name in QUEUES


def read_weights(path):
    """Return the tensors of a checkpoint file by name. Raises InputError."""
    return named_tensors(read_checkpoint(path), path)


def checkpoint_epoch(path):
    """Return the epoch that the weights of a checkpoint file are of, 0 if it does not say."""
    epoch = read_checkpoint(path).get("epoch")
    return epoch if isinstance(epoch, int) else 0


def write_weights(file, suffix, tensors, more):
    """Write tensors by name to an open file: as a .safetensors file, or else as a .pth file.

    more: any of METADATA, written as JSON metadata of a .safetensors file. A .safetensors file has
    tied tensors, which share memory, under each of their names. Raises TypeError if JSON cannot
    hold the config.
    """
    if suffix != ".safetensors":
        torch.save({"model": tensors, **more}, file)
        return
    metadata = {"format": "pt", **{key: json.dumps(more[key]) for key in METADATA if key in more}}
    untied, seen = {}, set()
    for name, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        untied[name] = value.clone() if memory in seen else value.contiguous()
        seen.add(memory)
    file.write(save(untied, metadata))


# --------------------------------------------------------------------------------------------------
# match names, check the plan, copy


def _is_resizable(name, value, target):
    """Whether value is a position embedding of a square grid that can be interpolated to target's
    shape.
    """
    if not name.endswith("pos_embed") or value.ndim != 3 or value.shape[::2] != target.shape[::2]:
        return False
    return all(
        round((tensor.shape[1] - 1) ** 0.5) ** 2 == tensor.shape[1] - 1
        for tensor in (value, target)
    )


def _misfit(name, value, target):
    """Why a tensor of a file cannot become the model's tensor `name`, "" if it can."""
    if value.shape != target.shape and not _is_resizable(name, value, target):
        return f"has shape {list(value.shape)} and the model's {name} {list(target.shape)}"
    if value.is_floating_point() != target.is_floating_point() or value.layout != target.layout:
        return (
            f"is {value.layout} {value.dtype} and the model's {name} {target.layout} {target.dtype}"
        )
    return ""


def _module(name):
    """The module of a model that a tensor belongs to, the same for base and momentum."""
    return name.split(".")[0].removesuffix("_m")


def _match(targets, weights, names, may_be_new, allow_missing):
    """Plan what becomes of each tensor of the model, as Records; the outcome of one that the file
    should have is "missing".

    A momentum module that the file lacks is copied from the base; one that it has must be complete,
    unless allow_missing. Queues of another size, and all with them, stay as they are.
    """
    # a file may lack them
    made_anew = {name for name in targets if name.endswith("position_ids") or name in QUEUES}
    in_file = {
        name.split(".")[0] for name in targets if names[name] in weights and name not in made_anew
    }
    keep_queues = all(
        names[queue] in weights and weights[names[queue]].shape == targets[queue].shape
        for queue in QUEUES[:3]
        if queue in targets
    )
    records = []
    for name, target in targets.items():
        old, value = names[name], weights.get(names[name])
        module, _, rest = name.partition(".")
        base = names.get(f"{module.removesuffix('_m')}.{rest}")
        if value is not None and name in QUEUES and not keep_queues:
            records.append(Record(name, old, "new"))
        elif value is not None:
            cast = "" if value.dtype == target.dtype else str(value.dtype).removeprefix("torch.")
            records.append(Record(name, old, "loaded", value.shape != target.shape, cast))
        elif base in weights and (allow_missing or module not in in_file):
            records.append(Record(name, base, "copied"))
        else:
            records.append(
                Record(name, "", "new" if may_be_new(name) or name in made_anew else "missing")
            )
    used = {record.in_file for record in records}
    return records + [Record("", name, "ignored") for name in weights if name not in used]


def _check(records, targets, weights, source, must_fit, allow_missing):
    """Raise InputError for a plan that leaves something out silently.

    Arguments as in load_weights.
    """
    loaded = [record for record in records if record.outcome == "loaded"]
    misfits = {
        r.in_file: why
        for r in loaded
        if (why := _misfit(r.name, weights[r.in_file], targets[r.name]))
    }
    if misfits:
        hint = "the file is of another configuration (image_res, patch_size, vision_width, embed_dim, bert_config) or task"
        if all(_module(name) in HEADS for name in misfits):
            hint = "it is the head of another task: start from pre-trained weights, or name a checkpoint of this task"
        shown = listed([f"{name} {why}" for name, why in misfits.items()], 3)
        raise InputError(f"{source}: {shown}: {hint}")
    if allow_missing:
        return
    missing = [record.name for record in records if record.outcome == "missing"]
    unplaced = [
        record.in_file
        for record in records
        if record.outcome == "ignored" and must_fit(record.in_file)
    ]
    names = listed(shorten(unplaced, weights))
    if missing:
        problem = f"lacks {len(missing)} tensors of the model: {listed(shorten(missing, targets))}"
        question, effect = (
            f"it has {names} instead; " * bool(unplaced) + "is it the right file?",
            "leaves them as initialized",
        )
    elif unplaced:
        problem = f"has {len(unplaced)} tensors that the model has no place for: {names}"
        question = "is it of a deeper model, of another kind or fusion_layer, or of a task with two images?"
        effect = "leaves them out"
    else:
        return
    raise InputError(
        f"{source} {problem}; {question}"
        + ("" if allow_missing is None else f" --allow_missing {effect}")
    )


def _copy(records, targets, weights, source):
    """Copy tensors into the model.

    Raises InputError for values that no training gives, and where tied ones differ.
    """
    filled, untied, broken = {}, [], []
    for name, in_file, outcome, *_ in records:
        # of which there is nothing to copy to
        if outcome not in ("loaded", "copied") or targets[name].is_meta:
            continue
        target, value = targets[name], weights[in_file]
        if value.shape != target.shape:
            value = interpolate_pos_embed(value, target.shape[1])
        twin = filled.setdefault(id(target), in_file)
        if value.is_meta:
            broken.append(in_file)
        elif twin != in_file:
            if not torch.equal(value.to(target), target):
                untied.append(f"{in_file} and {twin}")
        else:
            target.copy_(value)
            if target.is_floating_point() and not target.isfinite().all():
                broken.append(in_file)
    if broken:
        raise InputError(
            f"{source}: {len(broken)} tensors hold NaN, infinity or nothing: {listed(condense(broken))}; take "
            "another one"
        )
    if untied:
        raise InputError(
            f"{source}: {untied[0]} differ but are one parameter of the model ({len(untied)} such pairs): is it "
            "of a model with another `share`?"
        )


def no_name(_):
    return False


@torch.no_grad()
def load_weights(
    model, weights, source, names=None, may_be_new=no_name, must_fit=no_name, allow_missing=None
):
    """Copy weights of a file into the model and return a LoadReport on each tensor.

    weights: tensors by name in the file; source: the file, for messages; names: name in the model
    -> name in the file, for each tensor of the model to load (default: all, with equal names);
    may_be_new(name in the model): whether a tensor may be missing from the file; must_fit(name in
    the file): whether the model must have the tensor; allow_missing: accept missing and unused
    tensors, None if the user has no such flag. Momentum modules and queues: see _match. Raises
    InputError for a tensor of another shape or kind, for NaN or infinity, for different tensors
    that are tied in the model, and for unexpectedly missing or unused tensors.
    """
    state = model.state_dict(keep_vars=True)
    names = names or {name: name for name in state}
    targets = {name: state[name] for name in names}
    records = _match(targets, weights, names, may_be_new, allow_missing)
    _check(records, targets, weights, source, must_fit, allow_missing)
    _copy(records, targets, weights, source)
    return LoadReport(
        str(source), [r._replace(outcome="new") if r.outcome == "missing" else r for r in records]
    )


def load_checkpoint(model, path, allow_missing=False, complete=False):
    """Load the weights of a checkpoint file of any task into a model of any task, converting what
    needs it (task_names).

    Position embeddings are interpolated to the model's image_res and momentum weights that the file
    lacks are copied from the base. The head of a task (HEADS) may be new if the file is of another
    task, and VQA's decoder may come from the multimodal encoder; not if the file has to be
    complete, for evaluation. Returns a LoadReport; raises InputError as read_weights and
    load_weights do, also for weights of the model's encoders that it has no place for.
    """
    path = find_checkpoint(path)
    content = read_checkpoint(path)
    check_vocabulary(model, content, path)
    weights = named_tensors(content, path)
    modules, in_file = (
        {name.split(".")[0] for name in names} for names in (model.state_dict(), weights)
    )
    new_heads = modules & set(HEADS) - in_file
    lacking = new_heads | (modules & {"text_decoder"} - in_file)
    if complete and lacking:
        raise InputError(
            f"{path} has no {lacking.pop()}, which this task evaluates with: name a checkpoint fine-tuned for it"
        )
    if complete and (unprojected := modules & set(PROJECTIONS) - in_file):
        raise InputError(
            f"{path} has no {unprojected.pop()}, the contrastive projection that this task evaluates with: name a "
            "checkpoint of pre-training, retrieval or grounding"
        )
    names = task_names(model, weights)
    matched = {name.split(".")[0] for name, old in names.items() if old in weights}

    def may_be_new(name):
        return _module(name) in new_heads

    def must_fit(name):
        module, _, rest = name.partition(".")
        return module in matched and not rest.startswith("cls.")  # the MLM head may find no use

    return load_weights(model, weights, path, names, may_be_new, must_fit, allow_missing)


def check_vocabulary(model, content, path):
    """Raise InputError if a checkpoint and the model have different vocabularies; either may lack
    one.
    """
    saved = content.get("tokenizer_json")
    if model.vocabulary and saved and (where := difference(saved, model.vocabulary)):
        raise InputError(
            f"{path} was trained with another vocabulary than {vocabulary_of(model.config)}: {where}; take the "
            f"checkpoint's own: --set tokenizer={find_checkpoint(path)}"
        )


# --------------------------------------------------------------------------------------------------
# initialization of pre-training


def load_text_encoder(model, source):
    """Initialize a pre-training model's text and multimodal encoders with BERT (Section 3.1).

    source: a folder, a .bin or .safetensors file, or a hub name. Layers below fusion_layer become
    the text encoder, the rest the multimodal encoder; cross-attention is new, and so is the MLM
    head where the file has none.
    """
    path = find_file(source, WEIGHT_FILES, "text_encoder")
    weights = read_weights(path)
    has_head = any(name.startswith("cls.predictions.transform.") for name in weights)

    def may_be_new(name):
        return ".crossattention." in name or (".cls.predictions." in name and not has_head)

    report = load_weights(model, weights, path, bert_names(model, weights), may_be_new)
    copy_to_momentum_(model)
    return report


def load_vision_encoder(model, source):
    """Initialize a model's image encoder with a DeiT or timm ViT (Section 3.1), position embeddings
    resized.

    source: a local file, a folder, or a name of timm (or any timm hub repository).
    """
    if not Path(source).exists() and timm.is_model(source):
        pretrained = timm.get_pretrained_cfg(source)
        if pretrained is None or not pretrained.hf_hub_id:
            raise InputError(f"vision_encoder: timm has no pre-trained weights named {source}")
        source = pretrained.hf_hub_id
    path = find_file(source, WEIGHT_FILES, "vision_encoder")
    weights = read_weights(path)
    if "dist_token" in weights:
        raise InputError(
            f"vision_encoder: {path} is a distilled DeiT with a second class token; use the plain DeiT"
        )
    names = {
        name: name.removeprefix("visual_encoder.")
        for name in model.state_dict()
        if name.startswith("visual_encoder.")
    }

    # other kinds of ViT have more than the classifier at the end: norm_pre, register tokens, layer
    # scale
    def must_fit(name):
        return not name.startswith(("head", "fc_norm.", "pre_logits."))

    report = load_weights(model, weights, path, names, must_fit=must_fit)
    copy_to_momentum_(model)
    return report


def load_encoders(model, config):
    """Load BERT and DeiT weights (Section 3.1) unless the key is `random`; return the reports."""
    sources = (("text_encoder", load_text_encoder), ("vision_encoder", load_vision_encoder))
    return [load(model, config[key]) for key, load in sources if config[key] != "random"]


# --------------------------------------------------------------------------------------------------
# report


class Record(NamedTuple):
    """What became of a tensor of the model, or of one of the file that the model has no place for."""

    name: str  # in the model, "" for one that is ignored
    in_file: str  # name of the tensor in the file that it is, "" for one that is new
    # loaded; copied: a momentum weight, from the base; new: left at its initialization; ignored
    outcome: str
    resized: bool = False  # a position embedding, interpolated to another image_res
    cast: str = ""  # the precision in the file, if it is another


class LoadReport(NamedTuple):
    """What became of every tensor; printed, it is a line for each kind."""

    source: str
    records: list

    loaded = property(lambda self: self._names("loaded"))
    copied = property(lambda self: self._names("copied"))
    new = property(lambda self: self._names("new"))
    ignored = property(lambda self: [r.in_file for r in self.records if r.outcome == "ignored"])
    resized = property(lambda self: [r.name for r in self.records if r.resized])
    cast = property(lambda self: [f"{r.name} ({r.cast})" for r in self.records if r.cast])

    @property
    def converted(self):
        """The tensors that are loaded under another name than in the file, as "name in file -> name
        in model".
        """
        return [
            f"{r.in_file} -> {r.name}"
            for r in self.records
            if r.outcome == "loaded" and r.in_file != r.name
        ]

    def _names(self, outcome):
        return [r.name for r in self.records if r.outcome == outcome]

    def __str__(self):
        of_model, of_file = (
            [r.name for r in self.records if r.name],
            [r.in_file for r in self.records if r.in_file],
        )
        lines = [f"{self.source}: {len(self.loaded)} of {len(of_model)} tensors loaded"]
        for kind, names, short in (
            ("converted", self.converted, condense(map(common_rename, self.converted))),
            ("resized", self.resized, shorten(self.resized, of_model)),
            ("cast", self.cast, sorted({f"from {r.cast}" for r in self.records if r.cast})),
            ("copied from the base", self.copied, shorten(self.copied, of_model)),
            ("new", self.new, shorten(self.new, of_model)),
            ("ignored", self.ignored, shorten(self.ignored, of_file)),
        ):
            if names:
                lines.append(f"  {kind}: {listed(short)} ({len(names)})")
        return "\n".join(lines)


def shorten(names, among):
    """Return names in fewer words:

    "a.*" if all among the others that begin with "a." are names; the rest as condense does.
    """

    def beginnings(name):
        return [name[: dot.start()] for dot in re.finditer(r"\.", name)]

    mixed = {beginning for name in set(among) - set(names) for beginning in beginnings(name)}
    groups = {}
    for name in names:
        groups.setdefault(
            next((beginning for beginning in beginnings(name) if beginning not in mixed), name), []
        ).append(name)
    return condense(
        group[0] if len(group) == 1 else f"{beginning}.*" for beginning, group in groups.items()
    )


def common_rename(rename):
    """Return "old -> new" with the part that both end with as a star: text_encoder.bert.* ->
    text_encoder.*.
    """
    old, new = (name.split(".")[::-1] for name in rename.split(" -> "))
    same = len(commonprefix([old, new]))
    return " -> ".join(".".join((["*"] * (same > 0) + name[same:])[::-1]) for name in (old, new))


def condense(names):
    """Merge names that differ only in numbers into a.{0-11}.b, and names of base and momentum into
    a[_m].b.
    """
    alike, pairs = {}, {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "#", name), []).append(map(int, re.findall(r"\d+", name)))
    for pattern, numbers in alike.items():
        for column in map(sorted, map(set, zip(*numbers))):
            first, last = column[0], column[-1]
            span = (
                f"{first}-{last}" if last - first + 1 == len(column) else ",".join(map(str, column))
            )
            pattern = pattern.replace("#", f"{{{span}}}" if len(column) > 1 else str(first), 1)
        pairs.setdefault(re.sub(r"_m\b", "", pattern), []).append(pattern)
    return [
        name[0] if len(name) == 1 else re.sub(r"_m\b", "[_m]", max(name, key=len))
        for name in pairs.values()
    ]


def listed(names, most=10):
    """Return the first of a list of names for a message."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
