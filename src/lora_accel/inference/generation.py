"""Generation of replies, with the chat template of training, or of the base if it replies alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import GREEDY, Dtype, GenerationSection, ModelSection, QuantizationSection
from lora_accel.console import Stage
from lora_accel.data.records import Conversation
from lora_accel.errors import ConfigError
from lora_accel.inference.bases import check_prompts, resolve_section
from lora_accel.inference.models import find_adapters, load_candidates, name_adapters
from lora_accel.inference.prompts import encode_prompts, last_message
from lora_accel.inference.templates import load_base_template, load_template

if TYPE_CHECKING:
    import torch

    from lora_accel.data.template import ChatTemplate


def generate(
    prompts: Sequence[str | Conversation],
    *,
    adapters: Sequence[Path] = (),
    base: str | None = None,
    merged: Path | None = None,
    compare: bool = False,
    system: str | None = None,
    raw: bool | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    sampling: GenerationSection = GREEDY,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
) -> list[dict[str, str]]:
    """Generate a reply to each prompt with each adapter, using the chat template that the adapter was trained with.

    Without adapters the base replies alone, with its own chat template.

    Args:
        prompts: user messages, or conversations that end with a message to reply to.
        adapters: adapter folders. The base and the merged model use the chat template of the first one.
        base: Hub id or folder to use instead of the base that the adapters name, or without adapters.
        merged: folder of a merged model, which replies too.
        compare: whether the base alone replies too.
        system: system message for prompts without one.
        raw: whether prompts are passed without a chat template; None = as in training.
        batch_size: number of prompts per batch.
        max_new_tokens: maximum length of a reply.
        sampling: how tokens are chosen.
        dtype: compute dtype; auto = as stored, or float32 where the device only emulates that dtype.
        trust_remote_code: whether to run the base's own code.
        force: whether to accept a base that an adapter was not trained on, and to ignore options of an adapter that the
            installed PEFT does not know.

    Returns:
        The replies to each prompt by candidate: `base`, `base + adapter` (`base + FOLDER` if there are several),
        `merged`.

    Raises:
        ConfigError: an adapter is given twice, adapters belong to different bases, or there is neither an adapter nor
            a base.
        ArtifactError: an adapter or a model cannot be used.
        DataError: a chat template rejects a prompt.
    """
    names, found = name_adapters(adapters), find_adapters(adapters, merged, force=force)
    folders = dict(zip(names, found, strict=True))
    section = section_of(found, base, dtype, trust_remote_code=trust_remote_code)
    templates = {name: load_template(folder, section) for name, folder in folders.items()}
    templates = templates or {"base": load_base_template(section, raw=raw)}
    prompt_ids = {name: encode_prompts(prompts, template, system, raw) for name, template in templates.items()}
    for name, template in templates.items():
        check_prompts(section, None if compare else folders.get(name), template, prompt_ids[name])
    first = next(iter(templates))
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model, _ in load_candidates(
        section, QuantizationSection(), folders, merged, with_base=compare or not folders, force=force
    ):
        owner = name if name in templates else first
        replies = reply_in_batches(
            name, model, templates[owner], prompt_ids[owner], batch_size, max_new_tokens, sampling
        )
        for answer, reply in zip(answers, replies, strict=True):
            answer[name] = reply
        del model  # frees memory for the merged model
    return answers


def section_of(
    adapters: Sequence[Path], base: str | None, dtype: Dtype, *, trust_remote_code: bool = False
) -> ModelSection:
    """Return the model section of the base of adapters, or of a base alone.

    Raises:
        ConfigError: there is neither an adapter nor a base, or the adapters name different bases.
        ArtifactError: an adapter does not name its base, or the base is not here.
    """
    if adapters:
        return resolve_section(adapters, base, dtype, trust_remote_code=trust_remote_code)
    if base is None:
        raise ConfigError("no model: pass --adapter DIR, or --base MODEL for the base alone")
    return ModelSection(name_or_path=base, dtype=dtype, trust_remote_code=trust_remote_code)


def stream(
    prompts: Sequence[str | Conversation],
    *,
    adapter: Path | None = None,
    base: str | None = None,
    system: str | None = None,
    raw: bool | None = None,
    max_new_tokens: int = 128,
    sampling: GenerationSection = GREEDY,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
) -> None:
    """Print the reply to each prompt token by token, one prompt after the other.

    Args: as in `generate`.

    Raises:
        ConfigError: there is neither an adapter nor a base, or `sampling` has beams.
        ArtifactError: the adapter or its base cannot be used.
        DataError: the chat template rejects a prompt.
    """
    check_streaming(sampling)
    found = find_adapters([adapter] if adapter else [], None, force=force)
    section = section_of(found, base, dtype, trust_remote_code=trust_remote_code)
    template = load_template(found[0], section) if found else load_base_template(section, raw=raw)
    prompt_ids = encode_prompts(prompts, template, system, raw)
    check_prompts(section, found[0] if found else None, template, prompt_ids)
    adapters = dict(zip(["adapter"], found, strict=False))
    for _, model, _ in load_candidates(
        section, QuantizationSection(), adapters, None, with_base=not adapters, force=force
    ):
        for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
            print(f"> {last_message(prompt)}")
            stream_reply(model, template, ids, max_new_tokens, ReplyWriter(template), sampling, number)


def check_streaming(sampling: GenerationSection) -> None:
    """Check that replies can be printed token by token.

    Raises:
        ConfigError: beam search knows the reply only at its end.
    """
    if sampling.num_beams > 1:
        raise ConfigError("--num-beams: a reply of beam search cannot be streamed; leave it out, or leave out --stream")


class ReplyWriter:
    """Streamer for transformers' `generate` that prints a reply token by token."""

    def __init__(self, template: ChatTemplate) -> None:
        self.text = ""
        """The reply so far."""
        self._template = template
        self._ids: list[int] | None = None

    def put(self, ids: torch.Tensor) -> None:
        """Print new tokens. The first call passes the prompt, which is not printed."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        # Print an incomplete character when its other bytes are complete.
        if not self._decoded().endswith("\N{REPLACEMENT CHARACTER}"):
            self._print()

    def end(self) -> None:
        """Print the rest of the reply and a line break."""
        self._print()
        print()

    def _decoded(self) -> str:
        from lora_accel.model.generation import decode_reply

        return decode_reply(self._template.tokenizer, self._ids or [], self._template.end_ids)

    def _print(self) -> None:
        text = self._decoded()
        print(text[len(self.text) :], end="", flush=True)
        self.text = text


def stream_reply(
    model: torch.nn.Module,
    template: ChatTemplate,
    ids: list[int],
    max_new_tokens: int,
    writer: ReplyWriter,
    sampling: GenerationSection = GREEDY,
    number: int = 0,
) -> None:
    """Generate the reply to one prompt and print it while it is generated.

    Args:
        number: of the prompt, from which the draws of sampling are derived.
    """
    from lora_accel.model.generation import generate_replies

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "streamer": writer}
    options |= {"sampling": sampling, "numbers": [number]}
    generate_replies(model, template.tokenizer, [ids], ends=template.end_ids, **options)


def reply_in_batches(
    name: str,
    model: torch.nn.Module,
    template: ChatTemplate,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    sampling: GenerationSection = GREEDY,
) -> list[str]:
    """Generate replies in batches of prompts of similar length, which needs little padding.

    Args:
        name: name of the model, for the progress line.
        prompts: token ids.
    """
    from lora_accel.model.generation import generate_replies

    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    replies = [""] * len(prompts)
    with Stage(f"{name}: replies to {len(prompts):,} prompts") as stage:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [prompts[number] for number in numbers]
            texts = generate_replies(
                model,
                template.tokenizer,
                batch,
                ends=template.end_ids,
                sampling=sampling,
                numbers=numbers,
                max_new_tokens=max_new_tokens,
            )
            for number, text in zip(numbers, texts, strict=True):
                replies[number] = text
            stage.note(f"({start + len(batch):,} done)")
    return replies
