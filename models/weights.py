"""Load weights into models: read a file, match its names, check the plan, copy, and report.

A tensor that is unexpectedly missing, a tensor without a use, and NaN or infinity are errors. A
refused file leaves the model unchanged, unless its values are wrong.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from configs.config import FILE_KEYS, Config
from configs.tasks import TASKS
from models.albef import ALBEF, Ranking
from models.conversions import (
    bert_names,
    can_interpolate,
    interpolate_pos_embed,
    task_names,
    vit_names,
)
from models.hashes import verify_hash
from models.hub import fetch, find_file
from models.momentum import copy_to_momentum_
from models.tokenizer import VOCABULARY, difference, vocabulary_of
from utils import InputError, permitted

# loaded together or not at all; only fine-tuned files have the last one
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
NEEDED = {"text_decoder", "vision_proj", "text_proj"}  # by an evaluation, beside the head
SUFFIXES = (".pth", ".bin", ".safetensors")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # names in a folder or a hub repository
REPOSITORY = (("model.safetensors",), ("config.json",), (VOCABULARY,))  # files of an export
METADATA = ("config", "epoch", "tokenizer_json", "ranking")  # keys of a .safetensors file, in JSON


# --------------------------------------------------------------------------------------------------
# loading


def load_checkpoint(
    model: ALBEF, path: Path | str, allow_missing: bool = False, complete: bool = False
) -> "LoadReport":
    """Load a checkpoint of any task into a model of any task, converting it as needed.

    Position embeddings are interpolated to the model's image_res. Momentum weights that the file
    lacks are copied from the base.

    Args:
        model: The model to load into.
        path: A checkpoint, as `find_checkpoint` takes it.
        allow_missing: Whether to accept missing and unused tensors.
        complete: Whether the file must have the task's head and decoder, as an evaluation needs.
            Then the model takes the file's ranking.

    Returns:
        A report on each tensor.

    Raises:
        InputError: The file cannot be read or does not fit, see `load_weights`.
    """
    path = find_checkpoint(path)
    content = read_checkpoint(path)
    check_vocabulary(model, content, path)
    model.ranking = read_ranking(content, path) if complete else None
    weights, names = named_tensors(content, path), model.state_dict()
    modules, in_file = ({name.split(".")[0] for name in state} for state in (names, weights))
    heads = fine_tuned_heads()
    for module in modules & (heads | NEEDED) - in_file if complete else ():
        raise InputError(
            f"{path} has no {module}, which the evaluation of this task needs; name a checkpoint"
            " of a task that trains it"
        )
    names = task_names(model, weights)
    matched = {name.split(".")[0] for name, old in names.items() if old in weights}

    def must_fit(name: str) -> bool:
        module, _, rest = name.partition(".")
        return module in matched and not rest.startswith("cls.")  # the MLM head may have no use

    return load_weights(
        model,
        weights,
        path,
        names=names,
        may_be_new=lambda name: _module(name) in heads - in_file,
        must_fit=must_fit,
        allow_missing=allow_missing,
    )


def fine_tuned_heads() -> set[str]:
    """Return the heads of all tasks that pre-training lacks."""
    return {task.head for task in TASKS.values()} - {"", TASKS["pretrain"].head}


def check_vocabulary(model: ALBEF, content: Mapping[str, Any], path: Path | str) -> None:
    """Raise InputError if a checkpoint and the model have different vocabularies."""
    saved = content.get("tokenizer_json")
    if not (model.vocabulary and saved):
        return
    try:
        where = difference(saved, model.vocabulary)
    except Exception as error:  # tokenizers raises no other class
        raise InputError(
            f"checkpoint {path}: the entry 'tokenizer_json' is not a vocabulary ({error}); use"
            " another checkpoint"
        ) from None
    if where:
        raise InputError(
            f"{path} was trained with another vocabulary than {vocabulary_of(model.config)}"
            f" ({where}); add --set tokenizer={path} to use the vocabulary of the checkpoint"
        )


def read_ranking(content: Mapping[str, Any], path: Path | str) -> Ranking | None:
    """Return the ranking in a checkpoint, None if there is none. Raises InputError."""
    try:
        return msgspec.convert(content.get("ranking"), Ranking | None)
    except msgspec.ValidationError as error:
        raise InputError(
            f"{path}: the entry 'ranking' is malformed ({error}); use another checkpoint"
        ) from None


def load_encoders(model: ALBEF, config: Config) -> list["LoadReport"]:
    """Load BERT and DeiT weights (Section 3.1) unless the key is `random`.

    Args:
        model: A pre-training model.
        config: Its keys text_encoder and vision_encoder name the weights.

    Raises:
        InputError: Weights cannot be read or do not fit.
    """
    sources = (
        (config.text_encoder, load_text_encoder),
        (config.vision_encoder, load_vision_encoder),
    )
    return [load(model, source) for source, load in sources if source != "random"]


def load_text_encoder(model: ALBEF, source: Path | str) -> "LoadReport":
    """Load BERT into the text and multimodal encoders of a pre-training model.

    Layers below fusion_layer become the text encoder, the rest the multimodal encoder.
    Cross-attention stays new, and so does the MLM head if the file has none.

    Args:
        model: A pre-training model.
        source: A folder, a .bin or .safetensors file, or a hub name.

    Raises:
        InputError: The weights cannot be read or do not fit.
    """
    path = find_file(source, WEIGHT_FILES, "text_encoder")
    weights = read_weights(path)
    has_head = any(name.startswith("cls.predictions.transform.") for name in weights)

    def may_be_new(name: str) -> bool:
        return ".crossattention." in name or (".cls.predictions." in name and not has_head)

    names = bert_names(model, weights)
    report = load_weights(model, weights, path, names=names, may_be_new=may_be_new)
    copy_to_momentum_(model)
    return report


@permitted()
def load_vision_encoder(model: ALBEF, source: Path | str) -> "LoadReport":
    """Load a DeiT or timm ViT into a model's image encoder.

    Args:
        model: A pre-training model.
        source: A file, a folder, a name of timm, or a timm repository of the hub.

    Raises:
        InputError: The weights cannot be read or do not fit.
    """
    if not Path(source).exists() and timm.is_model(str(source)):
        pretrained = timm.get_pretrained_cfg(str(source))
        if pretrained is None or not pretrained.hf_hub_id:
            raise InputError(
                f"vision_encoder: timm has no pre-trained weights named {source}; check the name"
            )
        source = pretrained.hf_hub_id
    path = find_file(source, WEIGHT_FILES, "vision_encoder")
    weights = read_weights(path)
    if "dist_token" in weights:
        raise InputError(
            f"vision_encoder: {path} is a distilled DeiT with a second class token; use the plain"
            " DeiT"
        )

    # other kinds of ViT have more than a classifier: norm_pre, register tokens, layer scale
    def must_fit(name: str) -> bool:
        return not name.startswith(("head", "fc_norm.", "pre_logits."))

    report = load_weights(model, weights, path, names=vit_names(model), must_fit=must_fit)
    copy_to_momentum_(model)
    return report


def _never(_: str) -> bool:
    return False


@torch.no_grad()
def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: Path | str,
    *,
    names: Mapping[str, str] | None = None,
    may_be_new: Callable[[str], bool] = _never,
    must_fit: Callable[[str], bool] = _never,
    allow_missing: bool | None = None,
) -> "LoadReport":
    """Copy the weights of a file into a model.

    A momentum module that the file lacks is copied from the base. One that it has must be complete.
    If the queues have another size, all of them stay as they are.

    Args:
        model: The model to load into.
        weights: Tensors of the file by name.
        source: The file, for messages.
        names: Name in the file by name in the model, for the tensors to load. Default: all tensors,
            with equal names.
        may_be_new: Whether a tensor of the model may be missing from the file.
        must_fit: Whether the model must have a tensor of the file.
        allow_missing: Whether to accept missing and unused tensors. None if the user has no such
            flag.

    Returns:
        A report on each tensor.

    Raises:
        InputError: A tensor is missing or unused, has another shape or dtype, holds NaN or
            infinity, or differs from one that is tied to it in the model.
    """
    state = model.state_dict(keep_vars=True)
    names = names or {name: name for name in state}
    targets = {name: state[name] for name in names}
    plan, report = _match(targets, weights, names, source, bool(allow_missing))
    _check_shapes(report, plan, targets, weights)
    if not allow_missing:
        missing = [name for name in report.new if not (_is_optional(name) or may_be_new(name))]
        unused = [name for name in report.ignored if must_fit(name)]
        _check_complete(source, missing, unused, has_flag=allow_missing is not None)
    _copy(plan, targets, weights, source)
    return report


def _module(name: str) -> str:
    """Return the module of a model that a tensor belongs to, the same for base and momentum."""
    return name.split(".")[0].removesuffix("_m")


def is_momentum(name: str) -> bool:
    """Return whether a tensor belongs to the momentum model or its queues."""
    return name.split(".")[0].endswith("_m") or name in QUEUES


def _is_optional(name: str) -> bool:
    """Return whether every file may lack a tensor."""
    return name.endswith("position_ids") or name in QUEUES


def _match(
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    names: Mapping[str, str],
    source: Path | str,
    allow_missing: bool,
) -> tuple[dict[str, str], "LoadReport"]:
    """Return the name in the file of each tensor to copy, by name in the model, and a report."""
    plan, report = {}, LoadReport(str(source))
    in_file = {
        name.split(".")[0] for name in targets if names[name] in weights and not _is_optional(name)
    }
    keep_queues = all(
        names[queue] in weights and weights[names[queue]].shape == targets[queue].shape
        for queue in QUEUES[:3]
        if queue in targets
    )
    for name, target in targets.items():
        old, value = names[name], weights.get(names[name])
        module, _, rest = name.partition(".")
        base = names.get(f"{module.removesuffix('_m')}.{rest}")
        if value is not None and (keep_queues or name not in QUEUES):
            plan[name] = old
            report.loaded.append(name)
            if old != name:
                report.converted.append(f"{old} -> {name}")
            if value.shape != target.shape:
                report.resized.append(name)
        elif value is None and base in weights and (allow_missing or module not in in_file):
            plan[name] = base
            report.copied.append(name)
        else:
            report.new.append(name)
    used = {*plan.values(), *(names.get(queue) for queue in QUEUES)}
    report.ignored.extend(name for name in weights if name not in used)
    return plan, report


def _check_shapes(
    report: "LoadReport",
    plan: Mapping[str, str],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Raise InputError for sparse tensors, or another shape or kind of numbers than the model's."""
    misfits = []
    for name in report.loaded:
        value, target = weights[plan[name]], targets[name]
        if value.layout != torch.strided:
            raise InputError(f"{report.source}: {plan[name]} is sparse; save it as a dense tensor")
        fits = value.shape == target.shape or can_interpolate(name, value, target)
        if not fits or value.is_floating_point() != target.is_floating_point():
            misfits.append(
                f"{plan[name]} has shape {list(value.shape)} ({value.dtype}) instead of"
                f" {list(target.shape)} ({target.dtype})"
            )
    if misfits:
        raise InputError(
            f"{report.source}: {summarize_names(misfits, 3)}; name a file of this task, or set"
            " image_res, patch_size, vision_width, embed_dim and bert_config as in its training"
        )


def _check_complete(
    source: Path | str, missing: list[str], unused: list[str], *, has_flag: bool
) -> None:
    """Raise InputError for missing and unused tensors. has_flag: the user has --allow_missing."""
    hint = ", or add --allow_missing to load it nevertheless" if has_flag else ""
    if missing:
        instead = f" (it has {summarize_names(unused, 2)} instead)" if unused else ""
        raise InputError(
            f"{source} lacks {len(missing)} tensors of the model: {summarize_names(missing)}"
            f"{instead}; check that this is the right file{hint}"
        )
    if unused:
        raise InputError(
            f"{source} has {len(unused)} tensors that the model has no place for:"
            f" {summarize_names(unused)}; check whether it is of a deeper model, of another kind of"
            f" model, of another fusion_layer, or of a task with two images{hint}"
        )


def _copy(
    plan: Mapping[str, str],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: Path | str,
) -> None:
    """Copy tensors into the model.

    Raises:
        InputError: Values are not finite, or tied tensors differ.
    """
    filled, untied, broken = {}, [], []
    for name, in_file in plan.items():
        target, value = targets[name], weights[in_file]
        if target.is_meta:  # it has no values
            continue
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
            f"{source}: {len(broken)} tensors ({summarize_names(broken)}) hold NaN or infinity, or"
            " have no values; use another checkpoint"
        )
    if untied:
        raise InputError(
            f"{source}: the tensors {untied[0]} differ, but the model shares them as one parameter"
            f" ({len(untied)} such pairs); check whether the file is from a model with another"
            " value of the key share"
        )


# --------------------------------------------------------------------------------------------------
# report


@dataclass
class LoadReport:
    """Names of tensors by outcome of loading. As text it has a line for each outcome.

    Attributes:
        source: The file.
        loaded: Tensors of the model that come from the file under any name.
        converted: Loaded tensors with another name in the file, "name in file -> name in model".
        resized: Position embeddings that are interpolated to another image_res.
        copied: Momentum weights that are copied from the base.
        new: Tensors of the model that are left at their initialization.
        ignored: Tensors of the file that the model has no place for.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        tensors = len(self.loaded) + len(self.copied) + len(self.new)
        lines = [f"{self.source}: {len(self.loaded)} of {tensors} tensors loaded"]
        for kind in ("converted", "resized", "copied", "new", "ignored"):
            if names := getattr(self, kind):
                most = 2 if kind == "converted" else 5  # each has two names
                lines.append(f"  {kind}: {len(names)} ({summarize_names(names, most)})")
        return "\n".join(lines)


def summarize_names(names: list[str], most: int = 5) -> str:
    """Return the first names of a list and the number of the other ones, for a message."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


# --------------------------------------------------------------------------------------------------
# files


def is_repository(source: Path | str) -> bool:
    """Return whether a checkpoint is named like a hub repository, USER/NAME[@REVISION].

    The name of an existing path is no repository.
    """
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source))
    return bool(named) and Path(source).suffix not in SUFFIXES and not Path(source).exists()


@permitted()
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
        raise InputError(f"checkpoint {source} is a URL; download it first and name the file")
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise InputError(
                f"checkpoint {path}: the folder has no weight file ({', '.join(SUFFIXES)}); check"
                " the path"
            )
        by_name = {file.stem: file for file in files}
        return by_name.get("checkpoint_best") or by_name.get("checkpoint_last") or files[-1]
    if is_repository(source):
        return fetch(str(source), REPOSITORY, "checkpoint")[0]
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; check the path")
    return path


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a .pth, .bin or .safetensors file.

    If a SHA-256 is recorded beside the file, it is verified. Code in pickles is never run
    (weights_only). Tensors are in a memory mapping of the file unless torch before 1.6 wrote it.

    Args:
        path: A checkpoint, as `find_checkpoint` takes it.

    Returns:
        The content of a .pth file. A .safetensors file gives {"model": tensors by name} and the
        keys of METADATA that it or an export's config.json has.

    Raises:
        InputError: The file cannot be read.
    """
    path = find_checkpoint(path)
    try:
        verify_hash(path)
        if path.suffix == ".safetensors":
            beside = config_beside(path) if path.name == WEIGHT_FILES[0] else {}
            content = {**_read_safetensors(path), **beside}
        else:
            is_zip = zipfile.is_zipfile(path)
            if is_zip:
                _refuse_compressed(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"checkpoint {path} is not a checkpoint, or holds objects other than tensors, numbers"
            " and text (no code from the file was run); save its tensors alone"
        ) from None
    except Exception as error:  # a damaged file may raise any class
        reason = " ".join((str(error) or repr(error)).split())[:200]
        raise InputError(
            f"checkpoint {path} cannot be read and may be cut off ({reason}); copy it again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds no named tensors; name another file")
    if not isinstance(content.get("tokenizer_json"), str | None):
        raise InputError(
            f"checkpoint {path}: the entry 'tokenizer_json' is not text; use another checkpoint"
        )
    return content


def _refuse_compressed(path: Path) -> None:
    """Raise InputError for compressed records, because a small file could fill the memory."""
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"checkpoint {path} has compressed records ({record.filename}), which"
                    " torch.save does not write; save it again with torch.save"
                )


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        more = {key: json.loads(metadata[key]) for key in METADATA if key in metadata}
        return {"model": {name: file.get_tensor(name) for name in file.keys()}, **more}


def config_beside(path: Path | str) -> dict[str, Any]:
    """Return config and tokenizer_json from the files beside an export's weights.

    Such a folder may come from anybody, so a file that its configuration names is not used.

    Args:
        path: The weights.

    Returns:
        {} if config.json is missing or is not one of an export.

    Raises:
        InputError: config.json is not a JSON object.
        OSError: There is no vocabulary.
    """
    file, vocabulary = Path(path).with_name("config.json"), Path(path).with_name(VOCABULARY)
    try:
        config = msgspec.json.decode(file.read_bytes() if file.is_file() else b"{}", type=dict)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{file}: not a JSON object ({error}); copy the file again") from None
    if "image_res" not in config:  # such as BERT's config.json
        return {}
    kept = {
        key: value
        for key, value in config.items()
        if key not in FILE_KEYS or isinstance(value, dict)  # bert_config may be one
    }
    return {
        "config": {**kept, "tokenizer": str(vocabulary)},
        "tokenizer_json": vocabulary.read_text(encoding="utf-8"),
    }


def named_tensors(content: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    Args:
        content: The checkpoint, bare tensors by name or with them under "model" or "state_dict".
            Prefixes of DistributedDataParallel and torch.compile are removed.
        path: The file, for messages.

    Raises:
        InputError: There are no tensors.
    """
    for wrapper in ("model", "state_dict"):
        content = content[wrapper] if isinstance(content.get(wrapper), dict) else content
    tensors = {
        re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise InputError(f"checkpoint {path} holds no named tensors; name another file")
    return tensors


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name. Raises InputError."""
    return named_tensors(read_checkpoint(path), path)


def checkpoint_epoch(path: Path | str) -> int:
    """Return the epoch of a checkpoint file, 0 if the file has none."""
    epoch = read_checkpoint(path).get("epoch")
    return epoch if isinstance(epoch, int) else 0


def write_weights(
    file: IO[bytes], suffix: str, tensors: Mapping[str, Tensor], more: Mapping[str, Any]
) -> None:
    """Write tensors to an open file.

    Args:
        file: The file.
        suffix: ".safetensors", or any other for the format of torch.save. A .safetensors file has
            tied tensors under each of their names.
        tensors: Tensors by name.
        more: Any keys of METADATA, which are JSON in a .safetensors file.

    Raises:
        InputError: JSON cannot hold a value of `more`.
    """
    if suffix != ".safetensors":
        torch.save({"model": tensors, **more}, file)
        return
    metadata = {"format": "pt"}
    for key in (key for key in METADATA if key in more):
        try:
            metadata[key] = json.dumps(more[key])
        except TypeError as error:
            raise InputError(
                f"the checkpoint's entry {key!r} cannot be in a .safetensors file ({error}); write"
                " a .pth file"
            ) from None
    # a copy, because the format refuses tensors that share memory
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    file.write(save(copies, metadata))
