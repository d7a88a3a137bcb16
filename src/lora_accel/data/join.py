"""Join a prompt to an answer that is rendered after another text, and the thoughts that prompts open or close.

Some generation prompts end with text that the rendered answer does not have before it: they open a thought, or close an
empty one. What a template writes after reasoning, and where an answer starts, is found in its renderings; only the tags
of `THOUGHTS` are known beforehand.
"""

from __future__ import annotations

from lora_accel.data.records import Conversation, UnusableRow
from lora_accel.data.spans import split_reasoning
from lora_accel.data.template import ChatTemplate, Rendered

THOUGHTS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""What opens and closes a thought, in the templates of current model families."""
EMPTY_THOUGHT = "the prompt opens a thought that the row does not have: an empty one is supervised"
"""Note in the ledger."""


def join(
    template: ChatTemplate, conversation: Conversation, asked: Rendered, rendered: Rendered, number: int
) -> tuple[Rendered, int, str, tuple[str, ...]]:
    """Join the prompt to the answer of a rendering that has another text before it.

    Args:
        asked: the prompt.
        rendered: the conversation up to the answer.

    Returns:
        The rendering to use, where the text that follows the prompt starts in it, what has to be inserted before that
        text, and notes.
    """
    prompt, altered, reasoning = asked.text, rendered.altered.get(number, ""), reasoning_of(conversation, number)
    if "text" in altered or (rendered.spans[number] is None and not conversation.messages[number].tool_calls):
        raise altered_answer(template, altered or "leaves out the text of", number)
    is_closed = _closes_thought(template, conversation, prompt)
    joined = None if is_closed else _join_thought(template, conversation, asked, rendered, number)
    if joined is not None:
        return (*joined, rendered.notes if reasoning else (*rendered.notes, EMPTY_THOUGHT))
    if altered:
        raise altered_answer(template, altered, number)
    start = None if is_closed else _after_header(template, asked, rendered, number)
    if start is None:
        start = _after_common_text(template, asked, rendered, number)
    return rendered, start, "", rendered.notes


def _join_thought(
    template: ChatTemplate, conversation: Conversation, asked: Rendered, rendered: Rendered, number: int
) -> tuple[Rendered, int, str] | None:
    """Join the reasoning of an answer, or an empty one, to a prompt that opens a thought; None if it does not."""
    prompt, message, reasoning = asked.text, conversation.messages[number], reasoning_of(conversation, number)
    thought = next(((a, b) for a, b in THOUGHTS if prompt.rstrip().endswith(a)), None)
    if template.thought_end(conversation):
        # What the template writes after reasoning follows the row's reasoning, or none.
        answer = message._replace(reasoning=reasoning or "reasoning", content=split_reasoning(message.content)[1])
        messages = (*conversation.messages[:number], answer)
        with_thought = template.render(messages, conversation.tools, conversation.template_kwargs)
        spans = with_thought.message_spans[number]
        if number not in with_thought.altered and spans and spans[0] != with_thought.spans[number]:
            head = with_thought.text[: spans[0].start]
            if prompt.startswith(head) and len(head) > asked.end_before(number):
                return with_thought, spans[0].end, reasoning
    if thought is None:
        return None
    head, content = prompt[: prompt.rindex(thought[0])], rendered.spans[number]
    if not rendered.text.startswith(head):
        return None
    # The DeepSeek-R1 family: the template writes no reasoning. This is what the models write.
    inserted = reasoning + (f"\n{thought[1]}\n\n" if prompt.endswith("\n") else thought[1])
    start = content.start if content else len(head) + _empty_thought_length(rendered.text[len(head) :])
    return rendered, start, inserted


def _after_header(template: ChatTemplate, asked: Rendered, rendered: Rendered, number: int) -> int | None:
    """Return where an answer starts that is rendered after the end of its prompt, from the last special token on.

    An earlier message may be rendered differently there. None = the rendering does not have this text.
    """
    asked_end, history_end = asked.end_before(number), rendered.end_before(number)
    specials = template.tokens.find_specials(asked.text, asked.untrusted)
    header = asked.text[max([asked_end, *(span.start for span in specials[-1:])]) :].rstrip(" ")
    ended = next((token for token in template.end_tokens if header.startswith(token)), "")
    header = header.removeprefix(ended).lstrip() if ended else header  # the end of the turn before is not part of it
    own_start = min((span.start for span in rendered.message_spans[number]), default=0)
    # Before its text, the last one is that of the answer: an empty message has one, too.
    find = rendered.text.rfind if own_start else rendered.text.find
    position = find(header, history_end, own_start or len(rendered.text)) if header else -1
    return position + len(header) if position >= 0 else None


def _after_common_text(template: ChatTemplate, asked: Rendered, rendered: Rendered, number: int) -> int:
    """Return where an answer starts: after the text that it and its prompt have in common.

    The prompt ends with more text there, such as a closed thought. What the answer has of that is not repeated.
    """
    prompt, text = asked.text, rendered.text
    own_start = min((span.start for span in rendered.message_spans[number]), default=len(text))
    common = min(_common_length(prompt, text), own_start)
    history_end = max(asked.end_before(number), rendered.end_before(number))
    tags = [i for pair in THOUGHTS for tag in pair if (i := prompt.find(tag, history_end)) >= 0]
    specials = template.tokens.find_specials
    both = (*specials(prompt, asked.untrusted), *specials(text, rendered.untrusted))
    cut = [span.start for span in both if span.start < common < span.end]  # such as `<|`, with which both begin
    common = min([common, *tags, *cut])
    if common < history_end:
        raise UnusableRow(
            f"{template.label} renders the messages before answer {number + 1} differently than in the prompt of "
            "generate; data.loss_on: last_assistant or another model.chat_template may help"
        )
    if all(_has_words(template, part) for part in (prompt[common:], text[common:own_start])):
        raise UnusableRow(
            f"{template.label} writes another text before answer {number + 1} than its generation prompt; another "
            "model.chat_template may help"
        )
    return common + _empty_thought_length(text[common:])


def _has_words(template: ChatTemplate, text: str) -> bool:
    """Whether a text has letters outside of special tokens and the tags of thoughts."""
    for tag in (tag for pair in THOUGHTS for tag in pair):
        text = text.replace(tag, "")
    for span in reversed(template.tokens.find_specials(text)):
        text = text[: span.start] + text[span.end :]
    return any(letter.isalnum() for letter in text)


def _closes_thought(template: ChatTemplate, conversation: Conversation, prompt: str) -> bool:
    """Whether a prompt ends with a closed thought."""
    prompt = prompt.rstrip()
    closing = template.thought_end(conversation).strip()
    return bool(closing and prompt.endswith(closing)) or prompt.endswith(tuple(closing for _, closing in THOUGHTS))


def check_thought(template: ChatTemplate, conversation: Conversation, prompt: str, number: int) -> None:
    """Check that a prompt does not close the thought of an answer whose row has reasoning."""
    if reasoning_of(conversation, number) and _closes_thought(template, conversation, prompt):
        raise UnusableRow(
            f"{template.label} closes the thought of answer {number + 1} in its prompt, but the row has reasoning; "
            "model.chat_template_kwargs may open it, such as {enable_thinking: true}"
        )


def _open_thought(text: str) -> tuple[str, str] | None:
    """Return the tags of the thought that a text opens and does not close."""
    return next((pair for pair in THOUGHTS if text.rfind(pair[0]) > text.rfind(pair[1])), None)


def leaves_thought_open(
    template: ChatTemplate, conversation: Conversation, number: int, prompt: str, answer: str
) -> bool:
    """Whether a prompt opens a thought that the rendered answer does not continue: it closes or opens none, or closes
    it at once although the row has reasoning.

    Args:
        prompt: the end of the prompt.
        answer: the text after it.
    """
    thought, answer = _open_thought(prompt), answer.lstrip()
    if thought is not None and (thought[1] not in answer or answer.startswith(thought[0])):
        return True
    if not reasoning_of(conversation, number):
        return False
    ends = {template.thought_end(conversation).strip(), thought[1] if thought else ""} - {""}
    return answer.startswith(tuple(ends))


def _empty_thought_length(text: str) -> int:
    """Return the length of a closed thought without content that a text starts with, or of its closing tag alone."""
    for opening, closing in THOUGHTS:
        rest = text.lstrip().removeprefix(opening).lstrip()
        if rest.startswith(closing):
            return len(text) - len(rest.removeprefix(closing).lstrip())
    return 0


def reasoning_of(conversation: Conversation, number: int) -> str:
    message = conversation.messages[number]
    return message.reasoning or split_reasoning(message.content)[0]


def altered_answer(template: ChatTemplate, altered: str, number: int) -> UnusableRow:
    return UnusableRow(f"{template.label} {altered} message {number + 1}; another model.chat_template may help")


def _common_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts, by bisection: comparing characters in Python is slow."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[:middle]) else (low, middle - 1)
    return low
