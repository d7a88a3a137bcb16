"""Check that adapters made by older versions of PEFT give PEFT's own logits here. Needs the network, so not in CI.

For each version an environment is created that uses this one's torch, and tiny random models with adapters of several
kinds are saved in it, together with PEFT's logits. Here each adapter is loaded (as generate, evaluate and chat do),
merged, and trained for a step, and the results are compared with PEFT's.

    python scripts/check_interchange.py FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

VERSIONS = {
    "0.10.0": ("transformers==4.44.2", "tokenizers==0.19.1", "huggingface_hub==0.36.0"),
    "0.13.2": ("transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.36.0"),
    "0.17.1": ("transformers==4.56.2", "tokenizers==0.22.1", "huggingface_hub==0.36.0"),
}
"""PEFT's version -> what is installed with it."""
HERE = "here"
"""Names the versions of this environment in the table."""
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "bias-all": ("qwen2", {"bias": "all"}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "resized": ("llama-resized", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized-lora": ("llama-resized", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "fan-in-fan-out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "pickle": ("llama", {}),
}
"""Name -> base and options of LoraConfig."""
VOCABULARY, RESIZED = 96, 110
MAKE = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

folder, adapters, vocabulary, resized = Path(sys.argv[1]), *json.loads(sys.argv[2])
sizes = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ids = torch.arange(5, 29).reshape(2, 12)
for name, (base, options) in adapters.items():
    family = base.split("-")[0]
    extra = {"num_local_experts": 4} if family == "mixtral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **extra)).eval()
    model.save_pretrained(folder / "bases" / family)
    model = AutoModelForCausalLM.from_pretrained(folder / "bases" / family)
    if base.endswith("-resized"):
        model.resize_token_embeddings(resized)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | options
    if "experts" in name and not any("experts.0.w1" in module for module, _ in model.named_modules()):
        options["target_modules"] = ["q_proj"]
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(**options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        logits = model(ids).logits
    keywords = {"safe_serialization": False} if name == "pickle" else {}
    try:
        model.save_pretrained(folder / "adapters" / name, **keywords)
    except TypeError:  # newer versions write no pickles
        model.save_pretrained(folder / "adapters" / name)
    save_file({"logits": logits.contiguous()}, folder / "adapters" / f"{name}.logits.safetensors")
"""
"""Program that saves the bases, the adapters and PEFT's logits. It runs with every version."""


def make_environment(folder: Path, version: str) -> Path:
    """Create an environment with a version of PEFT; return its Python. Whatever it lacks is taken from this one."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "fallback.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        packages = [f"peft=={version}", *VERSIONS[version]]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *packages]
        subprocess.run(command, check=True)
    return python


def make_adapters(python: Path, folder: Path) -> None:
    """Save bases and adapters with the versions of an environment."""
    arguments = json.dumps([ADAPTERS, VOCABULARY, RESIZED])
    subprocess.run([str(python), "-W", "ignore", "-c", MAKE, str(folder), arguments], check=True)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token per character, for merged models and their verification."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [chr(number) for number in range(32, 32 + VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", eos_token="!").save_pretrained(folder)


def compare(folder: Path, name: str) -> list[str]:
    """Return the largest differences of an adapter's logits from PEFT's: loaded, merged, and after a step."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from lora_accel import load_adapter, merge_adapter

    family = ADAPTERS[name][0].split("-")[0]
    base, adapter = folder / "bases" / family, folder / "adapters" / name
    expected = load_file(folder / "adapters" / f"{name}.logits.safetensors")["logits"]
    ids = torch.arange(5, 29).reshape(2, 12)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model.eval()(ids).logits
        return output

    def after_a_step(model: torch.nn.Module) -> torch.Tensor:
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        return logits(model)

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    plain = load_base()
    if ADAPTERS[name][0].endswith("-resized"):
        plain.resize_token_embeddings(RESIZED, mean_resizing=False)
    plain = PeftModel.from_pretrained(plain, adapter, is_trainable=True).eval()
    merged = folder / "merged" / name
    merge_adapter(adapter, merged, base=str(base), overwrite=True)
    pairs = [
        (logits(plain), expected),
        (logits(load_adapter(load_base(), adapter)), expected),
        (logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)), expected),
        (after_a_step(load_adapter(load_base(), adapter, trainable=True).eval()), after_a_step(plain)),
    ]
    return [f"{(ours - theirs).abs().max():.1e}" for ours, theirs in pairs]


def main() -> None:
    """Compare every kind of adapter of every version; print a table of largest differences of logits."""
    folder = Path(sys.argv[1]).resolve()
    print(f"{'PEFT':8} {'adapter':16} {'PEFT here':>10} {'loaded':>10} {'merged':>10} {'step':>10}")
    for version in (*VERSIONS, HERE):
        made = folder / version
        python = Path(sys.executable) if version == HERE else make_environment(made / "environment", version)
        make_adapters(python, made)
        for family in {base.split("-")[0] for base, _ in ADAPTERS.values()}:
            save_tokenizer(made / "bases" / family)
        for name in ADAPTERS:
            differences = " ".join(f"{difference:>10}" for difference in compare(made, name))
            print(f"{version:8} {name:16} {differences}", flush=True)


if __name__ == "__main__":
    main()
