"""Every step has a useful learning rate, or that of transformers; weight decay applies to matrices only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_accel import RunConfig
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schedules import SCHEDULES, learning_rate, schedule_options
from lora_accel.config.schema import OptimizerOptions, SchedulerOptions, TrainingSection, chosen_options
from lora_accel.errors import ConfigError
from lora_accel.model.adapter import embedding_parameters, trainable_parameters
from lora_accel.training.optimizer import learning_rate_factors, make_optimizer, set_learning_rate
from tests.conftest import ROOT

PEAK = 3e-4


def get_constant_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> Any:
    return get_constant_schedule_with_warmup(optimizer, warmup)


def get_wsd(optimizer: torch.optim.Optimizer, warmup: int, total: int, *, decay_ratio: float, **options: Any) -> Any:
    decay_steps = (total - warmup) * decay_ratio
    return get_wsd_schedule(optimizer, warmup, decay_steps, num_training_steps=total, **options)


TRANSFORMERS_SCHEDULES: dict[str, list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]] = {
    "cosine": [(get_cosine_schedule_with_warmup, {}, {})],
    "linear": [(get_linear_schedule_with_warmup, {}, {})],
    "constant": [(get_constant_schedule, {}, {})],
    "constant_with_warmup": [(get_constant_schedule, {}, {})],
    "cosine_with_min": [
        (get_cosine_with_min_lr_schedule_with_warmup, {}, {"min_lr_rate": 0.1}),
        (get_cosine_with_min_lr_schedule_with_warmup, {"min_ratio": 0.3}, {"min_lr_rate": 0.3}),
    ],
    "cosine_with_restarts": [
        (get_cosine_with_hard_restarts_schedule_with_warmup, {}, {}),
        (get_cosine_with_hard_restarts_schedule_with_warmup, {"num_cycles": 3}, {"num_cycles": 3}),
    ],
    "polynomial": [
        (get_polynomial_decay_schedule_with_warmup, {}, {"lr_end": 0.0}),
        (
            get_polynomial_decay_schedule_with_warmup,
            {"power": 2, "min_ratio": 0.1},
            {"power": 2, "lr_end": PEAK * 0.1},
        ),
    ],
    "wsd": [
        (get_wsd, {}, {"decay_ratio": 0.1}),
        (get_wsd, {"decay_ratio": 0.4}, {"decay_ratio": 0.4}),
        (get_wsd, {"min_ratio": 0.2, "decay_ratio": 1}, {"min_lr_ratio": 0.2, "decay_ratio": 1}),
    ],
}
"""Name -> (function of transformers, options here, the same options there)."""
CASES = [(name, *case) for name, cases in TRANSFORMERS_SCHEDULES.items() for case in cases]


def rate(step: int, training: TrainingSection, plan: Plan) -> float:
    return learning_rate(
        step,
        peak=training.learning_rate,
        scheduler=training.scheduler,
        warmup_steps=plan.warmup_steps,
        total_steps=plan.total_steps,
        from_zero=training.warmup_from_zero,
        options=chosen_options(training.scheduler_options),
    )


def plan_of(
    total_steps: int, warmup_steps: int | None, scheduler: str = "cosine", *, from_zero: bool = False, **options: float
) -> tuple[TrainingSection, Plan]:
    training = {"max_steps": total_steps, "warmup_steps": warmup_steps, "scheduler": scheduler, "learning_rate": PEAK}
    training |= {"warmup_from_zero": from_zero, "scheduler_options": options}
    config = RunConfig.model_validate(
        {"output_dir": "x", "model": {"name_or_path": "x"}, "data": {"train": [{"path": "x"}]}, "training": training}
    )
    plan = make_plan(config, num_ranks=1, num_examples=100, num_tokens=1000, num_supervised_tokens=500)
    return config.training, plan


def rates_of(
    total: int, warmup: int | None, scheduler: str = "cosine", *, from_zero: bool = False, **options: float
) -> list[float]:
    training, plan = plan_of(total, warmup, scheduler, from_zero=from_zero, **options)
    return [rate(step, training, plan) for step in range(total)]


def rates_of_transformers(
    total: int, warmup: int, function: Callable[..., Any], options: dict[str, Any]
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = function(optimizer, warmup, total, **options)
    rates = []
    for step in range(total):
        if step:  # not after the last: its polynomial divides by 0 if all steps are warm-up
            optimizer.step()
            schedule.step()
        rates.append(float(schedule.get_last_lr()[0]))
    return rates


LENGTHS = [(1, 0), (1, 1), (2, 1), (2, 2), (3, 1), (10, 0), (10, 3), (100, 7), (97, 97), (1000, 30), (4, 9)]
"""(steps, warm-up steps)"""


@pytest.mark.parametrize(("scheduler", "function", "options", "theirs"), CASES)
def test_schedule_is_that_of_transformers(
    scheduler: str, function: Callable[..., Any], options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """From zero, its values; otherwise, its values without the step at 0."""
    for total, warmup in LENGTHS:
        peak = warmup if theirs.get("min_lr_ratio") else 0  # its wsd does not begin at 0 then
        rates = rates_of(total, warmup, scheduler, from_zero=True, **options)[peak:]
        expected = rates_of_transformers(total, warmup, function, theirs)[peak:]
        assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18), (total, warmup)

        steps = total + 1 if warmup else total
        expected = rates_of_transformers(steps, warmup, function, theirs)[steps - total :][max(peak - 1, 0) :]
        rates = rates_of(total, warmup, scheduler, **options)[max(peak - 1, 0) :]
        assert rates == pytest.approx(expected, rel=1e-12), (total, warmup)


def test_every_schedule_is_compared_with_transformers() -> None:
    assert TRANSFORMERS_SCHEDULES.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("cycles", range(1, 50))
def test_every_cycle_restarts_at_the_peak(cycles: int) -> None:
    """Also where (step / N) * num_cycles is a hair below an integer."""
    rates = rates_of(3 * cycles, 0, "cosine_with_restarts", num_cycles=cycles)
    assert rates == pytest.approx([PEAK * factor for factor in (1.0, 0.75, 0.25)] * cycles)


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),
    [
        ("cosine_with_min", {"min_ratio": 0.5}, [1, 0.5 + 0.5 * (2 + 2**0.5) / 4, 0.75, 0.5 + 0.5 * (2 - 2**0.5) / 4]),
        ("polynomial", {"power": 2}, [1, 9 / 16, 4 / 16, 1 / 16]),
        ("wsd", {"decay_ratio": 0.5}, [1, 1, 1, 0.5]),
        ("wsd", {}, [1, 1, 1, 1]),
    ],
)
def test_values_of_schedules_with_options(scheduler: str, options: dict[str, float], expected: list[float]) -> None:
    assert rates_of(4, 0, scheduler, **options) == pytest.approx([PEAK * factor for factor in expected])


@pytest.mark.parametrize("scheduler", [*SCHEDULES])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 97])
def test_every_step_has_a_useful_learning_rate(scheduler: str, total: int) -> None:
    """Also with as many warm-up steps as steps, with more, and with the default ratio."""
    for warmup in (None, *range(total + 3), 10 * total):
        rates = rates_of(total, warmup, scheduler)
        # The smallest one is the last of a cosine: it would reach 0 one step later.
        assert min(rates) > PEAK / (3 * max(total, warmup or 0) ** 2)
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        num_warmup = plan_of(total, warmup)[1].warmup_steps
        if num_warmup <= total:
            assert max(rates) == PEAK, "the peak is reached"
            assert top == max(num_warmup - 1, 0)
        else:
            assert rates == pytest.approx([PEAK * (step + 1) / num_warmup for step in range(total)])


@pytest.mark.parametrize(
    ("total", "warmup", "scheduler", "expected"),
    [
        (1, 1, "cosine", [1.0]),
        (2, 1, "cosine", [1.0, 0.5]),
        (2, 2, "linear", [0.5, 1.0]),
        (3, 2, "linear", [0.5, 1.0, 0.5]),
        (4, 0, "linear", [1.0, 0.75, 0.5, 0.25]),
        (4, 2, "constant", [0.5, 1.0, 1.0, 1.0]),
        (2, 4, "cosine", [0.25, 0.5]),
    ],
)
def test_values_of_short_runs(total: int, warmup: int, scheduler: str, expected: list[float]) -> None:
    assert rates_of(total, warmup, scheduler) == pytest.approx([PEAK * factor for factor in expected])


def parameters() -> list[torch.nn.Parameter]:
    layer = torch.nn.Linear(3, 4)
    return [layer.weight, layer.bias, torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(2, 3, 4))]


def optimizer_of(
    parameters: list[torch.nn.Parameter], factors: dict[str, float] | None = None, **training: Any
) -> torch.optim.Optimizer:
    """Return the optimizer of a config; the parameters are named by their positions."""
    section = plan_of(10, 0)[0]
    section = TrainingSection.model_validate(section.model_dump() | training)
    return make_optimizer({str(i): parameter for i, parameter in enumerate(parameters)}, section, factors=factors)


def test_weight_decay_excludes_biases_and_norms() -> None:
    weight, bias, norm, kernel = parameters()
    optimizer = optimizer_of([weight, bias, norm, kernel], weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in (weight, bias, norm, kernel)] == [0.1, 0.0, 0.0, 0.1]


def test_zero_gradients_shrink_only_matrices() -> None:
    all_parameters = parameters()
    before = [parameter.detach().clone() for parameter in all_parameters]
    optimizer = optimizer_of(all_parameters, weight_decay=0.1)
    set_learning_rate(optimizer, 0.5)
    for parameter in all_parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(all_parameters, before, strict=True):
        expected = old * (1 - 0.5 * 0.1) if parameter.ndim >= 2 else old
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 3)], ids=["matrices only", "vectors only"])
def test_empty_parameter_group_is_omitted(kept: slice) -> None:
    selected = parameters()[kept]
    optimizer = optimizer_of(selected)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(selected)]


def test_set_learning_rate_updates_every_group() -> None:
    optimizer = optimizer_of(parameters())
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_rates_are_multiples_of_the_base_rate() -> None:
    weight, bias, norm, kernel = parameters()
    optimizer = optimizer_of([weight, bias, norm, kernel], {"0": 16.0, "1": 16.0}, weight_decay=0.1)
    for base, expected in ((PEAK, [16 * PEAK, 16 * PEAK, PEAK, PEAK]), (0.25, [4.0, 4.0, 0.25, 0.25])):
        if base != PEAK:
            set_learning_rate(optimizer, base)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert [rates[id(p)] for p in (weight, bias, norm, kernel)] == expected
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in (weight, bias, norm, kernel)] == [0.1, 0.0, 0.0, 0.1]


def adapter_of(folder: Path, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **options))


def run_config(make_config: Callable[..., RunConfig], ratio: float, embedding_rate: float | None = None) -> RunConfig:
    training = {"learning_rate": PEAK, "embedding_learning_rate": embedding_rate}
    return make_config(adapter={"loraplus_ratio": ratio}, training=training)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": False, "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_loraplus_rates_are_those_of_peft(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], family: str, options: dict[str, Any]
) -> None:
    model = adapter_of(tiny_model(family), **options)
    trained = trainable_parameters(model)
    expected = create_loraplus_optimizer(model, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in expected.param_groups for p in group["params"]}
    config = run_config(make_config, 16.0)
    factors = learning_rate_factors(trained, embedding_parameters(model), config)
    optimizer = make_optimizer(trained, config.training, factors=factors)
    assert {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]} == rates
    assert len(set(rates.values())) == 2


@pytest.mark.parametrize(
    ("options", "embedding_names"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"lm_head.modules_to_save.default.weight"}),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta.default"},
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            {f"model.embed_tokens.lora_embedding_{x}.default" for x in "AB"},
        ),
    ],
)
def test_embeddings_have_a_rate_of_their_own(
    make_config: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    options: dict[str, Any],
    embedding_names: set[str],
) -> None:
    model = adapter_of(tiny_model(), **options)
    trained, config = trainable_parameters(model), run_config(make_config, 2.0, PEAK / 4)
    factors = learning_rate_factors(trained, embedding_parameters(model), config)
    own = {f"base_model.model.{name}" for name in embedding_names}
    assert {name for name, factor in factors.items() if factor == 0.25} == own
    assert {name for name in trained if "lora_B" in name} == {name for name, f in factors.items() if f == 2.0} != set()


def test_rate_of_embeddings_needs_trained_embeddings(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path]
) -> None:
    model = adapter_of(tiny_model(), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"training\.embedding_learning_rate: nothing in the embeddings or the head"):
        learning_rate_factors(
            trainable_parameters(model), embedding_parameters(model), run_config(make_config, 1.0, PEAK)
        )


def test_options_of_the_optimizer_reach_its_groups() -> None:
    options = {"betas": [0.8, 0.95], "eps": 1e-6}
    for name in ("adamw", "adamw_8bit", "paged_adamw"):
        (group, *_) = optimizer_of(parameters(), optimizer=name, optimizer_options=options).param_groups
        assert (list(group["betas"]), group["eps"]) == ([0.8, 0.95], 1e-6)
    (group, *_) = optimizer_of(parameters(), optimizer="sgd", optimizer_options={"momentum": 0.5}).param_groups
    assert group["momentum"] == 0.5
    (group, *_) = optimizer_of(parameters()).param_groups
    assert (list(group["betas"]), group["eps"]) == ([0.9, 0.999], 1e-8)


def test_muon_supports_matrices_only() -> None:
    with pytest.raises(ConfigError, match=r"training\.optimizer=muon supports matrices only, but 1 is none"):
        optimizer_of(parameters(), optimizer="muon")


def test_device_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def update(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for 'cpu'\nmore")

    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_32bit", update)
    with pytest.raises(
        ConfigError, match=r"training\.optimizer=lion: .* not support it on cpu: no kernel for 'cpu'\. Up"
    ):
        optimizer_of(parameters(), optimizer="lion")


def test_options_are_those_of_the_schema_and_the_docs() -> None:
    """Every entry of the tables has its options in the schema, and a row in docs/training.md."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, spec in OPTIMIZERS.items():
        assert f"| `{name}` |" in page
        assert spec.settable.keys() <= OptimizerOptions.model_fields.keys()
    for name in SCHEDULES:
        assert re.search(rf"^\| .*`{name}`.* \|", page, flags=re.MULTILINE)
        assert schedule_options(name).keys() <= SchedulerOptions.model_fields.keys()
