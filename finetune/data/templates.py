r"""
Templates of the user's for a prompt and its completion, over a record's fields.

    --prompt='Review: {sentence}\nSentiment:' --completion=' {label}'

They are Python's format strings, of which a field may name parts of a list or an object in brackets
({answers[0]}), and nothing of Python's own.
"""

import re
import string

from run.text import first_line


def template(name, text):
    """A str.format template of a flag, where \\n may stand for a newline.

    Exits with one line if it is malformed."""
    text = text.replace("\\n", "\n")
    try:
        parts = string.Formatter().parse(text)
        fields = [field for _, field, _, _ in parts if field is not None]
        if not all(re.match(r"[^\W\d]", field) for field in fields):
            why = "a field needs a name"
        elif any("." in re.sub(r"\[[^]]*\]", "", field) for field in fields):
            why = "a part of a field is named in brackets, as {answers[text]}"  # not Python's own
        else:
            return text
    except ValueError as e:
        why = first_line(e)
    raise SystemExit(f"error: {name}={text!r}: {why}; write {{field}}, and {{{{ for a brace")


class Filled(string.Formatter):
    """str.format for records: a list or an object is no text, but its parts may be."""

    def format_field(self, value, spec):
        if isinstance(value, (list, dict)):
            raise ValueError("a field is a list or an object: name its part, as {answers[0]}")
        if re.search(r"\d{5}", spec):
            raise ValueError(f"{spec} makes a text of more than 9,999 characters")
        return super().format_field(value, spec)


def fill(text, record):
    """`text` with the record's fields in their places. Raises ValueError if it lacks one."""
    given = {key: value for key, value in record.items() if value is not None}
    try:
        return Filled().vformat(text, (), given)
    except (LookupError, AttributeError, TypeError) as e:
        missing = e.args[0] if isinstance(e, KeyError) else first_line(e)
        raise ValueError(f"no field {missing!r}")


def fields_in(text):
    """The record's fields that a template names."""
    fields = (field for _, field, _, _ in string.Formatter().parse(text) if field is not None)
    return {re.match(r"[^.\[]*", field)[0] for field in fields}


def templates(s):
    """(prompt, completion, words of labels, whether "messages" are conversations) of settings."""
    words = [word.strip() for word in s.labels.split(",")] if s.labels else []
    prompt = template("prompt", s.prompt or "{prompt}")
    completion = template("completion", s.completion or "{completion}")
    chat = not s.prompt and not s.completion  # templates of the user's take "messages" as a field
    return prompt, completion, words, chat


def prompt_and_completion(record, prompt, completion, words):
    """[(text, whether it counts)] of one record. Raises ValueError if it makes none.

    prompt, completion: templates. words: for the field "label" 0, 1, ..., or empty."""
    if words and "label" in record:
        label = str(record["label"])
        if not label.isascii() or not label.isdigit() or int(label) >= len(words):
            raise ValueError(f"label {label!r} is none of 0 to {len(words) - 1}")
        record = record | {"label": words[int(label)]}
    question = fill(prompt, record)
    answer = fill(completion, record)
    if not answer.strip():
        raise ValueError("its completion is empty")
    return [(question, False), (answer, True)]
