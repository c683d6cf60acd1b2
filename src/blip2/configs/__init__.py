"""Every configuration of a run, as plain dataclasses that check themselves when created.

Standard library only, so that a recipe can be listed without importing torch. A whole run is one
`RunConfig`; recipes (`blip2.recipes`) return one, the command line overrides its fields by dotted
name (`--optim.lr 2e-4`), and the resolved one is written to `config.yaml` in the run folder.
"""

from blip2.configs.decoding import DecodingConfig
from blip2.configs.model import (
    BERT_WORDS,
    BLIP2_TYPES,
    INSTRUCTIONS,
    QUANTIZE,
    LanguageConfig,
    LoraConfig,
    QFormerConfig,
    VisionConfig,
)
from blip2.configs.run import RunConfig, flat, from_dict, to_dict
from blip2.configs.training import (
    BEST,
    PRECISIONS,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = [
    "BERT_WORDS",
    "BEST",
    "BLIP2_TYPES",
    "INSTRUCTIONS",
    "PRECISIONS",
    "QUANTIZE",
    "DataConfig",
    "DecodingConfig",
    "EvalConfig",
    "LanguageConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "QFormerConfig",
    "RunConfig",
    "TrainConfig",
    "VisionConfig",
    "flat",
    "from_dict",
    "to_dict",
]
