"""
Two small things about text that many files need.
"""


def valid(text):
    """`text` as UTF-8 can spell it: JSON may hold half a surrogate pair; it becomes "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def first_line(e):
    """The first line of an exception's text, or its kind where it has none."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]
