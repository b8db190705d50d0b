"""Every conversion of foreign or older weights: released checkpoints, Hugging Face BERT, timm and DeiT ViT.

Most failed reproductions come from weights that silently did not load. So whatever is loaded is reported by name, and what
is missing unexpectedly, has no place, or could not have come out of training is an error. A refused file leaves the model
as it was, unless it is its values that are wrong.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from models.hub import hub_file
from models.momentum import copy_to_momentum_
from utils import InputError, verify_hash

# what a released or older file may lack: buffers that the model itself makes
ALWAYS_NEW = r"position_ids$|^image_queue$|^text_queue$|^idx_queue$|^queue_ptr$"
QUEUES = ("image_queue", "text_queue", "queue_ptr")  # of use together only; idx_queue is of fine-tuning alone
HEADS = ("cls_head", "ta_head")  # that pre-training does not have
SUFFIXES = (".pth", ".bin", ".safetensors")
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]
METADATA = ("config", "epoch")  # of a .safetensors file, in JSON
PARTS = 12  # in which a file is copied: the pages of a mapped file count as memory until it is unmapped
NAMES_SHOWN = 5  # in an error


class LoadReport(NamedTuple):
    """What became of every tensor, by name in the model (ignored: by name in the file)."""

    source: str
    loaded: list
    converted: list  # loaded under another name than in the file, as "name in file -> name in model"
    resized: list  # position embeddings interpolated to another image_res
    cast: list  # stored in another precision, as "name (precision in the file)"
    copied: list  # momentum weights that the file lacks, copied from the base weights
    new: list  # left at their initialization
    ignored: list  # in the file, not in the model

    def __str__(self):
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for name in ("converted", "resized", "cast", "copied", "new", "ignored"):
            names = getattr(self, name)
            if names:
                short = condense_renames(names) if name == "converted" else condense(names)
                short = self._condense_ignored() if name == "ignored" else short
                lines.append(f"  {len(names)} {name}: {', '.join(short)}")
        return "\n".join(lines)

    def _condense_ignored(self):
        """The ignored names; those of a module of which the file gave nothing become one: vision_proj_m.*."""
        used = {name.split(".")[0] for name in self.loaded + self.converted}
        modules = (re.sub(r"\..*", ".*", name) if name.split(".")[0] not in used else name for name in self.ignored)
        return condense(list(dict.fromkeys(modules)))


def condense(names):
    """Names that differ only in their numbers become one: layer.0.x, layer.1.x -> layer.{0-1}.x, in order."""
    groups = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    condensed = []
    for pattern, members in groups.items():
        for column in zip(*(map(int, re.findall(r"\d+", member)) for member in members)):
            low, high = min(column), max(column)
            pattern = pattern.replace("#", str(low) if low == high else f"{{{low}-{high}}}", 1)
        condensed.append(pattern)
    return condensed


def condense_renames(renames):
    """Renames "old -> new" that change the same part become one: text_encoder.bert.* -> text_encoder.*, in order."""
    condensed = []
    for rename in renames:
        old, new = (name.split(".") for name in rename.split(" -> "))
        same = 0
        while same < min(len(old), len(new)) and old[-1 - same] == new[-1 - same]:
            same += 1
        star = ["*"] * bool(same)
        condensed.append(" -> ".join(".".join(name[: len(name) - same] + star) for name in (old, new)))
    return condense(list(dict.fromkeys(condensed)))


def few(names):
    """The first of a list of names for a message, condensed."""
    condensed = condense(names)
    more = len(condensed) - NAMES_SHOWN
    return ", ".join(condensed[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_checkpoint(path, device="cpu", names=None):
    """What a .pth, .bin or .safetensors file holds, as a dict. Raises InputError for what cannot be read.

    A SHA-256 that Download.py recorded beside the file is verified. device: cpu, or meta for the shapes and types of the
    tensors alone; names: the tensors of a .safetensors file to read.

    A .safetensors file gives {"model": tensors by name} and, as far as its metadata has them, config and epoch, as a .pth
    file of a run does; see write_checkpoint. Pickles are read with weights_only: code in them is never run. Tensors lie in
    a mapping of the file, and are read when they are used.
    """
    path = existing_file(path)
    verify_hash(path)
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, device, names)
        else:
            content = torch.load(path, map_location=device, weights_only=True, mmap=_is_mapped(path))
    except (RuntimeError, SafetensorError, EOFError, OSError, ValueError) as error:
        raise InputError(f"checkpoint {path} cannot be read, it may be cut off: {_first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise besides
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f": it wants {wanted[1]}" if wanted else ", or is no checkpoint"
        raise InputError(f"checkpoint {path} holds more than tensors, numbers and text{what}; it was not run") from None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds no named tensors")
    return content


def existing_file(path):
    """Return the path of a checkpoint file. Raises InputError with the remedy where it is a folder, an address or nothing."""
    if urlsplit(str(path)).scheme in ("http", "https"):
        raise InputError(f"checkpoint {path} is an address: download it first (Download.py --url) and name the file")
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES]
        best = max(files, default=None, key=lambda file: (file.stem == "checkpoint_best", file.stem == "checkpoint_last", file))
        raise InputError(f"checkpoint {path} is a folder: name {f'the file, perhaps {best}' if best else 'a file'}")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: check the path")
    return path


def _is_mapped(path):
    """Whether a file's tensors are mapped; not those of a .pth file from before torch 1.6, which is no zip file."""
    return Path(path).is_file() and (Path(path).suffix == ".safetensors" or zipfile.is_zipfile(path))


def _read_safetensors(path, device, names):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        read = _without_values if device == "meta" else type(file).get_tensor
        wanted = [name for name in file.keys() if names is None or _bare(name) in names]
        content = {"model": {name: read(file, name) for name in wanted}}
    for key in METADATA:
        if key in metadata:
            try:
                content[key] = json.loads(metadata[key])
            except ValueError:
                raise ValueError(f"its metadata {key} is no JSON") from None
    return content


def _without_values(file, name):
    """A tensor of an open .safetensors file on the meta device: get_tensor would touch a page of each tensor or more."""
    part = file.get_slice(name)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[:0] if shape else file.get_tensor(name)).dtype, device="meta")


def write_checkpoint(file, suffix, tensors, more):
    """Writes tensors by name to an open file: as a .safetensors file, or else as a .pth file.

    more: config and epoch, any of them; in a .safetensors file they are metadata in JSON. Tensors that are tied, i.e. share
    memory, are in a .safetensors file under each of their names. Raises TypeError for a config that JSON cannot hold.
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


def checkpoint_epoch(path):
    """The epoch that the weights of a checkpoint file are of, 0 if it does not say."""
    epoch = read_checkpoint(path, "meta").get("epoch")
    return epoch if isinstance(epoch, int) else 0


def named_tensors(state, path):
    """The tensors of a checkpoint by name; unwraps {"model": ...} and the like. path: for the message of InputError."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"checkpoint {path} holds no named tensors")
    return {_bare(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _bare(name):
    """A tensor's name without the prefixes of DistributedDataParallel and torch.compile."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def read_weights(path, device="cpu", names=None):
    """The tensors of a checkpoint file by name, as read_checkpoint and named_tensors give them."""
    return named_tensors(read_checkpoint(path, device, names), path)


def weights_to_load(path):
    """The tensors of a file by name, and the `again` of load_weights: mapped ones come without values, which again reads."""
    if not _is_mapped(path):
        return read_weights(path), None
    before = _identity(path)

    def again(names):
        weights = read_weights(path, names=names)
        if _identity(path) != before:
            raise InputError(f"checkpoint {path} was replaced while it was read: load it once it is left alone")
        return weights

    return read_weights(path, device="meta"), again


def _identity(path):
    status = Path(path).stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def interpolate_pos_embed(pos_embed, tokens):
    """Position embeddings [1, 1+N, C] -> [1, tokens, C]: the square grid bicubically, the [CLS] position unchanged."""
    old, new = round((pos_embed.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if old == new:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)


def _is_resizable(name, value, target):
    """Whether value is a position embedding of a square grid that can be interpolated to target's shape."""
    if not name.endswith("pos_embed") or value.ndim != 3 or value.shape[::2] != target.shape[::2]:
        return False
    return all(round((tensor.shape[1] - 1) ** 0.5) ** 2 == tensor.shape[1] - 1 for tensor in (value, target))


def _misfit(name, value, target):
    """Why a tensor of a file cannot become the model's tensor `name`, "" if it can."""
    if value.shape != target.shape and not _is_resizable(name, value, target):
        return f"has shape {list(value.shape)} and the model's {name} {list(target.shape)}"
    if value.is_floating_point() != target.is_floating_point() or value.layout != target.layout:
        return f"is {value.layout} {value.dtype} and the model's {name} {target.layout} {target.dtype}"
    return ""


def _check_misfits(source, misfits):
    """Raises InputError if there are misfits: name in the file -> as _misfit says."""
    if not misfits:
        return
    if all(name.split(".")[0].removesuffix("_m") in HEADS for name in misfits):
        hint = "it is the head of another task: start from pre-trained weights, or name a checkpoint of this task"
    else:
        hint = ("the file belongs to another configuration (image_res, patch_size, vision_width, embed_dim, bert_config) or "
                "task")  # fmt: skip
    shown = [f"{name} {why}" for name, why in misfits.items()][:3]
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    raise InputError(f"{source}: {', '.join(shown)}{more}: {hint}")


def _parts(takes, state, original, again):
    """Yields (name in the model, tensor) of takes: name in the model -> name in state; the rest as in load_weights."""
    if again is None:
        yield from ((name, state[taken]) for name, taken in takes.items())
        return
    part = sum(state[taken].nbytes for taken in takes.values()) / PARTS
    groups, size = [], part
    for name, taken in takes.items():
        if size >= part:
            groups.append({})
            size = 0
        groups[-1][name] = original.get(taken, taken)
        size += state[taken].nbytes
    for group in groups:
        weights = again(set(group.values()))
        yield from ((name, weights[in_file]) for name, in_file in group.items())


def _copy(targets, takes, state, source, original, again):
    """Copies tensors into the model. Raises InputError for values that no training gives, and where tied ones differ.

    targets: the model's tensors by name; takes and the rest as in _parts.
    """
    names, untied, broken = {}, [], []
    for name, value in _parts(takes, state, original, again):
        target = targets[name]
        if value.shape != target.shape:
            value = interpolate_pos_embed(value, target.shape[1])
        if target.is_meta:  # there is nothing to copy to
            continue
        twin = names.setdefault(id(target), name)
        if value.is_meta:
            broken.append(original.get(takes[name], takes[name]))
        elif twin != name:
            if not torch.equal(value.to(target), target):
                untied.append(f"{original.get(name, name)} and {original.get(twin, twin)}")
        else:
            target.copy_(value)
            if target.is_floating_point() and not target.isfinite().all():
                broken.append(original.get(takes[name], takes[name]))
    if broken:
        raise InputError(f"{source}: {len(broken)} tensors hold NaN, infinity or nothing: {few(broken)}; take another one")
    if untied:
        raise InputError(f"{source}: {untied[0]} differ but are one parameter of the model ({len(untied)} such pairs): is it "
                         "of a model with another `share`?")  # fmt: skip


@torch.no_grad()
def load_weights(model, state, source, new="$^", original=None, allow_missing=None, placed="$^", again=None):
    """Copies the tensors of state into the model and says what became of each.

    state: by name in the model; source: the file, for messages; new: regular expression of the names that may be missing;
    original: name in the model -> name in the file, where they differ; placed: regular expression of the names in state
    that the model must have; allow_missing: None where it is no choice of the user. again(names) reads tensors of the file,
    by their names there: state then needs no values, and no more than two of PARTS of a mapped file are in memory at once.

    A momentum module that state lacks is copied from the base; one that it has must be complete. Queues of another size,
    and all with them, stay as they are. Raises InputError for a tensor of another shape or kind, for NaN or infinity, for
    tensors that differ but are one in the model, and, unless allow_missing, for what is missing or has no place unexpectedly.
    """
    targets, original = model.state_dict(keep_vars=True), original or {}
    modules = {name.split(".")[0] for name in state if not re.search(ALWAYS_NEW, name)}
    requeue = any(name not in state or state[name].shape != targets[name].shape for name in QUEUES if name in targets)
    takes, resized, cast, copied, left_new, missing, misfits = {}, [], [], [], [], [], {}
    for name, target in targets.items():
        base = re.sub(r"_m(?=\.)", "", name, count=1)
        in_file = original.get(name, name)
        if name in state:
            misfit = _misfit(name, state[name], target)
            if re.search(ALWAYS_NEW, name) and (misfit or (requeue and "queue" in name)):
                left_new.append(name)
                continue
            if misfit:
                misfits[in_file] = misfit
            takes[name] = name
            if state[name].shape != target.shape:
                resized.append(name)
            if state[name].dtype != target.dtype:
                cast.append(f"{name} ({str(state[name].dtype).removeprefix('torch.')})")
        elif base in state and not _misfit(name, state[base], target) and (allow_missing or name.split(".")[0] not in modules):
            takes[name] = base
            copied.append(name)
        elif re.search(new, name) or re.search(ALWAYS_NEW, name):
            left_new.append(name)
        else:
            missing.append(name)
    ignored = [name for name in state if name not in targets]
    unplaced = [original.get(name, name) for name in ignored if re.search(placed, name)]
    _check_misfits(source, misfits)
    way_out = " --allow_missing {}" if allow_missing is not None else ""
    if missing and not allow_missing:
        has = f"; it has {few(unplaced)} instead" if unplaced else ""
        raise InputError(
            f"{source} lacks {len(missing)} tensors of the model: {few(missing)}{has}; is it the right file?"
            + way_out.format("leaves them at their initialization")
        )
    if unplaced and not allow_missing:
        raise InputError(
            f"{source} has {len(unplaced)} tensors that the model has no place for: {few(unplaced)}; is it of a deeper model, "
            "of another kind or fusion_layer, or of a task with two images?" + way_out.format("leaves them out")
        )
    _copy(targets, takes, state, source, original, again)
    converted = [f"{original[name]} -> {name}" for name in takes if name in state and original.get(name, name) != name]
    ignored = [original.get(name, name) for name in ignored]
    loaded = [name for name in takes if name in state]
    return LoadReport(str(source), loaded, converted, resized, cast, copied, left_new + missing, ignored)


def load_checkpoint(model, path, allow_missing=False, complete=False):
    """Loads the weights of a checkpoint file of any task into a model of any task, converting what needs it (task_names).

    Position embeddings are interpolated to the model's image_res and momentum weights that the file lacks are copied from
    the base. The head of a task (HEADS) may be new if the file is of another task, and VQA's decoder may come from the
    multimodal encoder; not if the file has to be complete, for evaluation. Returns a LoadReport; raises InputError as
    read_weights and load_weights do, also for weights of the model's encoders that it has no place for.
    """
    weights, again = weights_to_load(path)
    modules, in_file = ({name.split(".")[0] for name in names} for names in (model.state_dict(), weights))
    new_heads = modules & set(HEADS) - in_file
    lacking = new_heads | (modules & {"text_decoder"} - in_file)
    if complete and lacking:
        raise InputError(f"{path} has no {lacking.pop()}, which this task evaluates with: name a checkpoint fine-tuned for it")
    new = "|".join([rf"^{head}(_m)?\." for head in new_heads] or ["$^"])
    placed = rf"^({'|'.join(modules)})\.(?!cls\.|.*position_ids$)"  # the MLM head, text_encoder.cls, may find no use
    state, original, replaced = task_names(weights, model)
    report = load_weights(model, state, path, new, original, allow_missing, placed, again)
    return report._replace(ignored=report.ignored + replaced)


def task_names(state, model):
    """Renames the weights of a file for a model of another task.

    - from pre-training, where text_encoder holds the bare BERT as bert: the prefix bert. is dropped
    - to VQA: the answer decoder's layers are the multimodal encoder's, its embeddings the text encoder's, its head the MLM
      head, likewise for momentum
    - from one image to NLVR2: both blocks of a pair are the layer; the momentum model starts as a copy of the base

    Returns (state by name in the model, new name -> old name, names of weights that a copy of others replaces).
    """
    names, fusion = list(model.state_dict()), model.bert.fusion_layer
    to_decoder = not any(name.startswith("text_decoder.") for name in state)
    to_pairs = hasattr(model.bert, "pair_keys_values") and _layers(state) < _layers(names)
    replaced = [name for name in state if re.match(r"\w+_m\.", name)] if to_pairs else []
    state = {name: value for name, value in state.items() if name not in replaced}

    def source(name):
        if to_decoder and name.startswith("text_decoder"):
            name = re.sub(r"(?<=\.layer\.)\d+", lambda number: str(fusion + int(number[0])), name)
            name = name.replace("text_decoder", "text_encoder", 1)
        if to_pairs:
            name = re.sub(r"(?<=\.layer\.)\d+", lambda number: str(_layer_of_block(int(number[0]), fusion)), name)
        with_bert = re.sub(r"^(text_encoder(_m)?\.)(bert\.)?", r"\1bert.", name)
        without = re.sub(r"^(text_encoder(_m)?\.)bert\.", r"\1", name)
        return next((known for known in (name, with_bert, without) if known in state), name)

    original = {name: source(name) for name in names}
    renamed = {name: state[old] for name, old in original.items() if old in state}
    used = set(original.values())
    renamed.update({name: value for name, value in state.items() if name not in used and name not in renamed})
    return renamed, original, replaced


def _layers(names):
    """Number of BERT layers among the names of tensors."""
    found = (re.match(r"text_encoder\..*\.layer\.(\d+)\.", name) for name in names)
    return max((int(layer[1]) + 1 for layer in found if layer), default=0)


def _layer_of_block(block, fusion):
    """The layer of the single-image model that a block of the NLVR2 model stands for."""
    return block if block < fusion else fusion + (block - fusion) // 2


# ---------------------------------------------------------------------------------------------------------------------
# initialization of pre-training


def _local_or_hub(source, key):
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{key}: folder {source} has no {' or '.join(WEIGHT_FILES)}")
        return found[0]
    return path if path.is_file() else hub_file(source, WEIGHT_FILES, key)


def bert_names(state):
    """Renames the tensors of a Hugging Face BERT: with or without the prefix bert., LayerNorm gamma and beta.

    Returns (state by name in the pre-training model, new name -> old name).
    """
    renamed, original = {}, {}
    for old, value in state.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", old)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if re.match(r"(embeddings|encoder)\.", name):
            name = f"bert.{name}"
        name = f"text_encoder.{name}"
        renamed[name], original[name] = value, old
    prefix = "text_encoder.cls.predictions."
    tied = {"decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight", "decoder.bias": f"{prefix}bias"}
    for name, twin in tied.items():
        if twin in renamed:
            renamed[prefix + name], original[prefix + name] = renamed[twin], original[twin]
    return renamed, original


def load_text_encoder(model, source):
    """Initializes a pre-training model's text and multimodal encoders with BERT (Section 3.1).

    source: a folder, a .bin or .safetensors file, or a hub name. Layers below fusion_layer become the text encoder, the
    rest the multimodal encoder; cross-attention is new, and so is the MLM head where the file has none.
    """
    path = _local_or_hub(source, "text_encoder")
    weights, again = weights_to_load(path)
    state, original = bert_names(weights)
    has_head = any(".cls.predictions.transform." in name for name in state)
    new = "crossattention" if has_head else r"crossattention|\.cls\.predictions\."
    return _load_part(model, state, path, "text_encoder", new, original, "$^", again)


def load_vision_encoder(model, source):
    """Initializes a model's image encoder with a DeiT or timm ViT (Section 3.1), position embeddings resized.

    source: a local file, a folder, or a name of timm (or any timm hub repository).
    """
    if not Path(source).exists() and timm.is_model(source):
        pretrained = timm.get_pretrained_cfg(source)
        if pretrained is None or not pretrained.hf_hub_id:
            raise InputError(f"vision_encoder: timm has no pre-trained weights named {source}")
        source = pretrained.hf_hub_id
    path = _local_or_hub(source, "vision_encoder")
    state, again = weights_to_load(path)
    if "dist_token" in state:
        raise InputError(f"vision_encoder: {path} is a distilled DeiT with a second class token; use the plain DeiT")
    renamed = {f"visual_encoder.{name}": value for name, value in state.items()}
    original = {f"visual_encoder.{name}": name for name in state}
    # other kinds of ViT have more than the classifier at the end: norm_pre, register tokens, layer scale
    placed = r"^visual_encoder\.(?!head|fc_norm\.|pre_logits\.)"
    return _load_part(model, renamed, path, "visual_encoder", "$^", original, placed, again)


def _load_part(model, state, path, part, new, original, placed, again):
    """load_weights for one part of the model; the rest of the model is not expected in the file."""
    rest = rf"^(?!{part}\.)"
    report = load_weights(model, state, path, f"{new}|{rest}", original, None, placed, again)
    copy_to_momentum_(model)
    inside = [name for name in report.new if name.startswith(f"{part}.")]
    return report._replace(new=inside, copied=[])
