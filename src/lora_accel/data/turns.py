"""Find the text in which an answer is trained: the prompt that inference feeds, then what the model has to generate.

Two renderings define it. P is the conversation before the answer with the generation prompt: what `generate` feeds.
R is the conversation up to the answer. What R has after P, up to the end of the turn, is supervised.

Where the rendering of the complete row starts with both, the answer is trained in the row's own example, together with
the other answers. Some templates render an earlier answer differently (without its reasoning, with another end token):
such an answer is trained in an example of its own, the text of R. Some generation prompts open or close a thought that
R lacks: then the text is P, followed by what R has from the answer on.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_accel.data.formats import Conversation, UnusableRow
from lora_accel.data.spans import Span, split_reasoning
from lora_accel.data.template import ChatTemplate, Rendered
from lora_accel.data.tools import check_call

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
LONG = 64
"""Messages above which the renderings for an answer contain only the messages next to it: each costs time in
proportion to its length, so a row of n messages would take n²."""
WINDOW = 16
"""Number of these messages."""


class Turn(NamedTuple):
    """An answer in the text that it is trained in."""

    text: str
    """The text, to the end of the turn or, in a row's own example, of the row."""
    untrusted: list[Span]
    """Spans of message text, in order."""
    span: Span
    """What is supervised: from the end of the prompt to the end of the turn."""
    content: Span | None
    """The answer's content."""
    is_closed: bool
    """Whether the text ends the turn with a special token. Otherwise EOS is added."""
    message_spans: list[list[Span]]
    """The spans of each message's text, at least of those before the answer."""
    notes: tuple[str, ...] = ()
    is_rendered: bool = True
    """Whether a template wrote the text."""


def find_turn_in_row(
    template: ChatTemplate, conversation: Conversation, rendered: Rendered, untrusted: list[Span], number: int
) -> Turn | None:
    """Return an answer in the text of its row; None if it has to be trained in another text.

    Args:
        rendered: the complete row.
        untrusted: the spans of its messages.
        number: 0-based index of the answer.

    Raises:
        UnusableRow: the template rejects the prompt, or does not write a tool call.
    """
    if number in rendered.altered:
        return None
    is_last = number == len(conversation.messages) - 1
    text_end = rendered.end_of(number) or _history_end(rendered, number)
    located = _last_texts(template, conversation, rendered, number, text_end)
    if located is None:
        return None
    prompt, last, shift, checked = located
    _check_thought(template, conversation, prompt, number)
    start = len(prompt) + shift
    if not last.startswith(prompt) or (start > text_end and rendered.message_spans[number]):
        return None
    tail = prompt[max(0, _history_end(rendered, number) - shift) :]
    if _leaves_thought_open(template, conversation, number, tail, last[len(prompt) :]):
        return None
    has_calls = bool(conversation.messages[number].tool_calls)
    end, is_closed = _end_of_turn(template, last, max(text_end - shift, len(prompt)), tail, has_calls=has_calls)
    if len(prompt) < checked or last[checked:end] != rendered.text[checked + shift : end + shift]:
        return None
    check_call(conversation.messages[number], number, last[text_end - shift : end])
    end += shift
    if not is_closed and not is_last:
        following = _special_after(template, rendered, number, end)
        if following is None:
            return None
        end, is_closed = following.end, True
    span, content, spans = Span(start, end), rendered.spans[number], rendered.message_spans
    return Turn(rendered.text, untrusted, span, content, is_closed, spans, rendered.notes)


def find_turn_alone(template: ChatTemplate, conversation: Conversation, number: int) -> Turn:
    """Return an answer in a text of its own.

    Args:
        number: 0-based index of the answer.

    Raises:
        UnusableRow: the template rejects the conversation, or its prompt and its answer do not fit together.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    prompt = template.prompt(before)
    rendered = template.render(conversation.messages[: number + 1], conversation.tools, conversation.template_kwargs)
    content = rendered.spans[number]
    _check_thought(template, conversation, prompt, number)
    tail, following = prompt[_history_end(rendered, number) :], rendered.text[len(prompt) :]
    is_open = _leaves_thought_open(template, conversation, number, tail, following)
    if rendered.text.startswith(prompt) and not is_open:
        if number in rendered.altered:
            raise _altered_answer(template, rendered.altered[number], number)
        history, start, inserted, notes, untrusted = rendered, len(prompt), "", rendered.notes, rendered.untrusted
        if any(span.start < start for span in rendered.message_spans[number]):
            raise UnusableRow(f"{template.label} writes a part of message {number + 1} into its prompt")
    else:
        history = template.render_prompt(before)
        rendered, start, inserted, notes = _join(template, conversation, history, rendered, number)
        content, untrusted = rendered.spans[number], history.untrusted
        if inserted and (reasoning := _reasoning(conversation, number)):
            untrusted.append(Span(len(prompt), len(prompt) + len(reasoning)))
        shift = len(prompt) + len(inserted) - start
        untrusted += [Span(a + shift, b + shift) for a, b in rendered.message_spans[number] if a >= start]
        content = Span(content.start + shift, content.end + shift) if content else None
    text_end = max(rendered.end_of(number), start)
    has_calls = bool(conversation.messages[number].tool_calls)
    header = prompt[_history_end(history, number) :]
    end, is_closed = _end_of_turn(template, rendered.text, text_end, header, has_calls=has_calls)
    text = prompt + inserted + rendered.text[start:end]
    check_call(conversation.messages[number], number, rendered.text[text_end:end])
    history.check_calls(conversation.messages, 0, number)
    return Turn(text, untrusted, Span(len(prompt), len(text)), content, is_closed, history.message_spans, notes)


def _altered_answer(template: ChatTemplate, altered: str, number: int) -> UnusableRow:
    return UnusableRow(f"{template.label} {altered} message {number + 1}; another model.chat_template may help")


def _join(
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
    prompt, altered, reasoning = asked.text, rendered.altered.get(number, ""), _reasoning(conversation, number)
    if "text" in altered or (rendered.spans[number] is None and not conversation.messages[number].tool_calls):
        raise _altered_answer(template, altered or "leaves out the text of", number)
    is_closed = _closes_thought(template, conversation, prompt)
    joined = None if is_closed else _join_thought(template, conversation, asked, rendered, number)
    if joined is not None:
        return (*joined, rendered.notes if reasoning else (*rendered.notes, EMPTY_THOUGHT))
    if altered:
        raise _altered_answer(template, altered, number)
    start = None if is_closed else _after_header(template, asked, rendered, number)
    if start is None:
        start = _after_common_text(template, asked, rendered, number)
    return rendered, start, "", rendered.notes


def _join_thought(
    template: ChatTemplate, conversation: Conversation, asked: Rendered, rendered: Rendered, number: int
) -> tuple[Rendered, int, str] | None:
    """Join the reasoning of an answer, or an empty one, to a prompt that opens a thought; None if it does not."""
    prompt, message, reasoning = asked.text, conversation.messages[number], _reasoning(conversation, number)
    thought = next(((a, b) for a, b in THOUGHTS if prompt.rstrip().endswith(a)), None)
    if template.thought_end(conversation):
        # What the template writes after reasoning follows the row's reasoning, or none.
        answer = message._replace(reasoning=reasoning or "reasoning", content=split_reasoning(message.content)[1])
        messages = (*conversation.messages[:number], answer)
        with_thought = template.render(messages, conversation.tools, conversation.template_kwargs)
        spans = with_thought.message_spans[number]
        if number not in with_thought.altered and spans and spans[0] != with_thought.spans[number]:
            head = with_thought.text[: spans[0].start]
            if prompt.startswith(head) and len(head) > _history_end(asked, number):
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
    asked_end, history_end = _history_end(asked, number), _history_end(rendered, number)
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
    history_end = max(_history_end(asked, number), _history_end(rendered, number))
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


def _check_thought(template: ChatTemplate, conversation: Conversation, prompt: str, number: int) -> None:
    """Check that a prompt does not close the thought of an answer whose row has reasoning."""
    if _reasoning(conversation, number) and _closes_thought(template, conversation, prompt):
        raise UnusableRow(
            f"{template.label} closes the thought of answer {number + 1} in its prompt, but the row has reasoning; "
            "model.chat_template_kwargs may open it, such as {enable_thinking: true}"
        )


def _open_thought(text: str) -> tuple[str, str] | None:
    """Return the tags of the thought that a text opens and does not close."""
    return next((pair for pair in THOUGHTS if text.rfind(pair[0]) > text.rfind(pair[1])), None)


def _leaves_thought_open(
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
    if not _reasoning(conversation, number):
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


def _reasoning(conversation: Conversation, number: int) -> str:
    message = conversation.messages[number]
    return message.reasoning or split_reasoning(message.content)[0]


def _last_texts(
    template: ChatTemplate, conversation: Conversation, rendered: Rendered, number: int, text_end: int
) -> tuple[str, str, int, int] | None:
    """Return the prompt of an answer, the text up to the answer, and where both are in the row.

    Above `LONG` messages both are rendered from the messages next to the answer, and located by the text from the last
    message before the answer to the end of the answer.

    Returns:
        The prompt, the text, the position of both in the text of the row, and from which character on they have to be
        the same; None if they are nowhere in the row.
    """
    messages = conversation.messages
    if number < LONG:
        prompt = template.prompt(conversation._replace(messages=messages[:number]), rendered.values[:number])
        if number == len(messages) - 1:
            return prompt, rendered.text, 0, 0
        message = messages[number]
        is_plain = not (message.tool_calls or message.reasoning or conversation.tools or conversation.template_kwargs)
        has_text = bool(rendered.message_spans[number])
        if (
            is_plain
            and has_text
            and template.keeps_answers
            and rendered.text.startswith(template.end_of_turn, text_end)
        ):
            return prompt, rendered.text[: text_end + len(template.end_of_turn)], 0, 0
        last = template.apply(messages[: number + 1], conversation.tools, conversation.template_kwargs)
        return prompt, last, 0, 0
    first = next((i for i in range(number - WINDOW, number) if messages[i].role == "user"), None)
    spans = rendered.message_spans[number - 1]
    if first is None or not spans:
        return None
    system = messages[:1] if messages[0].role == "system" else ()
    window = conversation._replace(messages=(*system, *messages[first:number]))
    prompt = template.prompt(window)
    last = template.apply((*window.messages, messages[number]), conversation.tools, conversation.template_kwargs)
    shared = rendered.text[min(spans).start : text_end]
    position = last.rfind(shared)
    return (prompt, last, text_end - position - len(shared), position) if position >= 0 else None


def _end_of_turn(template: ChatTemplate, text: str, start: int, header: str, *, has_calls: bool) -> tuple[int, bool]:
    """Return where the last message of a text ends its turn, and whether a special token ends it.

    Args:
        start: end of the message's own text.
        header: what follows the last message of its prompt. Some templates write it after every text, also after an
            answer: it begins another turn.
        has_calls: whether the template writes tool calls after the message's text.
    """
    text = text.rstrip() if has_calls else text
    ended = next((token for token in template.end_tokens if header.startswith(token)), "")
    header = header.removeprefix(ended).strip()
    if header and text.rstrip().endswith(header):
        text = text[: max(start, len(text.rstrip()) - len(header))]
    if has_calls:  # no end token can be in a call
        ends = [end for end in (template.end_of_turn, template.tokenizer.eos_token) if end and end in text[start:]]
        end = min([len(text), *(text.index(end, start) + len(end) for end in ends)])
        return end, any(text.endswith(token, start, end) for token in template.end_tokens)
    if template.end_of_turn and text.startswith(template.end_of_turn, start):
        end = start + len(template.end_of_turn)
        return end, any(text.endswith(token, start, end) for token in template.end_tokens)
    specials_end = template.end_of_specials(text, start)
    return (start, False) if specials_end is None else (specials_end, True)


def _special_after(template: ChatTemplate, rendered: Rendered, number: int, end: int) -> Span | None:
    """Return the special token that follows an answer in its row: it opens the next turn, and ends this one."""
    special = template.tokens.first_special(rendered.text, end)
    if special is None or rendered.text[end : special.start].strip():
        return None
    following = (span for spans in rendered.message_spans[number + 1 :] for span in spans)
    is_text = any(span.start < special.end and special.start < span.end for span in following)
    return None if is_text else special


def _history_end(rendered: Rendered, number: int) -> int:
    """Return where the text of the messages before a message ends."""
    return next((end for i in range(number - 1, -1, -1) if (end := rendered.end_of(i))), 0)


def _common_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts, by bisection: comparing characters in Python is slow."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[:middle]) else (low, middle - 1)
    return low
