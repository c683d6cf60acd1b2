"""Named runs: functions that return a whole configuration."""

from __future__ import annotations

from collections.abc import Callable

from blip2.configs import RunConfig
from blip2.errors import ConfigError
from blip2.recipes import paper, tiny

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny/stage1": tiny.stage1,
    "tiny/stage2": tiny.stage2,
    "tiny/caption": tiny.caption,
    "tiny/vqa": tiny.vqa,
    "tiny/retrieval": tiny.retrieval,
    "tiny/search": tiny.search,
    "tiny/answers": tiny.answers,
    "tiny/instruct": tiny.instruct,
    "tiny/demo-stage1": tiny.demo_stage1,
    "tiny/demo-stage2": tiny.demo_stage2,
    "vitg-opt2.7b/stage1": paper.vitg_opt_stage1,
    "vitg-opt2.7b/stage2": paper.vitg_opt_stage2,
    "vitg-opt2.7b/caption": paper.vitg_opt_caption,
    "vitg-opt2.7b/vqa": paper.vitg_opt_vqa,
    "vitg-opt2.7b/retrieval": paper.vitg_opt_retrieval,
    "vitg-opt2.7b/instruct": paper.vitg_opt_instruct,
    "vitg-flant5xl/stage1": paper.vitg_t5_stage1,
    "vitg-flant5xl/stage2": paper.vitg_t5_stage2,
    "vitg-flant5xl/caption": paper.vitg_t5_caption,
    "vitg-flant5xl/vqa": paper.vitg_t5_vqa,
    "vitg-flant5xl/instruct": paper.vitg_t5_instruct,
    "vitg-flant5xxl/instruct": paper.vitg_t5xxl_instruct,
    "vitg-vicuna7b/instruct": paper.vitg_vicuna7b_instruct,
    "vitg-vicuna13b/instruct": paper.vitg_vicuna13b_instruct,
    "vitl-opt2.7b/stage1": paper.vitl_opt_stage1,
    "vitl-opt2.7b/stage2": paper.vitl_opt_stage2,
    "vitl-opt2.7b/retrieval": paper.vitl_opt_retrieval,
}


def recipe(name: str) -> RunConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe or configuration file {name!r}; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()
