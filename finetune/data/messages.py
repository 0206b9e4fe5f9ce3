"""
The messages of a chat record, whichever form it has.

    {"messages": [{"role": "user", "content": "..."}, ...]}         what chat templates take
    {"conversations": [{"from": "human", "value": "..."}, ...]}     ShareGPT's

Beside them may stand "tools", and in ShareGPT's form "system", a text that comes first. Calls of
tools, and their arguments, may be JSON spelled as a text: data sets whose columns have one type
have them so. Templates get them as what they spell.
"""

import contextlib

from run.files import parse_json

KEYS = ("messages", "conversations")
ROLES = {  # ShareGPT's: what templates call them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def key_of(record):
    """The field that holds the messages of a chat record; None: it is no chat record."""
    there = [key for key in KEYS if key in record]
    filled = [key for key in there if record[key] is not None]
    return next(iter(filled or there), None)


def messages_of(record, fields=()):
    """The messages of a chat record, [{"role", "content", ...}].

    fields: what of the record the chat template gets by name; of these "system" is no message.
    Raises ValueError if they are no messages."""
    messages = as_json(record[key_of(record)])
    _check(messages)
    messages = [_with_role(message) for message in messages]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and "system" not in fields:
        if not any(message.get("role") == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system})
    return messages


def as_json(value):
    """What a text spells, if it is JSON; else the value as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value


def _check(messages):
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('its messages are no list of {"role", "content"}')


def _with_role(message):
    """A message of ShareGPT's form as templates take it; others as they are."""
    given = message.get("from")
    if "role" in message or not isinstance(given, str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    message = {"role": ROLES.get(given, given), "content": message.get("value")} | rest
    if given != "function_call":
        return message
    calls = as_json(message["content"])
    if not isinstance(calls, (dict, list)):
        raise ValueError("its function_call is no JSON")
    calls = calls if isinstance(calls, list) else [calls]
    calls = [{"type": "function", "function": call} for call in calls]
    return message | {"content": "", "tool_calls": calls}


def plain(messages):
    """`messages` with contents as one text each, where they are lists of parts, or None.

    Raises ValueError if they are no messages, or a part is no text."""
    _check(messages)
    return [_with_one_text(_with_calls(message)) for message in messages]


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


def _with_calls(message):
    """A message whose calls, and their arguments, are no texts."""
    calls = as_json(message.get("tool_calls"))
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("its tool_calls are no list of objects")
    return message | {"tool_calls": [_with_arguments(call) for call in calls]}


def _with_arguments(call):
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"])}
    arguments = as_json(call.get("arguments"))
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call
