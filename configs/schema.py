"""Names that moved to configs.config and configs.load, until all callers import them from there."""

from configs.config import (  # noqa: F401 - for other modules
    ANNOTATION_KEYS,
    FILE_KEYS,
    OTHER_NAMES,
    REFER,
    SECTIONS,
    TEMP_RANGE,
    read_bert_config,
)
from configs.config import BERT_FIELDS as BERT_KEYS  # noqa: F401
from configs.config import FIELDS as KEYS  # noqa: F401
from configs.config import as_config as with_defaults  # noqa: F401
from configs.load import (  # noqa: F401 - for other modules
    load_config,
    override,
    parse_override,
    parse_yaml,
    require,
    save_config,
    save_interval,
)
from configs.tasks import TASKS as TASKS  # noqa: F401
