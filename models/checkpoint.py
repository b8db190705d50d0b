"""Every conversion of foreign or older weights: released checkpoints, Hugging Face BERT, timm and DeiT ViT.

Most failed reproductions come from weights that silently did not load. So whatever is loaded is reported by name, and what
is missing unexpectedly is an error.
"""

import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.hub import hub_file
from models.momentum import copy_to_momentum_
from utils import InputError

# what a released or older file may lack: buffers that the model itself makes, and what no file knows
ALWAYS_NEW = r"position_ids$|^image_queue$|^text_queue$|^idx_queue$|^queue_ptr$"
HEADS = ("cls_head", "ta_head")  # that pre-training does not have
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]


class LoadReport(NamedTuple):
    """What became of every tensor, by name in the model (ignored: by name in the file)."""

    source: str
    loaded: list
    converted: list  # loaded under another name than in the file, as "name in file -> name in model"
    resized: list  # position embeddings interpolated to another image_res
    copied: list  # momentum weights that the file lacks, copied from the base weights
    new: list  # left at their initialization
    ignored: list  # in the file, not in the model

    def __str__(self):
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for name in ("converted", "resized", "copied", "new", "ignored"):
            names = getattr(self, name)
            if names:
                short = condense_renames(names) if name == "converted" else condense(names)
                lines.append(f"  {len(names)} {name}: {', '.join(short)}")
        return "\n".join(lines)


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


def read_checkpoint(path):
    """What a .pth, .bin or .safetensors file holds, on the CPU. Raises InputError for what cannot be read.

    Reads with weights_only: code in a pickle is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist: check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # as torch writes since 1.6: its tensors are read only when they are used
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, SafetensorError, EOFError, OSError, ValueError) as error:
        raise InputError(f"checkpoint {path} cannot be read, it may be cut off: {_first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise besides
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f": it wants {wanted[1]}" if wanted else ", or is no checkpoint"
        raise InputError(f"checkpoint {path} holds more than tensors, numbers and text{what}; it was not run") from None


def checkpoint_epoch(path):
    """The epoch that the weights of a checkpoint file are of, 0 if it does not say."""
    epoch = read_checkpoint(path).get("epoch")
    return epoch if isinstance(epoch, int) else 0


def named_tensors(state, path):
    """The tensors of a checkpoint by name; unwraps {"model": ...} and the like. path: for the message of InputError."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"checkpoint {path} holds no named tensors")
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def read_weights(path):
    """The tensors of a checkpoint file by name, as read_checkpoint and named_tensors give them."""
    return named_tensors(read_checkpoint(path), path)


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


def _resize(name, value, target):
    """value, fitted to target's shape if it is a position embedding of a square grid; else value itself."""
    if name.endswith("pos_embed") and value.ndim == 3 and value.shape[2] == target.shape[2]:
        if round((value.shape[1] - 1) ** 0.5) ** 2 == value.shape[1] - 1:
            return interpolate_pos_embed(value, target.shape[1])
    return value


@torch.no_grad()
def load_weights(model, state, source, new="$^", original=None, allow_missing=False):
    """Copies the tensors of state into the model and says what became of each.

    state: by name in the model; source: the file, for messages; new: regular expression of the names that may be missing;
    original: name in the model -> name in the file, where they differ. Raises InputError for a tensor of another shape and,
    unless allow_missing, for one that is missing unexpectedly.
    """
    targets, original = model.state_dict(keep_vars=True), original or {}
    loaded, resized, copied, left_new, missing = [], [], [], [], []
    for name, target in targets.items():
        base = re.sub(r"_m(?=\.)", "", name, count=1)
        if name in state:
            value = _resize(name, state[name], target)
            if value.shape != target.shape and not re.search(ALWAYS_NEW, name):
                raise InputError(
                    f"{source}: {original.get(name, name)} has shape {list(value.shape)} and the model's {name} "
                    f"{list(target.shape)}: the file belongs to another configuration (image_res, vision_width, "
                    "embed_dim, bert_config)"
                )
            if value.shape != target.shape:
                left_new.append(name)
                continue
            if value is not state[name]:
                resized.append(name)
            target.copy_(value)
            loaded.append(name)
        elif base != name and base in state:
            target.copy_(_resize(base, state[base], target))
            copied.append(name)
        elif re.search(new, name) or re.search(ALWAYS_NEW, name):
            left_new.append(name)
        else:
            missing.append(name)
    if missing and not allow_missing:
        raise InputError(
            f"{source} lacks {len(missing)} tensors of the model: {', '.join(condense(missing))}; "
            "is it the right file? --allow_missing leaves them at their initialization"
        )
    converted = [f"{original[name]} -> {name}" for name in loaded if original.get(name, name) != name]
    ignored = [original.get(name, name) for name in state if name not in targets]
    return LoadReport(str(source), loaded, converted, resized, copied, left_new + missing, ignored)


def load_checkpoint(model, path, allow_missing=False, complete=False):
    """Loads the weights of a checkpoint file of any task into a model of any task, converting what needs it (task_names).

    Position embeddings are interpolated to the model's image_res and momentum weights that the file lacks are copied from
    the base. The head of a task (HEADS) may be new if the file is of another task; not if it has to be complete, for
    evaluation. Returns a LoadReport; raises InputError as read_weights and load_weights do.
    """
    state, original, replaced = task_names(read_weights(path), model)
    new_heads = {name.split(".")[0] for name in model.state_dict()} & set(HEADS) - {name.split(".")[0] for name in state}
    if complete and new_heads:
        raise InputError(f"{path} has no {new_heads.pop()}, which this task evaluates with: name a checkpoint fine-tuned for "
                         "it")
    new = "|".join([rf"^{head}(_m)?\." for head in new_heads] or ["$^"])
    report = load_weights(model, state, path, new=new, original=original, allow_missing=allow_missing)
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
    state, original = bert_names(read_weights(path))
    return _load_part(model, state, path, "text_encoder", r"crossattention|\.cls\.predictions\.", original)


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
    state = read_weights(path)
    if "dist_token" in state:
        raise InputError(f"vision_encoder: {path} is a distilled DeiT with a second class token; use the plain DeiT")
    renamed = {f"visual_encoder.{name}": value for name, value in state.items()}
    original = {f"visual_encoder.{name}": name for name in state}
    return _load_part(model, renamed, path, "visual_encoder", "$^", original)


def _load_part(model, state, path, part, new, original):
    """load_weights for one part of the model; the rest of the model is not expected in the file."""
    rest = rf"^(?!{part}\.)"
    report = load_weights(model, state, path, new=f"{new}|{rest}", original=original)
    copy_to_momentum_(model)
    inside = [name for name in report.new if name.startswith(f"{part}.")]
    return report._replace(new=inside, copied=[])
