"""
Conversations of chat records, as a checkpoint's chat template writes them.

A record has "messages", [{"role", "content"}], and what else the template asks for by name, such as
"tools". conversation() gives its text in pieces, of which what the assistant says counts in the
loss; unused() tells what of it the template does not write.
"""

import contextlib
import re

from run.files import parse_json


def conversation(enc, messages, fields=None):
    """[(text, whether it counts)] of one conversation.

    fields: what else the chat template gets, such as tools. What counts is all that the assistant
    says, with the token that ends it. Raises ValueError if the messages are none, and KeyError if
    one has no role."""
    messages = plain(messages)
    answers = _answers(messages)
    whole = enc.render(messages, fields=fields)
    pieces = []
    at = 0  # where the next piece starts in `whole`
    for i in answers:
        # an answer lies between what is written up to its start and what is written through it
        before = enc.render(messages[:i], add_generation_prompt=True, fields=fields)
        through = enc.render(messages[: i + 1], fields=fields)
        one_by_one = through.startswith(before) and whole.startswith(through)
        if not one_by_one or len(before) < at:
            raise SystemExit(
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
        pieces.append((whole[at : len(before)], False))
        pieces.append((said, True))
        at = end
    pieces.append((whole[at:], False))
    return pieces


def plain(messages):
    """`messages` with contents as one text each, where they are lists of parts, or None.

    Raises ValueError if they are no messages, or a part is no text."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('its messages are no list of {"role", "content"}')
    return [_with_one_text(message) for message in messages]


def _with_one_text(message):
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message | {"content": ""}  # templates join it to texts
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of a message's content is not a text but {kind!r}")
    return message | {"content": "".join(texts)}


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
        if isinstance(fields.get(name), str):  # data sets whose columns have one type spell it so
            with contextlib.suppress(ValueError):
                fields[name] = parse_json(fields[name])
        if name in fields and not isinstance(fields[name], list):
            raise ValueError(f"its {name} are no list")
    return fields


def unused(enc, record):
    """What of a record that made an example is not in it, a list of short texts."""
    record = without_nothing(record)
    fields = template_fields(enc, record)
    found = [f"the field {name!r}" for name in record if name not in fields and name != "messages"]

    # of the messages: what changes nothing in what the template writes
    messages = plain(record["messages"])
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
