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

from lora_accel.data.join import altered_answer, check_thought, join, leaves_thought_open, reasoning_of
from lora_accel.data.records import Conversation, UnusableRow
from lora_accel.data.spans import Span
from lora_accel.data.template import ChatTemplate, Rendered
from lora_accel.data.tools import check_call

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
    text_end = rendered.end_of(number) or rendered.end_before(number)
    located = _last_texts(template, conversation, rendered, number, text_end)
    if located is None:
        return None
    prompt, last, shift, checked = located
    check_thought(template, conversation, prompt, number)
    start = len(prompt) + shift
    if not last.startswith(prompt) or (start > text_end and rendered.message_spans[number]):
        return None
    tail = prompt[max(0, rendered.end_before(number) - shift) :]
    if leaves_thought_open(template, conversation, number, tail, last[len(prompt) :]):
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
    check_thought(template, conversation, prompt, number)
    tail, following = prompt[rendered.end_before(number) :], rendered.text[len(prompt) :]
    is_open = leaves_thought_open(template, conversation, number, tail, following)
    if rendered.text.startswith(prompt) and not is_open:
        if number in rendered.altered:
            raise altered_answer(template, rendered.altered[number], number)
        history, start, inserted, notes, untrusted = rendered, len(prompt), "", rendered.notes, rendered.untrusted
        if any(span.start < start for span in rendered.message_spans[number]):
            raise UnusableRow(f"{template.label} writes a part of message {number + 1} into its prompt")
    else:
        history = template.render_prompt(before)
        rendered, start, inserted, notes = join(template, conversation, history, rendered, number)
        content, untrusted = rendered.spans[number], history.untrusted
        if inserted and (reasoning := reasoning_of(conversation, number)):
            untrusted.append(Span(len(prompt), len(prompt) + len(reasoning)))
        shift = len(prompt) + len(inserted) - start
        untrusted += [Span(a + shift, b + shift) for a, b in rendered.message_spans[number] if a >= start]
        content = Span(content.start + shift, content.end + shift) if content else None
    text_end = max(rendered.end_of(number), start)
    has_calls = bool(conversation.messages[number].tool_calls)
    header = prompt[history.end_before(number) :]
    end, is_closed = _end_of_turn(template, rendered.text, text_end, header, has_calls=has_calls)
    text = prompt + inserted + rendered.text[start:end]
    check_call(conversation.messages[number], number, rendered.text[text_end:end])
    history.check_calls(conversation.messages, 0, number)
    return Turn(text, untrusted, Span(len(prompt), len(text)), content, is_closed, history.message_spans, notes)


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
