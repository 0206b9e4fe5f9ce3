"""
Conversations of chat records, as a checkpoint's chat template writes them.

A record has messages (messages.py), and what else the template asks for by name, such as "tools".
conversations() gives its text in pieces, of which what the assistant says counts in the
loss; unused() tells what of it the template does not write.
"""

import re

from finetune.data.messages import as_json, key_of, messages_of, plain


class Rewritten(SystemExit):
    """A chat template writes a turn otherwise once others follow."""


def conversations(enc, messages, fields=None):
    """Conversations of a record, each as conversation() gives it: one, or one an answer.

    Some templates write an earlier turn otherwise once a later one follows: Qwen3's leaves out
    what was thought. Then each answer comes in a conversation that ends with it, in which it alone
    counts: so the model has it before it when it is to answer. Raises as conversation() does."""
    try:
        return [conversation(enc, messages, fields)]
    except Rewritten:
        messages = plain(messages)
        return [_up_to(enc, messages[: i + 1], fields) for i in _answers(messages)]


def conversation(enc, messages, fields=None):
    """[(text, whether it counts)] of one conversation.

    fields: what else the chat template gets, such as tools. What counts is all that the assistant
    says, with the token that ends it. Raises ValueError if the messages are none, KeyError if one
    has no role, and Rewritten if the answers cannot be found in the text."""
    messages = plain(messages)
    answers = _answers(messages)
    whole = enc.render(messages, fields=fields)
    pieces = []
    at = 0  # where the next piece starts in `whole`
    for i in answers:
        start, end = _answer(enc, messages, i, whole, fields, at)
        pieces.append((whole[at:start], False))
        pieces.append((whole[start:end], True))
        at = end
    pieces.append((whole[at:], False))
    return pieces


def _up_to(enc, messages, fields):
    """The same of messages that end with an answer, of which this one alone counts."""
    whole = enc.render(messages, fields=fields)
    start, end = _answer(enc, messages, len(messages) - 1, whole, fields)
    return [(whole[:start], False), (whole[start:end], True), (whole[end:], False)]


def _answer(enc, messages, i, whole, fields, at=0):
    """(start, end) of what the assistant says in message i, in `whole`, not before the place `at`.

    Raises ValueError if that is nothing, and Rewritten."""
    # an answer lies between what is written up to its start and what is written through it
    before = enc.render(messages[:i], add_generation_prompt=True, fields=fields)
    through = whole
    if i + 1 < len(messages):
        through = enc.render(messages[: i + 1], fields=fields)
    if not whole.startswith(through):
        through = _without_last_end(enc, through)
    one_by_one = through.startswith(before) and whole.startswith(through)
    if not one_by_one or len(before) < at:
        raise Rewritten(
            f"message {i + 1}: the chat template of {enc.name} does not write a conversation "
            "message by message, so that what the assistant says cannot be found in it"
        )
    end = len(through)
    # many templates write a newline after the end token, which nobody needs to learn
    stripped = through.rstrip()
    if stripped.endswith(tuple(enc.special)):
        end = len(stripped)
    said = whole[len(before) : end]
    if not re.sub("|".join(map(re.escape, enc.special)), "", said).strip():
        raise ValueError("the assistant says nothing that the chat template writes")
    return len(before), end


def _without_last_end(enc, text):
    """A text without the token that ends it, if another token ends what is before.

    Phi's templates end a text by <|endoftext|>, after the <|end|> of its last message."""
    ends = tuple(enc.special)
    for token in ends:
        before = text.rstrip().removesuffix(token)
        if before != text.rstrip() and before.rstrip().endswith(ends):
            return before
    return text


def _answers(messages):
    """The places of the assistant's messages. Raises ValueError or KeyError as conversation()."""
    places = []
    for i, message in enumerate(messages):
        if not isinstance(message["role"], str) or not isinstance(message.get("content"), str):
            raise ValueError("a message's role or content is not a text")
        if message["role"] == "assistant":
            if not message["content"].strip() and not message.get("tool_calls"):
                raise ValueError("the assistant says nothing")
            places.append(i)
    if not places:
        raise ValueError("it has no message of the assistant")
    return places


def template_fields(enc, record):
    """The fields of a chat record that its template asks for, {name: value}.

    Raises ValueError if its tools are none."""
    fields = {}
    for name, value in without_nothing(record).items():
        if name in enc.template_names and name not in ("messages", "add_generation_prompt"):
            fields[name] = value
    for name in ("tools", "documents"):
        if name not in fields:
            continue
        fields[name] = as_json(fields[name])
        if not isinstance(fields[name], list):
            raise ValueError(f"its {name} are no list")
    return fields


def unused(enc, record):
    """What of a record that made an example is not in it, a list of short texts."""
    record = without_nothing(record)
    fields = template_fields(enc, record)
    messages = plain(messages_of(record, fields))
    taken = {key_of(record), *fields}
    if messages[0] == {"role": "system", "content": record.get("system")}:
        taken.add("system")
    found = [f"the field {name!r}" for name in record if name not in taken]

    # of the messages: what changes nothing in what the template writes
    whole = enc.render(messages, fields=fields)

    def changes(others):
        try:
            return enc.render(others, fields=fields) != whole
        except ValueError:
            return True  # the template asks for it

    names = {name for m in messages for name in without_nothing(m)}
    for name in sorted(names - {"role", "content"}):
        others = [{key: m[key] for key in m if key != name} for m in messages]
        if not changes(others):
            found.append(f"the messages' field {name!r}")
    for role in sorted({m["role"] for m in messages if m["content"]}):
        others = []
        for m in messages:
            more = "x" if m["role"] == role and m["content"] else ""
            others.append(m | {"content": m["content"] + more})
        if not changes(others):
            found.append(f"the messages of the role {role!r}")
    return found


def without_nothing(fields):
    """The fields that have something in them."""
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}
