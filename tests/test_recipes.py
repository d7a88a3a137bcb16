"""The recipes of model families, each run on a tiny model of its family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import run_training
from lora_accel.config.files import read_config
from lora_accel.config.schema import RunConfig
from lora_accel.data.template import template_source
from lora_accel.model.adapter import add_adapter
from tests.conftest import ROOT, chat_rows, read_metrics, write_jsonl
from tests.families import model_of

FAMILIES = {"qwen3": "qwen3", "llama3": "llama", "gemma3": "gemma3_text", "smollm2": "llama", "smollm3": "smollm3"} | {
    "mistral": "mistral"
}
"""Name of a recipe -> `model_type`."""
TEMPLATES = {"llama3": "llama-3", "gemma3": "gemma", "mistral": "llama-2"}
"""Name of a recipe -> the built-in template that is most like the model's own; chatml for the others."""
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if "lora" in path.name)


def overrides(recipe: Path, model: Path, folder: Path) -> list[str]:
    """Return the overrides that run a recipe on a tiny model and few rows, for one step."""
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(20))
    return [
        f"model.name_or_path={model}",
        f"output_dir={folder / 'run'}",
        f"data.train=[{{path: {rows}}}]",
        "data.max_length=200",
        "training.max_steps=1",
        "training.batch_size=2",
        "training.mixed_precision=no",
        "logging.trackers=[]",
    ]


@pytest.fixture(scope="session")
def family_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_factory: Callable[..., PreTrainedTokenizerFast]
) -> Callable[[str], Path]:
    """Return a function that saves a tiny model of a recipe's family, with a chat template of its kind."""

    @functools.cache
    def make(name: str) -> Path:
        template = template_source(TEMPLATES.get(name, "chatml"))
        tokenizer = tokenizer_factory(bos_token="<s>", chat_template=template)
        folder = tmp_path_factory.mktemp(name)
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "head_dim": 16,
            "max_position_embeddings": 256,
        }  # nf4 quantizes blocks of 64 values
        model = model_of(FAMILIES[name], vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=4, **sizes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_every_family_has_both_recipes() -> None:
    assert {path.stem for path in RECIPES} == {f"{name}-{kind}" for name in FAMILIES for kind in ("lora", "qlora")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_consistent(recipe: Path) -> None:
    config = read_config(recipe)
    assert config.output_dir == f"runs/{recipe.stem}"
    assert (config.quantization.bits == 4) == recipe.stem.endswith("qlora")
    assert f"--config recipes/{recipe.name}" in recipe.read_text(encoding="utf-8")
    assert config.data.eval_fraction > 0


@pytest.mark.parametrize(
    "recipe",
    [
        # One recipe of each family: lora and qlora alternate.
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if (number // 2 + number) % 2 else ())
        for number, path in enumerate(RECIPES)
    ],
)
def test_recipe_trains_a_tiny_model_of_its_family(
    recipe: Path, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = family_model(recipe.stem.split("-")[0])
    config = read_config(recipe, overrides(recipe, model, tmp_path))
    run_training(config)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    (step,) = read_metrics(tmp_path / "run")
    _, evaluation = read_metrics(tmp_path / "run", "eval")
    assert 0 < step["loss"] < 20
    assert 0 < evaluation["eval_loss"] < 20


@pytest.mark.parametrize("name", FAMILIES)
def test_target_modules_are_all_linear_layers(name: str, family_model: Callable[[str], Path]) -> None:
    """The names in a recipe exist in the family, and none of its layers is forgotten."""

    def adapted(section: RunConfig) -> set[str]:
        base = AutoModelForCausalLM.from_pretrained(family_model(name))
        model = add_adapter(base, section.adapter, seed=0, autocast=False)
        return {key for key, _ in model.named_parameters() if "lora_A" in key}

    config = read_config(ROOT / "recipes" / f"{name}-lora.yaml")
    every = config.model_copy(update={"adapter": config.adapter.model_copy(update={"target_modules": "all-linear"})})
    assert {key.split(".")[-4] for key in adapted(config)} == set(config.adapter.target_modules)
    assert adapted(config) == adapted(every)
