"""Untrusted run folders, adapters and base models: no code in them runs, and they cannot exhaust memory or hang."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, run_training, train
from lora_accel.config.files import config_to_yaml
from lora_accel.errors import ArtifactError, LoraAccelError, UserError
from lora_accel.export.export import export_adapter
from lora_accel.inference.generation import generate
from lora_accel.merging.merge import merge_adapter
from lora_accel.model.weight_files import check_index_paths
from lora_accel.saving import adapter_config, tensor_files
from lora_accel.saving.atomic import MANIFEST, why_invalid, write_manifest
from lora_accel.saving.attach import load_adapter
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.tensor_files import PICKLED, read_adapter
from tests.conftest import chat_rows, run_config, write_jsonl


class Canary:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def plain_pickle(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def torch_pickle(canary: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"weight": Canary(canary)}, data)
    return data.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> RunConfig:
    """Train to the end and return the config."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder / "run", tiny_model(), write_jsonl(folder / "rows.jsonl", chat_rows(21)))
    run_training(config)
    return config


@pytest.fixture
def finished(trained: RunConfig, tmp_path: Path) -> RunConfig:
    """Return the config of a copy of the finished run."""
    folder = shutil.copytree(trained.output_dir, tmp_path / "run")
    return trained.model_copy(update={"output_dir": str(folder)})


def files_of(run: Path) -> list[Path]:
    return sorted(
        path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name not in (MANIFEST, ".lock")
    )


def sign(run: Path) -> None:
    for manifest in run.rglob(MANIFEST):
        write_manifest(manifest.parent)
        assert why_invalid(manifest.parent) is None


def exit_codes(config: RunConfig, file: Path, out: Path) -> dict[str, int]:
    """Run all commands that read a run folder; return their exit codes. Unexpected errors are raised."""
    adapter = Path(config.output_dir) / "adapter"

    def exit_code(command: Callable[[], Any]) -> int:
        try:
            command()
        except LoraAccelError as error:
            return error.exit_code
        return 0

    return {
        "merge": exit_code(lambda: merge_adapter(adapter, out)),
        "generate": exit_code(lambda: generate(["hello"], adapters=[adapter], max_new_tokens=2)),
        "train": train.main(["--config", str(file)]),
    }


@pytest.mark.parametrize("make_pickle", [plain_pickle, torch_pickle])
def test_run_with_all_files_replaced_by_pickles_fails(
    finished: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path, make_pickle: Callable[[Path], bytes]
) -> None:
    run, canary = Path(finished.output_dir), tmp_path / "canary"
    with pytest.raises(FileNotFoundError):
        canary.stat()
    pickle.loads(plain_pickle(canary))
    canary.rmdir()  # the canary works
    replaced = files_of(run)
    for file in replaced:
        (run / file).write_bytes(make_pickle(canary))
    sign(run)
    assert len(replaced) > 15
    codes = exit_codes(finished, config_file(finished), tmp_path / "merged")
    assert codes == {"merge": 2, "generate": 2, "train": 2}
    assert not canary.exists()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("make_pickle", [pytest.param(plain_pickle, marks=pytest.mark.slow), torch_pickle])
def test_run_with_one_file_replaced_by_a_pickle_fails_or_ignores_it(
    finished: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path, make_pickle: Callable[[Path], bytes]
) -> None:
    run, canary, backup = Path(finished.output_dir), tmp_path / "canary", tmp_path / "backup"
    status = json.loads((run / "status.json").read_text())
    # A finished run would not read its checkpoints.
    (run / "status.json").write_text(json.dumps(status | {"state": "failed"}))
    shutil.copytree(run, backup)
    failed: dict[str, list[str]] = {}
    for file in files_of(run):
        (run / file).write_bytes(make_pickle(canary))
        sign(run)
        codes = exit_codes(finished, config_file(finished), tmp_path / "merged")
        assert set(codes.values()) <= {0, 2}, file
        assert not canary.exists(), file
        failed[str(file)] = [command for command, code in codes.items() if code == 2]
        shutil.rmtree(run)
        shutil.copytree(backup, run)
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    newest = "checkpoints/step-00000006/"
    for file in (WEIGHTS, "optimizer.safetensors", "state.json"):
        assert failed[newest + file] == ["train"]
    for file in (WEIGHTS, CONFIG, "tokenizer.json"):
        assert failed[f"adapter/{file}"] == ["merge", "generate"]
    assert failed["adapter/provenance.json"] == ["merge", "generate"]  # which model was trained is recorded there


# Untrusted adapter configs


@pytest.fixture
def adapter(finished: RunConfig) -> Path:
    return Path(finished.output_dir) / "adapter"


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model())


def change(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "values",
    [
        {"r": 1_000_000_000},
        {"r": 0},
        {"r": -4},
        {"r": "8"},
        {"r": True},
        {"rank_pattern": {"q_proj": 1_000_000_000}},
        {"rank_pattern": ["q_proj"]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "1"},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"peft_type": "PREFIX_TUNING"},
        {"peft_type": None},
        {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
        {"layer_replication": [[0, 1_000_000_000]]},
        {"layer_replication": "all"},
        {"target_modules": 3},
        {"target_modules": [["q_proj"]]},
        {"target_modules": "("},
        {"exclude_modules": {"a": 1}},
        {"modules_to_save": [1]},
        {"init_lora_weights": {"a": 1}},
        {"target_parameters": 7},
    ],
)
def test_adapter_config_out_of_bounds_raises(adapter: Path, base: Any, values: dict[str, Any]) -> None:
    change(adapter, **values)
    began = time.process_time()
    with pytest.raises(ArtifactError, match=r"adapter"):
        load_adapter(base, adapter)
    assert time.process_time() - began < 60, "the adapter was built, or a pattern matched, before the check"


PATTERNS: list[dict[str, Any]] = [
    {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*!"},
    {"exclude_modules": "(([a-z_.0-9])+)+!"},
    {"rank_pattern": {"(([a-z_.0-9])+)+!": 4}},
    {"layers_pattern": ["(([a-z_.0-9])+)+!"], "layers_to_transform": [0]},
]


@pytest.mark.parametrize("values", PATTERNS)
def test_pattern_with_exponential_time_raises(adapter: Path, base: Any, values: dict[str, Any]) -> None:
    change(adapter, **values)
    with pytest.raises(ArtifactError, match=r"takes over 2 seconds"):
        load_adapter(base, adapter)


def test_fast_pattern_is_allowed(adapter: Path, base: Any) -> None:
    change(adapter, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj")
    load_adapter(base, adapter)


def test_names_in_rank_pattern_are_not_tried_as_patterns(
    adapter: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EVA and similar methods write one name for each module: with those of 100 layers, trying them takes seconds."""
    tried: list[str] = []
    monkeypatch.setattr(adapter_config, "check_patterns", lambda where, patterns, names: tried.extend(patterns))
    names = ["^model.layers.0.self_attn.q_proj", "layers.0.mlp.up_proj$", "lm_head", r".*\.k_proj"]
    change(adapter, rank_pattern=dict.fromkeys(names, 4))
    adapter_config.check_untrusted_config(adapter / CONFIG, [])
    assert tried == [r".*\.k_proj"]


def test_too_long_adapter_config_raises(adapter: Path, base: Any) -> None:
    (adapter / CONFIG).write_text(json.dumps({"a": "x" * adapter_config.MAX_CONFIG_BYTES}))
    with pytest.raises(ArtifactError, match="is this an adapter's config"):
        load_adapter(base, adapter)


@pytest.mark.parametrize("damage", ["nan", "integers", "more", "fewer"])
def test_unexpected_tensors_raise(adapter: Path, base: Any, damage: str) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    if damage == "nan":
        tensors[name][0, 0] = float("nan")
    elif damage == "integers":
        tensors[name] = tensors[name].to(torch.int32)
    elif damage == "more":
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(4, 4)
    else:
        del tensors[name]
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"not finite|int32|not those of this base|are missing"):
        load_adapter(base, adapter)


# Sizes, checked before anything is computed


@pytest.fixture
def plain(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return the folder of an adapter that PEFT saved."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), LoraConfig(task_type="CAUSAL_LM", r=4))
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    return tmp_path / "plain"


NAMES = [f"module_{number}" for number in range(20_000)]
LARGE_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": NAMES}, "target_modules has 20,000 entries"),
    "modules_to_save": ({"modules_to_save": NAMES}, "modules_to_save has 20,000 entries"),
    "target_parameters": ({"target_parameters": NAMES}, "target_parameters has 20,000 entries"),
    "rank_pattern": ({"rank_pattern": dict.fromkeys(NAMES, 4)}, "rank_pattern has 20,000 entries"),
    "alpha_pattern": ({"alpha_pattern": dict.fromkeys(NAMES, 4)}, "alpha_pattern has 20,000 entries"),
    "replication": ({"layer_replication": [[0, 2]] * 500, "r": 1024}, "1,000 layers, more than 4 times the base's 2"),
    "replicated": ({"layer_replication": [[0, 2]] * 600}, "is not a list of .* at most 1024 layers"),
    "long pattern": ({"target_modules": "(a|b)" * 5000}, "a pattern of over 20,000 characters"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha=an integer of 1329 bits is not a finite number"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha='16' is not a finite number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha=None is not a finite number"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern=.* is not a finite number"),
    "dropout": ({"lora_dropout": 2.0}, "lora_dropout=2.0 is not a number from 0 to 1"),
    "nan dropout": ({"lora_dropout": float("nan")}, "lora_dropout=nan is not a number"),
    "bias": ({"bias": ["all"]}, "bias=.* is not none, all or lora_only"),
    "flag": ({"use_dora": "yes"}, "use_dora='yes' is not true or false"),
    "init": ({"init_lora_weights": {"a": 1}}, "init_lora_weights=.* is neither a name nor true or false"),
    "layers": ({"layers_to_transform": [-1]}, "layers_to_transform=.* is neither a layer's number nor a list"),
    "tokens": ({"trainable_token_indices": [10**400]}, "trainable_token_indices=.* is neither a list of token ids"),
    "token": ({"trainable_token_indices": [10**9]}, "has 1000000000, but the base has"),
}


@pytest.mark.launch  # patterns are matched in a separate process
@pytest.mark.parametrize("case", LARGE_CONFIGS)
def test_large_or_mistyped_config_raises_at_once(
    plain: Path, tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    values, message = LARGE_CONFIGS[case]
    change(plain, **values)
    began = time.process_time()
    with pytest.raises(ArtifactError, match=message):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), plain)
    with pytest.raises(ArtifactError, match="layer_replication" if case == "replication" else message):
        merge_adapter(plain, tmp_path / "merged", base=str(tiny_model()), verify=False)
    assert time.process_time() - began < 5
    assert not (tmp_path / "merged").exists()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STORED = {"float8": torch.float8_e4m3fn, "float8 scale": torch.float8_e8m0fnu, "bool": torch.bool, "int": torch.int8}


@pytest.mark.parametrize("case", STORED)
def test_dtype_that_no_adapter_has_raises(plain: Path, case: str) -> None:
    tensors = load_file(plain / WEIGHTS)
    save_file(tensors | {KEY: tensors[KEY].to(STORED[case])}, plain / WEIGHTS)
    with pytest.raises(ArtifactError, match=rf"q_proj\.lora_A\.weight is stored as {str(STORED[case])[6:]}; save the"):
        read_adapter(plain)


PICKLED_CASES = [
    "meta",
    "sparse",
    "compressed rows",
    "nested",
    "quantized",
    "complex",
    "expanded",
    "empty",
    "no tensor",
]


def pickled_tensors() -> dict[str, Any]:
    ones = torch.ones(4, 32)
    return {
        "meta": ones.to("meta"),
        "sparse": ones.to_sparse(),
        "compressed rows": ones.to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
        "complex": ones.to(torch.complex64),
        "expanded": torch.ones(1).expand(10**12, 32),
        "empty": torch.ones(0, 32),
        "no tensor": 3,
    }


@pytest.mark.filterwarnings("ignore")  # of torch, about prototypes
@pytest.mark.parametrize("case", PICKLED_CASES)
def test_pickled_tensor_that_no_adapter_has_raises(plain: Path, case: str) -> None:
    tensors = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()
    torch.save(tensors | {KEY: pickled_tensors()[case]}, plain / PICKLED)
    with pytest.raises(ArtifactError, match=r"is not a dense floating-point tensor|dict of tensors|more than tensors"):
        read_adapter(plain)


def test_tensors_that_share_their_data_raise(plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    shared = torch.ones(1000, 32)
    torch.save({f"tensor {number}": shared[:] for number in range(100)}, plain / PICKLED)
    with pytest.raises(ArtifactError, match="its tensors share their data, and have 12,800,000 bytes"):
        read_adapter(plain)


def test_tensor_without_dimensions_raises(plain: Path, base: Any) -> None:
    save_file(load_file(plain / WEIGHTS) | {KEY: torch.tensor(1.0)}, plain / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"has shape \(\), the model expects \(4, 32\)"):
        load_adapter(base, plain)


@pytest.mark.parametrize("pickled", [False, True])
def test_adapter_without_tensors_raises(plain: Path, tmp_path: Path, pickled: bool) -> None:
    if pickled:
        (plain / WEIGHTS).unlink()
        torch.save({}, plain / PICKLED)
    else:
        save_file({}, plain / WEIGHTS)
    for command in (merge_adapter, functools.partial(export_adapter, format="peft")):
        with pytest.raises(ArtifactError, match="contains no tensors"):
            command(plain, tmp_path / "out")


def forged_header(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(64)


A_TENSOR = b'"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}'
FORGED_FILES = {
    "empty": (b"", "cannot be read"),
    "a name twice": (forged_header(b"{" + A_TENSOR + b", " + A_TENSOR + b"}"), "a is in its header twice"),
    "a key twice": (
        forged_header(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [4], "data_offsets": [0, 16]}}'),
        "dtype is in its header twice",
    ),
    "a header of an exabyte": (forged_header(b"{}", 10**18), "its header has 1,000,000,000,000,000,000 bytes"),
    "10^12 rows": (
        forged_header(b'{"a": {"dtype": "F32", "shape": [1000000000000, 4], "data_offsets": [0, 64]}}'),
        "cannot be read",
    ),
    "a size that overflows": (
        forged_header(b'{"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, 64]}}' % 10**400),
        "cannot be read",
    ),
    "data out of the file": (
        forged_header(b'{"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}'),
        "cannot be read",
    ),
    "nested": (forged_header(b"[" * 100_000), "cannot be read"),
    "many tensors": (
        forged_header(
            b"{"
            + b",".join(b'"%d": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}' % n for n in range(100_002))
            + b"}"
        ),
        "it has 100,002 tensors, more than 100,000",
    ),
    "no JSON": (forged_header(bytes(100)), "cannot be read"),
}


@pytest.mark.parametrize("case", FORGED_FILES)
def test_forged_safetensors_raise(plain: Path, case: str) -> None:
    data, message = FORGED_FILES[case]
    (plain / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        read_adapter(plain)


def write_sparse(adapter: Path) -> None:
    """Write a file of holes, which takes no space, and claims 8 TB of zeros."""
    size = 8 * 10**12
    header = json.dumps({KEY: {"dtype": "F32", "shape": [10**12, 2], "data_offsets": [0, size]}}).encode()
    (adapter / WEIGHTS).write_bytes(forged_header(header)[:-64])
    os.truncate(adapter / WEIGHTS, 8 + len(header) + size)


def test_sparse_file_raises(plain: Path) -> None:
    write_sparse(plain)
    with pytest.raises(ArtifactError, match="are on disk"):
        read_adapter(plain)


def write_compressed_pickle(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "stored.bin")
    with zipfile.ZipFile(adapter / "stored.bin") as source, zipfile.ZipFile(adapter / PICKLED, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)


def test_compressed_pickle_raises(plain: Path) -> None:
    write_compressed_pickle(plain)
    with pytest.raises(ArtifactError, match="it is compressed, so it could expand to any size"):
        read_adapter(plain)


@pytest.mark.parametrize("is_archive", [True, False])
def test_pickle_with_too_many_instructions_raises(
    plain: Path, monkeypatch: pytest.MonkeyPatch, is_archive: bool
) -> None:
    (plain / WEIGHTS).unlink()
    monkeypatch.setattr(tensor_files, "MAX_PICKLE_BYTES", 10_000)
    monkeypatch.setattr(tensor_files, "MAX_PICKLE_READS", 10_000)
    torch.save({"a": [0] * 20_000}, plain / PICKLED, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(ArtifactError, match=r"list of tensors (has .* bytes, more than|is too long)"):
        read_adapter(plain)


def test_pickles_of_both_formats_are_read(plain: Path) -> None:
    tensors = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()
    for is_archive in (True, False):
        torch.save(tensors, plain / PICKLED, _use_new_zipfile_serialization=is_archive)
        read = read_adapter(plain)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["x" * 2000, "line\nline", "\x1b[2J"])
def test_name_that_no_tensor_has_raises(plain: Path, name: str) -> None:
    save_file({name: torch.ones(2)}, plain / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"' is not the name of a tensor") as caught:
        read_adapter(plain)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_pipe_in_place_of_a_file_raises(plain: Path, name: str) -> None:
    (plain / name).unlink()
    os.mkfifo(plain / name)
    with pytest.raises(ArtifactError, match=r"is not an adapter: .* is missing"):
        read_adapter(plain)


# Base models with an index that points outside their folder


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", 3])
def test_index_that_points_outside_its_folder_raises(tmp_path: Path, file: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": file}})
    )
    with pytest.raises(ArtifactError, match="outside its folder"):
        check_index_paths(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("make_pickle", [plain_pickle, torch_pickle])
def test_base_model_with_a_pickle_raises(
    make_config: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    file: str,
    make_pickle: Callable[[Path], bytes],
) -> None:
    base, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(tiny_model(), base)
    if file.endswith(".bin"):
        (base / "model.safetensors").unlink()
    (base / file).write_bytes(make_pickle(canary))
    with pytest.raises(UserError, match=str(base)):
        run_training(make_config(model={"name_or_path": str(base)}))
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_training_with_such_an_index_raises(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="outside its folder"):
        run_training(make_config(model={"name_or_path": str(base)}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_malformed_index_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not a weight index"):
        check_index_paths(tmp_path)


def test_run_config_cannot_create_python_objects(tmp_path: Path, finished: RunConfig) -> None:
    """YAML tags for Python objects are not supported."""
    file = tmp_path / "evil.yaml"
    file.write_text(config_to_yaml(finished) + f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'canary'}']\n")
    assert train.main(["--config", str(file)]) == 2
    assert not (tmp_path / "canary").exists()


# Supported pickles: base models and adapters of older tools


@pytest.mark.parametrize("make_pickle", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("target", ["adapter", "base", "shard"])
def test_code_in_a_pickled_model_is_not_run(
    adapter: Path, tmp_path: Path, target: str, make_pickle: Callable[[Path], bytes]
) -> None:
    canary, base = tmp_path / "canary", tmp_path / "base"
    shutil.copytree(json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"], base)
    file = {"adapter": adapter / "adapter_model.bin", "base": base / "pytorch_model.bin"}.get(target)
    if file is None:
        file = base / "pytorch_model-00001-of-00001.bin"
        weight_map = dict.fromkeys(load_file(base / "model.safetensors"), file.name)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (adapter / WEIGHTS if target == "adapter" else base / "model.safetensors").unlink()
    file.write_bytes(make_pickle(canary))
    with pytest.raises(ArtifactError, match="code in a pickle is not run"):
        merge_adapter(adapter, tmp_path / "merged", base=str(base))
    assert not canary.exists()
    assert not (tmp_path / "merged").exists()


def test_pickle_without_tensors_raises(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).unlink()
    for value in ([torch.ones(2)], {"a": 3}, {3: torch.ones(2)}):
        torch.save(value, adapter / "adapter_model.bin")
        with pytest.raises(ArtifactError, match="should contain a dict of tensors by name"):
            merge_adapter(adapter, tmp_path / "merged")
    (adapter / "adapter_model.bin").write_bytes(b"PK no archive")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin"):
        merge_adapter(adapter, tmp_path / "merged")
