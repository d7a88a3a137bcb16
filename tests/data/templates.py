"""Small chat templates, one for each structure that public templates have, and tiny tokenizers for them.

Written for these tests. A turn is `<|turn|>role`, a line break, the text and `<|end|>`, unless the structure needs
something else.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|turn|>",
    "<|end|>",
    "<|stop|>",
    "<|call|>",
    "<|text|>",
    "<|text_end|>",
    "<|part|>",
)
"""Special tokens of every tokenizer here."""
ADDED = ("<think>", "</think>", "<call>", "</call>")
"""Added tokens that are not special, as in many tokenizers of reasoning models."""

TURN = "<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
PROMPT = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
THOUGHT = "<think>\n{{ m.reasoning_content }}\n</think>\n\n"
TOOLS = "{% if tools %}<|turn|>system\n{{ tools | tojson }}<|end|>\n{% endif %}"
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}"
    "{% endfor %}"
)
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"


def loop(body: str, prompt: str = PROMPT) -> str:
    """Return a template that renders every message `m` with `body`."""
    return f"{{% for m in messages %}}{body}{{% endfor %}}{prompt}"


def answer(body: str, others: str = TURN) -> str:
    """Return the body of a loop in which answers are rendered differently from the other messages."""
    return f"{{% if m.role == 'assistant' %}}{body}{{% else %}}{others}{{% endif %}}"


def with_prompt(text: str) -> str:
    """Return the generation prompt with a text at its end."""
    return PROMPT.replace("{% endif %}", text + "{% endif %}")


class TemplateCase(NamedTuple):
    """A chat template of one structure."""

    source: str | dict[str, str]
    eos: str = "<|end|>"
    families: str = ""
    """Model families whose templates have this structure."""


TEMPLATES = {
    "plain": TemplateCase(loop(TURN), families="SmolLM2, OLMo 2, Phi 4"),
    "tools": TemplateCase(
        TOOLS + loop(answer(f"<|turn|>assistant\n{{{{ m.content }}}}{CALLS}<|end|>\n")),
        families="Qwen2.5, Granite 4, MiMo",
    ),
    "no_generation_prompt": TemplateCase(
        loop(answer("{{ m.content }}</s>", "<|turn|>{{ m.role }}\n{{ m.content }}<|text|>"), prompt=""),
        eos="</s>",
        families="Mistral Nemo, Phi 4, Orion",
    ),
    "space_before_answer": TemplateCase(
        loop(answer(" {{ m.content }}</s>", "[Q] {{ m.content }} [/Q]"), prompt=""),
        eos="</s>",
        families="Mistral v1 to v3",
    ),
    "strips_content": TemplateCase(
        loop("<|turn|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n"), families="Llama 3.1, Gemma 2"
    ),
    "system_in_first_user": TemplateCase(
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        + loop(
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
            "{% endif %}<|turn|>{{ m.role }}\n{{ first if loop.first }}{{ m.content }}<|end|>\n"
        ),
        families="Gemma 3, Mistral v1",
    ),
    "system_in_last_user": TemplateCase(
        "{% set rest = messages | rejectattr('role', 'equalto', 'system') | list %}"
        "{% set system = messages | selectattr('role', 'equalto', 'system') | list %}"
        "{% for m in rest %}<|turn|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'user' and system %}{{ system[0].content }}\n\n{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}" + PROMPT,
        families="Mistral v3, Mistral Nemo",
    ),
    "date_in_system": TemplateCase(
        "<|turn|>system\n{{ strftime_now('%d %B %Y') }}<|end|>\n" + loop(TURN), families="SmolLM3, gpt-oss, Granite 3.3"
    ),
    "closes_thought": TemplateCase(
        loop(TURN, with_prompt("<think>\n\n</think>\n\n")), families="Gemma 4 31B, QwQ, EXAONE 4"
    ),
    "closes_thought_before_wrapped_answer": TemplateCase(
        loop(answer("<|turn|>assistant<|text|>{{ m.content }}<|text_end|><|end|>"), "").replace("\n<|end|>", "<|end|>")
        + "{% if add_generation_prompt %}<|turn|>assistant<|part|><|stop|>{% endif %}",
        families="Command R7B",
    ),
    "opens_thought": TemplateCase(
        loop(
            answer("<|turn|>assistant\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|end|>\n"),
            with_prompt("<think>\n"),
        ),
        families="DeepSeek R1 and its distilled models",
    ),
    "opens_thought_of_reasoning": TemplateCase(
        TOOLS
        + loop(
            answer(
                f"<|turn|>assistant\n{{% if m.reasoning_content %}}{THOUGHT}{{% endif %}}{{{{ m.content }}}}{CALLS}"
                "<|end|>\n"
            ),
            with_prompt("<think>\n"),
        ),
        families="MiniMax M2",
    ),
    "opens_thought_written_differently": TemplateCase(
        TOOLS
        + loop(
            answer(
                "<|turn|>assistant\n{{ '<think>\n' + m.reasoning_content + '\n</think>\n' if m.reasoning_content else "
                f"'<think></think>' }}}}{{{{ m.content }}}}{CALLS}<|end|>\n"
            ),
            with_prompt("<think>\n"),
        ),
        families="Nemotron 3",
    ),
    "opens_thought_of_last_answer": TemplateCase(
        loop(
            answer("<|turn|>assistant\n{{ '<think>\n' if loop.last }}{{ m.content }}<|end|>\n"),
            with_prompt("<think>\n"),
        ),
        families="Nemotron Nano 2",
    ),
    "opens_thought_and_writes_an_empty_one": TemplateCase(
        loop(
            answer("<|turn|>assistant\n<think>\n\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip() }}<|end|>\n"),
            with_prompt("<think>\n"),
        ),
        families="EXAONE 4, DeepSeek V3.1",
    ),
    "opens_thought_in_words": TemplateCase(
        loop(
            answer(
                "<|turn|>assistant\n{{ m.reasoning_content + '\nso\n' if m.reasoning_content }}{{ m.content }}<|end|>\n"
            ),
            with_prompt("it is why\n"),
        ),
        families="Apriel",
    ),
    "swaps_thought_tags": TemplateCase(
        TOOLS
        + loop(
            answer(
                "<|turn|>assistant\n{{ '<think>' + m.reasoning_content if m.reasoning_content }}</think>"
                f"{{{{ m.content }}}}{CALLS}<|end|>\n"
            ),
            with_prompt("<think>"),
        ),
        families="GLM 4.7, Spark 2.5",
    ),
    "opens_thought_in_special_tokens": TemplateCase(
        loop(
            answer(
                "<|turn|>assistant{% if m.reasoning_content %}<|part|>{{ m.reasoning_content }}<|stop|>{% endif %}"
                "<|text|>{{ m.content }}<|text_end|><|end|>"
            ),
            "{% if add_generation_prompt %}<|turn|>assistant<|part|>{% endif %}",
        ),
        families="Command A Reasoning, Cohere 2 MoE",
    ),
    "thought_only_last": TemplateCase(
        LAST_QUESTION
        + TOOLS
        + loop(
            answer(
                "<|turn|>assistant\n{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
                f"{THOUGHT}{{% endif %}}{{{{ m.content }}}}{CALLS}<|end|>\n"
            )
        ),
        families="Qwen3",
    ),
    "opens_thought_only_last": TemplateCase(
        LAST_QUESTION
        + TOOLS
        + loop(
            answer(
                f"<|turn|>assistant\n{{% if loop.index0 > ns.last %}}{THOUGHT}{{% endif %}}"
                f"{{{{ m.content }}}}{CALLS}<|end|>\n"
            ),
            with_prompt("<think>\n"),
        ),
        families="Qwen3.5, StepFun 3.5",
    ),
    "kwargs_enable_thinking": TemplateCase(
        loop(
            answer(
                "<|turn|>assistant\n{% if m.reasoning_content or enable_thinking is false %}"
                f"{THOUGHT}{{% endif %}}{{{{ m.content }}}}<|end|>\n"
            ),
            with_prompt("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        ),
        families="Qwen3, SmolLM3, GLM 4.5",
    ),
    "reasoning_channel": TemplateCase(
        loop(
            answer(
                "{% if m.reasoning_content and loop.last %}<|turn|>assistant<|part|>think<|text|>"
                "{{ m.reasoning_content }}<|end|>{% endif %}"
                "<|turn|>assistant<|part|>final<|text|>{{ m.content }}{{ '<|stop|>' if loop.last else '<|end|>' }}",
                "<|turn|>{{ m.role }}<|text|>{{ m.content }}<|end|>",
            ),
            "{% if add_generation_prompt %}<|turn|>assistant{% endif %}",
        ),
        eos="<|stop|>",
        families="gpt-oss",
    ),
    "other_end_in_history": TemplateCase(
        loop(answer("<|turn|>assistant\n{{ m.content }}{{ '<|stop|>' if loop.last else '<|end|>' }}\n")),
        eos="<|stop|>",
        families="gpt-oss",
    ),
    "eos_after_last_turn": TemplateCase(
        loop(TURN, "{% if add_generation_prompt %}<|turn|>assistant\n{% else %}{{ eos_token }}{% endif %}"),
        eos="</s>",
        families="Phi 3, Phi 3.5",
    ),
    "no_closing_token": TemplateCase(
        loop("<|turn|>{{ m.role }}\n{{ m.content }}", "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"),
        eos="</s>",
        families="GLM 4 to 4.7",
    ),
    "closing_token_in_history": TemplateCase(
        loop(answer("<|turn|>assistant\n{{ m.content }}{{ '<|end|>\n' if not loop.last }}")),
        families="Apertus, Apriel, Hunyuan",
    ),
    "several_closing_tokens": TemplateCase(
        loop(answer("<|turn|>assistant\n{{ m.content }}<|text_end|>use<|end|>\n")),
        families="Kimi K3, Cohere 2, Command A",
    ),
    "next_prompt_after_answer": TemplateCase(
        TOOLS
        + loop(answer(f"<|turn|>assistant\n{{{{ m.content }}}}{CALLS}<|end|>\n"), prompt="{{ '<|turn|>assistant\n' }}"),
        families="Command A, Command R7B",
    ),
    "json_tool_results": TemplateCase(
        TOOLS
        + loop(
            "{% if m.role == 'tool' %}<|turn|>tool\n{{ m.content | tojson }}<|end|>\n{% else %}"
            + answer(f"<|turn|>assistant\n{{{{ m.content }}}}{CALLS}<|end|>\n")
            + "{% endif %}"
        ),
        families="Llama 3.1 to 4, gpt-oss, EXAONE 4",
    ),
    "arguments_as_text": TemplateCase(
        TOOLS
        + loop(
            answer(
                "<|turn|>assistant\n{{ m.content }}{% for c in m.tool_calls or [] %}"
                "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}<|end|>\n"
            )
        ),
        families="DeepSeek V3, functionary",
    ),
    "content_none_with_calls": TemplateCase(
        TOOLS
        + loop(
            answer(
                f"<|turn|>assistant\n{{% if m.content is none %}}{CALLS}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
                "<|end|>\n"
            )
        ),
        families="DeepSeek R1",
    ),
    "answer_continues_after_result": TemplateCase(
        TOOLS
        + loop(
            "{% if m.role == 'assistant' %}{% if not loop.first and messages[loop.index0 - 1].role != 'tool' %}"
            "<|turn|>assistant\n{% endif %}{{ m.content }}"
            f"{CALLS}{{{{ '<|call|>' if m.tool_calls else '<|end|>' }}}}"
            "{% elif m.role == 'tool' %}<|part|>{{ m.content }}<|part|>{% else %}<|turn|>{{ m.role }}\n{{ m.content }}"
            "<|end|>{% endif %}",
            "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn|>assistant\n{% endif %}",
        ),
        families="Gemma 4, DeepSeek V3.1",
    ),
    "line_break_after_earlier_result": TemplateCase(
        TOOLS
        + loop(
            "{% if m.role == 'tool' %}<|turn|>tool\n{{ m.content }}{{ '\n' if not loop.last }}<|end|>\n{% else %}"
            + answer(f"<|turn|>assistant\n{{{{ m.content }}}}{CALLS}<|end|>\n")
            + "{% endif %}"
        ),
        families="Hermes 2 Pro, Hermes 3",
    ),
    "named_tool_use": TemplateCase(
        {
            "default": loop(TURN),
            "tool_use": "<|turn|>system\nuse {% for t in tools %}{{ t.function.name }}{% endfor %}<|end|>\n"
            + loop(answer(f"<|turn|>assistant\n{{{{ m.content }}}}{CALLS}<|end|>\n")),
        },
        families="Hermes, Command R",
    ),
    "drops_last_answer": TemplateCase(
        loop(answer("{% if not loop.last %}<|turn|>assistant\n{{ m.content }}<|end|>\n{% endif %}")),
        families="YandexGPT 5",
    ),
}

WORDS = "why blue and red be brief the sky a rose it is sunny hmm light dark call weather city Paris temp 20 tool use"
TEXTS = [WORDS, "user assistant system tool think final\n\n", '{"city": "Paris"} "name" "arguments"', "[Q] [/Q]"]


@functools.cache
def tokenizer_json(kind: str) -> str:
    """Return a trained tokenizer as JSON: `bytes` as GPT-2's, `spaces` with SentencePiece's marks and byte fallback."""
    specials = list(SPECIALS)
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS * 20, trainer)
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["▁" + text.replace(" ", "▁") for text in TEXTS] * 20, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = json.loads(tokenizer.to_str())
    vocabulary = config["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    config["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    config["pre_tokenizer"] = None
    return json.dumps(config)


def tokenizer_of(name: str, kind: str = "bytes", **options: Any) -> PreTrainedTokenizerFast:
    """Return a tiny tokenizer with one of the templates.

    Args:
        kind: `bytes` or `spaces`.
    """
    case = TEMPLATES[name]
    names = {"eos_token": case.eos, "bos_token": "<s>", "pad_token": case.eos, "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json(kind)), **(names | options))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer.chat_template = case.source
    return tokenizer
