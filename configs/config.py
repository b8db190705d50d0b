"""Define every configuration key with its type, limits, default and meaning.

A new key is a new field of a class below. Its docstring becomes its line in docs/config.md.
"""

import difflib
import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, inspect

from configs.tasks import TASKS, Task
from utils import InputError, read_regular

ROOT = Path(__file__).resolve().parents[1]

Count = Annotated[int, Meta(ge=1, le=1000)]
Width = Annotated[int, Meta(ge=1, le=100_000)]
Pixels = Annotated[int, Meta(ge=1, le=10_000)]
Rows = Annotated[int, Meta(ge=1, le=100_000_000)]
AtLeast0 = Annotated[int, Meta(ge=0, le=sys.maxsize)]
AtLeast1 = Annotated[int, Meta(ge=1, le=sys.maxsize)]
Number = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Share = Annotated[float, Meta(ge=0, le=1)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
FilePath = Annotated[str, Meta(min_length=1)]
Paths = Annotated[tuple[FilePath, ...], Meta(min_length=1)]
Objectives = Annotated[tuple[Literal["itc", "mlm", "itm"], ...], Meta(min_length=1)]
Interval = (
    AtLeast0 | Annotated[str, Meta(pattern=r"^([0-9]+(\.[0-9]+)? minutes?|[0-9]+ iterations?)$")]
)

TEMP_RANGE = 0.001, 0.5  # limits of the learned temperature
# REFER's data sets and the files of their referring expressions
REFER = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p"}

PATHS_WANTED = "a path or a list of paths"
Reads = Callable[[Task], bool]


def read_if(reads: Reads, *, wanted: str = "", file: bool = False, training: bool = False) -> Meta:
    """Return the annotation of a key.

    Args:
        reads: Whether a task reads the key.
        wanted: Description of the accepted values, for messages. Derived from the type if empty.
        file: Whether the value names files, folders or hub repositories.
        training: Whether the key has no effect in an evaluation.
    """
    return Meta(extra={"reads": reads, "wanted": wanted, "file": file, "training": training})


def read_always(**options: Any) -> Meta:
    """Return the annotation of a key that every task reads, with the options of `read_if`."""
    return read_if(lambda task: True, **options)


def read_never(**options: Any) -> Meta:
    """Return the annotation of a key of released files that has no effect."""
    return read_if(lambda task: False, **options)


def in_training(reads: Reads = lambda task: True, **options: Any) -> Meta:
    """Return the annotation of a key that has an effect in training only."""
    return read_if(lambda task: task.trains and reads(task), training=True, **options)


def with_trait(trait: str) -> Reads:
    """Return a function that tests whether a task has a trait."""
    return lambda task: trait in task.traits


def is_task(name: str) -> Reads:
    """Return a function that tests the name of a task."""
    return lambda task: task.name == name


def evaluates_file(key: str) -> Reads:
    """Return a function that tests whether a task evaluates the files of a key."""
    return lambda task: key in task.files.values()


def _searches(task: Task) -> bool:
    return task.evaluate == "evaluation.retrieval:evaluate"


class Section(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base class of the configuration and its sections."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as dicts, lists and scalars."""
        return _plain(self)


class BertConfig(Section, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Text and multimodal encoder: Hugging Face's keys of BERT and two keys of ALBEF."""

    vocab_size: Rows | Literal["auto"]
    """Number of word pieces. `auto` takes the size of the tokenizer."""
    hidden_size: Width
    """Width of the text embeddings."""
    num_hidden_layers: Count
    """Number of layers of the text encoder and the multimodal encoder together."""
    num_attention_heads: Count
    """Number of attention heads, a divisor of `hidden_size`."""
    fusion_layer: AtLeast0
    """Index of the first multimodal layer. The layers below it form the text encoder."""
    encoder_width: Width
    """Width of the image embeddings, equal to `vision_width`."""
    intermediate_size: Width = 3072
    """Width of the feed-forward layers."""
    max_position_embeddings: Rows = 512
    """Number of position embeddings. A text has at most this number of token ids."""
    type_vocab_size: Count = 2
    """Number of token type embeddings. ALBEF uses the first one only."""
    pad_token_id: AtLeast0 = 0
    """Id of the padding token."""
    layer_norm_eps: Number = 1e-12
    """Epsilon of layer normalization."""
    hidden_dropout_prob: Share = 0.1
    """Dropout probability of the layers' outputs."""
    attention_probs_dropout_prob: Share = 0.1
    """Dropout probability of the attention weights."""
    initializer_range: Number = 0.02
    """Standard deviation of random initial weights."""
    hidden_act: Literal["gelu"] = "gelu"
    """Activation of the feed-forward layers."""

    @property
    def word_pieces(self) -> int:
        """The key vocab_size, after `models.tokenizer.load_tokenizer` has replaced `auto`."""
        return self.vocab_size  # ty: ignore[invalid-explicit-return]


class OptimizerConfig(Section, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Optimizer and its learning rate."""

    opt: Annotated[str, in_training()] = "adamW"
    """Name of the optimizer: `adamW`, or a name known to timm."""
    lr: Annotated[Number, in_training()] = 1e-4
    """Learning rate after the warm-up, for the global batch size `reference_batch`."""
    weight_decay: Annotated[Number, in_training()] = 0.02
    """Weight decay of all parameters except biases and other one-dimensional parameters."""
    opt_eps: Annotated[Number | None, in_training()] = None
    """Epsilon of the optimizer. Default: the optimizer's own value."""
    opt_betas: Annotated[
        tuple[Beta, Beta] | None, in_training(wanted="two numbers, each at least 0 and below 1")
    ] = None
    """Two decay rates of the optimizer's moving averages. Default: the optimizer's own values."""
    temp_lr_scale: Annotated[Number, in_training(with_trait("contrastive"))] = 1.0
    """Factor of the temperature's learning rate. Set it below 1 if `lr` is far above 1e-4."""
    new_lr_scale: Annotated[Number, in_training()] = 1.0
    """Factor of the learning rate of parameters without pre-trained weights. The temperature has
    the factor `temp_lr_scale` instead."""


class SchedulerConfig(Section, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Schedule of the learning rate."""

    sched: Annotated[Literal["cosine"], in_training()] = "cosine"
    """Name of the schedule."""
    epochs: Annotated[AtLeast1, in_training()] = 30
    """Number of epochs."""
    min_lr: Annotated[Number, in_training()] = 1e-5
    """Learning rate at the end of the cosine."""
    decay_rate: Annotated[Number, read_never()] = 1.0
    """Ignored. Released files have it."""
    warmup_lr: Annotated[Number, in_training()] = 1e-5
    """Learning rate at the start of the warm-up."""
    warmup_epochs: Annotated[AtLeast0, in_training()] = 10
    """Length of the warm-up in units of 100 iterations. The warm-up ends with the first epoch at
    the latest."""
    cooldown_epochs: Annotated[AtLeast0, read_never()] = 0
    """Ignored. Released files have it."""
    warmup_iters: Annotated[AtLeast0 | None, in_training()] = None
    """Length of a linear warm-up in iterations. After the warm-up the learning rate follows the
    cosine at every iteration. Default: the released schedule, whose cosine changes the rate once
    per epoch."""


class Config(Section, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Configuration of a task. Every task accepts every key."""

    train_file: Annotated[Paths | None, in_training(file=True, wanted=PATHS_WANTED)] = None
    """Annotation files of the training set: JSON. Pre-training and text assignment also read shards
    (`*.tar`)."""
    val_file: Annotated[
        Paths | None,
        read_if(evaluates_file("val_file"), file=True, wanted=PATHS_WANTED),
    ] = None
    """Annotation files of the validation set, which selects the best epoch. Pre-training is
    validated by zero-shot retrieval. Default: there is no validation, and the last epoch is
    tested."""
    test_file: Annotated[
        Paths | None,
        read_if(evaluates_file("test_file"), file=True, wanted=PATHS_WANTED),
    ] = None
    """Annotation files of the test set, evaluated after training. Pre-training is evaluated by
    zero-shot retrieval."""
    image_root: Annotated[str, read_if(lambda task: task.name != "vqa", file=True)] = ""
    """Folder that relative image paths start from."""
    vqa_root: Annotated[str | None, read_if(is_task("vqa"), file=True)] = None
    """Folder of the images of VQA v2, which are COCO's."""
    vg_root: Annotated[str | None, read_if(is_task("vqa"), file=True)] = None
    """Folder of the images of Visual Genome."""
    answer_list: Annotated[str | None, read_if(is_task("vqa"), file=True)] = None
    """JSON file with the candidate answers. Without this key answers are generated."""
    refcoco_data: Annotated[str | None, read_if(is_task("grounding"), file=True)] = None
    """Folder of REFER's data sets."""
    refer_dataset: Annotated[
        Literal["refcoco", "refcoco+", "refcocog"], read_if(is_task("grounding"))
    ] = "refcoco+"
    """Data set of REFER. Its folder in `refcoco_data` must have the same name."""
    det_file: Annotated[str | None, read_if(is_task("grounding"), file=True)] = None
    """JSON file with the detected boxes of each image."""
    coco_file: Annotated[str | None, read_never(file=True)] = None
    """Ignored. Released files have it."""
    image_res: Annotated[Pixels | None, read_always()] = None
    """Height and width of the images in pixels, a multiple of `patch_size`."""
    exif: Annotated[Literal["stored", "upright"], read_always()] = "stored"
    """`upright` turns images by their EXIF orientation. `stored` ignores the orientation. With
    `upright`, images with an orientation are refused in a test set with boxes."""
    hflip: Annotated[bool, in_training()] = True
    """Flip half of the training images horizontally."""
    min_scale: Annotated[Share | None, in_training()] = None
    """Smallest area of a random crop, as a share of the image. Default: 0.2 in pre-training, else
    0.5."""
    randaugment: Annotated[bool, in_training()] = True
    """Apply RandAugment to the training images."""
    max_skipped: Annotated[Share, in_training()] = 0.01
    """Maximum share of unusable images or captions in an epoch. Training stops above this share."""
    num_workers: Annotated[Annotated[int, Meta(ge=0, le=1000)] | None, read_always()] = None
    """Number of data workers per rank. Default: the number of CPU cores per rank, at most 8."""
    shuffle_buffer: Annotated[AtLeast1, in_training(with_trait("captions"))] = 20000
    """Number of samples that are shuffled together if training reads shards."""
    max_words: Annotated[AtLeast1 | None, read_if(lambda task: task.name != "attributes")] = None
    """Maximum number of words of a text. Default: 50 for a test question of VQA, 512 for a query or
    an ad, and 30 for other texts."""
    max_tokens: Annotated[Annotated[int, Meta(ge=2, le=sys.maxsize)] | None, read_always()] = None
    """Maximum number of token ids of a text, including `[CLS]`. It may not exceed
    `max_position_embeddings`. Default: 25 for pre-training, text assignment, attributes and the
    training questions of VQA; 30 for retrieval and grounding; 64 for relevance;
    `max_position_embeddings` for other texts."""

    bert_config: Annotated[
        BertConfig | None, read_always(file=True, wanted="a path or a mapping of keys to values")
    ] = None
    """JSON file or mapping with the sizes of the text encoder and the multimodal encoder. If
    `text_encoder` names an encoder other than the default, missing keys come from its config.json,
    and the upper half of its layers becomes the multimodal encoder."""
    vision_width: Annotated[Width, read_always()] = 768
    """Width of the image encoder. If `vision_encoder` names an encoder, the default is the width of
    that encoder."""
    vision_depth: Annotated[Count, read_always()] = 12
    """Number of layers of the image encoder. The default depends on `vision_encoder`, as for
    `vision_width`."""
    vision_heads: Annotated[Count, read_always()] = 12
    """Number of attention heads of the image encoder, a divisor of `vision_width`. The default
    depends on `vision_encoder`, as for `vision_width`."""
    patch_size: Annotated[Pixels, read_always()] = 16
    """Height and width of an image patch in pixels. The default depends on `vision_encoder`, as for
    `vision_width`."""
    embed_dim: Annotated[Width, read_if(with_trait("projects"))] = 256
    """Width of the projected features of contrastive learning."""
    text_encoder: Annotated[str, read_always(file=True)] = "bert-base-uncased"
    """BERT weights and tokenizer: hub name, folder, `.bin`, `.safetensors`, or `random`."""
    vision_encoder: Annotated[str, in_training(lambda task: bool(task.initialize), file=True)] = (
        "deit_base_patch16_224.fb_in1k"
    )
    """ViT weights: name known to timm, folder, `.pth`, `.safetensors`, or `random`."""
    tokenizer: Annotated[str | None, read_always(file=True)] = None
    """Vocabulary file, folder or hub name. Default: the tokenizer of `text_encoder`."""

    objectives: Annotated[
        Objectives,
        in_training(with_trait("contrastive"), wanted="a list of one or more of itc, mlm, itm"),
    ] = ("itc", "mlm", "itm")
    """Objectives of training."""
    hard_negatives: Annotated[bool, in_training(with_trait("contrastive"))] = True
    """Draw the negatives of ITM by contrastive similarity. `false` draws them uniformly."""
    distill: Annotated[
        bool | Objectives,
        in_training(with_trait("distills"), wanted="true, false or a list of itc, mlm, itm"),
    ] = True
    """Use momentum distillation, for all objectives or for the listed ones."""
    alpha: Annotated[Share, in_training(with_trait("distills"))] = 0.4
    """Weight of the momentum model's soft targets."""
    warm_up: Annotated[bool, in_training(with_trait("distills"))] = True
    """Raise `alpha` linearly from 0 to its value in the first epoch."""
    temp: Annotated[
        Annotated[float, Meta(ge=TEMP_RANGE[0], le=TEMP_RANGE[1])],
        in_training(with_trait("contrastive")),
    ] = 0.07
    """Initial temperature of contrastive learning."""
    momentum: Annotated[Share, in_training(with_trait("distills"))] = 0.995
    """Momentum of the momentum model."""
    queue_size: Annotated[Rows, in_training(with_trait("contrastive"))] = 65536
    """Number of momentum features in the queue of images and in the queue of texts. ITC contrasts
    the batch with both queues."""
    mlm_probability: Annotated[Share, in_training(is_task("pretrain"))] = 0.15
    """Share of tokens that are masked for MLM."""
    k_test: Annotated[AtLeast1, read_if(lambda task: _searches(task) or task.name == "vqa")] = 128
    """Number of candidates to re-rank for each image, text or question."""
    image_embeds: Annotated[Literal["host", "recompute"], read_if(_searches)] = "host"
    """`host` keeps the image embeddings of an evaluation in host memory. `recompute` computes them
    again when they are needed."""
    eos: Annotated[str, read_if(is_task("vqa"))] = "[SEP]"
    """Token that ends an answer."""
    num_beams: Annotated[Count, read_if(is_task("vqa"))] = 3
    """Number of beams in the beam search that generates answers."""
    max_answer_tokens: Annotated[AtLeast1 | None, read_if(is_task("vqa"))] = None
    """Maximum number of tokens of a generated answer. Default: in training, the length of the
    longest answer in `train_file`; in an evaluation, the value of the checkpoint, or 10 if the
    checkpoint has none."""
    share: Annotated[Literal["cross_attention", "all", "none"], read_if(with_trait("pairs"))] = (
        "cross_attention"
    )
    """Parameters that the two blocks of an NLVR2 layer share: key and value projections of
    cross-attention, all parameters, or none."""
    eval_ema: Annotated[bool | None, read_never()] = None
    """Ignored. Released files have it."""

    batch_size: Annotated[AtLeast1 | None, in_training()] = None
    """Number of training samples per rank in each micro-batch. A step has `accumulate`
    micro-batches."""
    batch_size_test: Annotated[AtLeast1, read_if(lambda task: bool(task.evaluate))] = 64
    """Number of samples per rank in a batch of an evaluation."""
    accumulate: Annotated[AtLeast1, in_training()] = 1
    """Number of micro-batches of an optimizer step."""
    clip_grad: Annotated[Number | None, in_training()] = None
    """Maximum norm of the gradients. Default: no clipping."""
    reference_batch: Annotated[AtLeast1 | None, in_training()] = None
    """Global batch size for which the learning rates were chosen. At another global batch size the
    rates are multiplied by the square root of (global batch size / `reference_batch`). Default: no
    scaling."""
    precision: Annotated[Literal["fp32", "bf16"], read_always()] = "fp32"
    """Precision of the matrix products. Weights, heads and losses are always float32."""
    compile: Annotated[Literal["auto"] | bool, in_training(wanted="auto, true or false")] = "auto"
    """Compile the model. `auto` compiles on a GPU unless `deterministic` is set."""
    gradient_checkpointing: Annotated[bool, in_training()] = False
    """Save memory by computing the layers' activations again in the backward pass."""
    deterministic: Annotated[bool, read_always()] = False
    """Make results on a GPU exactly reproducible. Results on a CPU always are."""
    log_every: Annotated[AtLeast1, in_training()] = 50
    """Number of iterations between two fetches of the losses from a GPU."""
    save_every: Annotated[
        Interval,
        in_training(wanted="minutes or iterations, such as 15 minutes or 1000 iterations"),
    ] = "15 minutes"
    """Interval of saves within an epoch. A number without a unit counts iterations. With 0 a run
    saves only at the end of an epoch."""
    keep_checkpoints: Annotated[AtLeast1 | None, in_training()] = None
    """Number of `checkpoint_%02d.pth` to keep. Older files are removed. Default: all are kept."""
    patience: Annotated[AtLeast1 | None, in_training(lambda task: bool(task.score))] = None
    """End training after this number of epochs without a better validation score. Default: train
    all epochs."""
    max_skipped_steps: Annotated[AtLeast0, in_training()] = 0
    """Maximum number of steps of a run whose loss or gradients are NaN or infinite. Training stops
    if there are more."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Schedule of the learning rate."""

    # keys that `configs.load.require` checks before a model or data set reads them

    @property
    def bert(self) -> BertConfig:
        """The key bert_config."""
        return self.bert_config  # ty: ignore[invalid-explicit-return]

    @property
    def resolution(self) -> int:
        """The key image_res."""
        return self.image_res  # ty: ignore[invalid-explicit-return]

    @property
    def train_batch_size(self) -> int:
        """The key batch_size."""
        return self.batch_size  # ty: ignore[invalid-explicit-return]

    def files(self, split: str) -> tuple[str, ...]:
        """Return the annotation files of a split: train, val or test."""
        return getattr(self, f"{split}_file")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in the layout of config.yaml and checkpoints.

        As in released files, both sections have the learning rate.
        """
        values = _plain(self)
        values["scheduler"]["lr"] = values["optimizer"]["lr"]
        return values


# --------------------------------------------------------------------------------------------------
# the table of keys


@dataclass(frozen=True)
class Field:
    """A configuration key.

    Attributes:
        name: Name of the key, `section.key` for a key of a section.
        type: Annotated type of its values.
        default: Default value, None if the key may be missing.
        wanted: Description of the accepted values.
        reads: Whether a task reads the key.
        training: Whether the key has no effect in an evaluation.
        file: Whether the value names files, folders or hub repositories.
    """

    name: str
    type: Any
    default: Any
    wanted: str
    reads: Reads
    training: bool
    file: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that read the key."""
        return tuple(task.name for task in TASKS.values() if self.reads(task))

    def accepts(self, value: Any) -> bool:
        """Return whether the key may have a value."""
        try:
            msgspec.convert(value, self.type)
        except (msgspec.ValidationError, OverflowError):
            return False
        # msgspec checks only the lower limit of numbers beyond 64 bits
        return not (isinstance(value, int) and abs(value) > sys.maxsize)


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the choices of the Literal in a type hint, in the order of the source."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next(filter(None, map(_choices, get_args(hint))), ())


def _describe(kind: inspect.Type, choices: tuple[Any, ...]) -> str:
    """Describe the values that a type accepts, for messages and documentation.

    msgspec sorts the values of a Literal; `choices` keeps their order.
    """
    match kind:
        case inspect.Metadata():
            return _describe(kind.type, choices)
        case inspect.UnionType():
            parts = [part for part in kind.types if not isinstance(part, inspect.NoneType)]
            return " or ".join(_describe(part, choices) for part in parts)
        case inspect.IntType() | inspect.FloatType():
            what = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            limited = kind.le is not None and kind.le < sys.maxsize
            return (
                f"{what} from {kind.ge:g} to {kind.le:,}"
                if limited
                else f"{what} of at least {kind.ge:g}"
            )
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType():
            return "one of " * (len(choices) > 1) + ", ".join(choices)
        case inspect.StrType():
            return "a path" if kind.min_length else "a string"
    raise TypeError(f"no description of {kind}")


def _fields(section: type[Struct], prefix: str = "") -> Iterator[Field]:
    """Yield the keys of a section, including the keys of nested sections."""
    for field in msgspec.structs.fields(section):
        default = None if field.required else field.default
        if isinstance(default, Section):
            yield from _fields(type(default), f"{field.name}.")
            continue
        kind = inspect.type_info(field.type)
        extra = getattr(kind, "extra", None) or read_always().extra
        yield Field(
            name=f"{prefix}{field.name}",
            type=field.type,
            default=default,
            wanted=extra["wanted"] or _describe(kind, _choices(field.type)),
            reads=extra["reads"],
            training=extra["training"],
            file=extra["file"],
        )


FIELDS: dict[str, Field] = {field.name: field for field in _fields(Config)}
BERT_FIELDS: dict[str, Field] = {field.name: field for field in _fields(BertConfig)}
BERT_REQUIRED = [field.name for field in msgspec.structs.fields(BertConfig) if field.required]
SECTIONS = ("optimizer", "scheduler")
VIT_KEYS = ("vision_width", "vision_depth", "vision_heads", "patch_size")
ANNOTATION_KEYS = [name for name, field in FIELDS.items() if field.wanted == PATHS_WANTED]
# keys whose values name files, folders or hub repositories
FILE_KEYS = [name for name, field in FIELDS.items() if field.file]
# names in released files, which have the learning rate twice
OTHER_NAMES = {
    "schedular": "scheduler",
    "batch_size_train": "batch_size",
    "scheduler.lr": "optimizer.lr",
}
# Hugging Face's keys without effect here: a mapping may have no other unknown keys, a file may
BERT_OTHERS = (
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "position_embedding_type",
    "use_cache",
    "gradient_checkpointing",
    "classifier_dropout",
    "add_cross_attention",
)

# --------------------------------------------------------------------------------------------------
# checks

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def check_known(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise InputError for a key that is not known, naming the nearest one."""
    known = list(known)
    for key in map(str, keys):
        if key in known:
            continue
        near = [name for name in known if name.endswith(f".{key}")]
        near = near or difflib.get_close_matches(key, [*known, *SECTIONS, *OTHER_NAMES], 1, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "docs/config.md lists all keys"
        raise InputError(f"{where}: unknown key {_REPR.repr(key)}; {hint}")


def check_values(values: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """Raise InputError for an unknown key, or for a value that a key does not accept."""
    check_known(values, fields, where)
    for key, value in values.items():
        if not fields[key].accepts(value):
            raise InputError(
                f"{where}: {key} is {_REPR.repr(value)}; it must be {fields[key].wanted}"
            )


def _check_multiple(config: Section, key: str, divisor: str, where: str) -> None:
    """Raise InputError if one value does not divide another."""
    value, part = getattr(config, key), getattr(config, divisor)
    if value is not None and value % part:
        multiple = max(1, round(value / part)) * part
        raise InputError(
            f"{where}: {key} {value} is not a multiple of {divisor} {part}; set {key} to "
            f"{multiple}, or choose another {divisor}"
        )


# --------------------------------------------------------------------------------------------------
# configurations


def as_config(config: Config | Mapping[str, Any], where: str = "config") -> Config:
    """Check a configuration and fill in the defaults.

    Args:
        config: Configuration. A Config is returned unchanged. The names of released files are
            accepted.
        where: Source of the configuration, for messages.

    Raises:
        InputError: A key is unknown, or its value is not accepted.
    """
    return config if isinstance(config, Config) else complete(flatten(config, where), where)


def flatten(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a configuration by key, `section.key` for the keys of a section.

    Raises:
        InputError: A section is not a mapping, or two names of a key have two values.
    """
    flat: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in _items(config, where):
        section, dot, last = name.rpartition(".")
        key = f"{OTHER_NAMES.get(section, section)}{dot}{last}"
        key = OTHER_NAMES.get(key, key)
        if key in ANNOTATION_KEYS and isinstance(value, str):
            value = [value]
        if value is not None and flat.get(key) not in (None, value):
            raise InputError(
                f"{where}: {names[key]} is {_REPR.repr(flat[key])} and {name} is "
                f"{_REPR.repr(value)}, but they are two names of one key; keep one of them"
            )
        if flat.get(key) is None:
            flat[key], names[key] = value, name
    return flat


def complete(flat: Mapping[str, Any], where: str) -> Config:
    """Return the configuration with the values of `flatten`. Raises InputError."""
    nested: dict[str, Any] = {}
    for key, value in checked(with_sizes(flat, where), where).items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    config = msgspec.convert(nested, Config)
    _check_multiple(config, "image_res", "patch_size", where)
    _check_multiple(config, "vision_width", "vision_heads", where)
    return config


def with_sizes(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Add the sizes of encoders that a configuration names without their sizes.

    Args:
        flat: Values by key.
        where: Source of the configuration, for messages.

    Raises:
        InputError: An encoder that is named cannot be read.
    """
    given = {key: value for key, value in flat.items() if value is not None}
    # the sizes of the default encoders are the defaults of their keys
    vision, text = (
        None if given.get(key) in ("random", FIELDS[key].default) else given.get(key)
        for key in ("vision_encoder", "text_encoder")
    )
    added: dict[str, Any] = {}
    if isinstance(vision, str) and not given.keys() >= set(VIT_KEYS):
        from models.sizes import vit_sizes  # which imports timm

        added = {key: size for key, size in vit_sizes(vision).items() if key not in given}
    bert = given.get("bert_config", {})
    if (
        isinstance(text, str)
        and isinstance(bert, Mapping)
        and not bert.keys() >= set(BERT_REQUIRED)
    ):
        from models.sizes import bert_sizes

        width = {"vision_width": FIELDS["vision_width"].default, **given, **added}["vision_width"]
        added["bert_config"] = bert_sizes(text, width) | read_bert_values(bert, where)
    return {**flat, **added}


def checked(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return checked values of some keys, with bert_config as a BertConfig. Raises InputError."""
    bert = flat.get("bert_config")
    if bert and isinstance(bert, str | Mapping):
        flat = {**flat, "bert_config": read_bert_config(bert, where)}
    check_values(flat, FIELDS, where)
    return dict(flat)


def read_bert_config(
    value: BertConfig | Mapping[str, Any] | str | Path, where: str = ""
) -> BertConfig:
    """Check the key bert_config and fill in the defaults.

    Args:
        value: Mapping, or path of a JSON file.
        where: Source of the configuration, for messages.

    Raises:
        InputError: The file cannot be read, a key is unknown, or its value is not accepted.
    """
    if isinstance(value, BertConfig):
        return value
    prefix = where and f"{where}: "
    bert = read_bert_values(value, where)
    where = f"{prefix}bert_config" if isinstance(value, Mapping) else f"{prefix}bert_config {value}"
    missing = [key for key in BERT_REQUIRED if bert.get(key) is None]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; add the missing keys")
    check_values(bert, BERT_FIELDS, where)
    config = msgspec.convert(bert, BertConfig)
    _check_multiple(config, "hidden_size", "num_attention_heads", where)
    if config.fusion_layer >= config.num_hidden_layers:
        raise InputError(
            f"{where}: fusion_layer {config.fusion_layer} is not below num_hidden_layers "
            f"{config.num_hidden_layers}, so no layer fuses text and image; lower fusion_layer"
        )
    return config


def read_bert_values(
    value: BertConfig | Mapping[str, Any] | str | Path, where: str = ""
) -> dict[str, Any]:
    """Return the values of bert_config that a model reads, of a mapping or of a JSON file.

    A mapping may have no other keys except BERT_OTHERS. A file may have any other key that does not
    look like a misspelling.
    """
    prefix = where and f"{where}: "
    if isinstance(value, BertConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in BERT_OTHERS]
        check_known(unknown, BERT_FIELDS, f"{prefix}bert_config")
        return {key: value[key] for key in value if key in BERT_FIELDS}
    try:
        bert = json.loads(read_regular(find_file(value)))
    except OSError as error:
        raise InputError(
            f"{prefix}bert_config: cannot read {value} ({error.strerror}); name a JSON file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{prefix}bert_config: {value} is not valid JSON ({error}); correct the file"
        ) from None
    if not isinstance(bert, dict):
        raise InputError(
            f"{prefix}bert_config: {value} is not a JSON object; name a file of keys and values"
        )
    misspelled = [key for key in bert if difflib.get_close_matches(key, BERT_FIELDS, 1, 0.9)]
    check_known(misspelled, BERT_FIELDS, f"{prefix}bert_config {value}")
    return {key: bert[key] for key in bert if key in BERT_FIELDS}


def find_file(path: str | Path) -> str | Path:
    """Return the path of a file of the repository if the working directory has no such file."""
    inside = ROOT / path
    return inside if not Path(path).exists() and inside.exists() else path


def _items(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a configuration, `section.key` for the keys of a section.

    Raises InputError if a section is not a mapping.
    """
    for key, value in config.items():
        if isinstance(value, Section):
            value = value.to_dict()
        if OTHER_NAMES.get(key, key) not in SECTIONS:
            yield str(key), value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif value is not None:  # all lines of the section may be comments
            raise InputError(
                f"{where}: {key} is {_REPR.repr(value)}; it must be a mapping of keys to values"
            )


def _plain(value: Any) -> Any:
    """Convert a section to a dict and a tuple to a list; return other values unchanged."""
    if isinstance(value, Struct):
        return {key: _plain(inner) for key, inner in msgspec.structs.asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value
