"""Docstrings as Markdown: what reads well in `help()` and would be taken for something else by a Markdown parser."""

import re

import griffe

# a headline of a docstring that the Google style does not know, and the indented text below it
SECTION = re.compile(
    r"(?<![^\n]\n)^(?P<title>[A-Z][^\n]*[^\n:]|Example:)\n(?P<text> {4}[^\n]*\n?(?: {4}[^\n]*\n?|\n(?= {4}))*)", re.MULTILINE
)
# >>> would be a quotation three times over
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent) +\S.*)*", re.MULTILINE)
# several arguments with one explanation, which the Google style gives to one argument each
SEVERAL = re.compile(r"^ {4}(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)(?P<text>: .*(?:\n {5,}\S.*)*)", re.MULTILINE)
# an explanation such as "gamma: >= 0", whose > would begin a quotation
AT_LEAST = re.compile(r"^( {4}[\w*, ]+: )>", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """The docstring with fenced examples, an entry for each argument, and bold headlines above text that is not indented."""

    def section(found: re.Match) -> str:
        return f"**{found['title']}**\n\n" + re.sub(r"^ {4}", "", found["text"], flags=re.MULTILINE)

    def fenced(found: re.Match) -> str:
        return f"{found['indent']}```pycon\n{found[0]}\n{found['indent']}```"

    def each(found: re.Match) -> str:
        return "\n".join(f"    {name}{found['text']}" for name in found["names"].split(", "))

    docstring = AT_LEAST.sub(r"\1\\>", SECTION.sub(section, docstring))
    return EXAMPLE.sub(fenced, SEVERAL.sub(each, docstring))


class Docstrings(griffe.Extension):
    """Translates every docstring before mkdocstrings reads its sections."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
