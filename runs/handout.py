"""Makes the page of a set of the course: for students, and for teachers with the answers.

    python runs/assignment.py pairs --handout

The texts are in runs/handouts/, one Markdown file for each set. Its section "Hints" has a heading
for each function, with the minutes that it takes and three hints; its last section, "For the
teacher", goes to nobody else. Signatures, docstrings, points and solutions come from the code. The
page is written twice: as Markdown, which GitHub shows with folded hints, and as one HTML file for
the printer, which has its picture inside.
"""
import ast
import base64
import html
import os
import re
import shutil

from runs.course import SETS
from support.flags import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXTS = os.path.join(ROOT, "runs", "handouts")
QUESTION_POINTS = 2         # for each of the three questions of a set
HOW_TO_USE_HINTS = ("Each function has three hints, which are folded. Open one only when you have "
                    "been stuck for five minutes. On paper they are left out.")
IMAGE = re.compile(r"!\[(.*?)\]\((.*?)\)")

STYLE = """
body { font: 11pt/1.45 Georgia, serif; max-width: 52em; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { font-family: Helvetica, Arial, sans-serif; line-height: 1.2; margin: 1.4em 0 .4em }
code, pre { font: 9pt/1.35 Menlo, Consolas, monospace; background: #f4f4f4 }
pre { padding: .7em; white-space: pre-wrap }
table { border-collapse: collapse } td, th { border: 1px solid #999; padding: .2em .6em }
img { max-width: 100%; max-height: 9cm; display: block; margin: 1em auto }
details { border-left: 3px solid #bbb; padding-left: .8em; margin: .4em 0 }
summary { cursor: pointer; font-style: italic }
@page { size: A4; margin: 18mm }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt }
  pre { font-size: 7.6pt }                  /* 100 columns on A4 */
  h2, h3 { break-after: avoid } pre, table, img { break-inside: avoid }
  details:not([open]) { display: none }     /* on paper there is nothing to unfold */
}
"""


# ------ the parts of a page


def read_text(name):
    """Reads the text of a set. Returns (title, {heading of a section: its Markdown})."""
    path = os.path.join(TEXTS, f"{name}.md")
    if not os.path.isfile(path):
        raise InputError(f"--handout: there is no page for {name}: no runs/handouts/{name}.md")
    with open(path, encoding="utf-8") as file:
        title, *parts = re.split(r"^## ", file.read(), flags=re.M)
    sections = dict(part.split("\n", 1) for part in parts)
    return title.strip(), {heading: text.strip() for heading, text in sections.items()}


def read_hints(text):
    """Reads a section "Hints". Returns {function: (minutes, [three hints])}."""
    hints = {}
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        heading, body = part.split("\n", 1)
        function, minutes = re.fullmatch(r"(\S+) \((\d+) minutes\)", heading).groups()
        levels = re.split(r"^\d\. ", body, flags=re.M)[1:]
        hints[function] = int(minutes), [" ".join(level.split()) for level in levels]
    return hints


def definition(function, root, edited):
    """Finds a function in the code. function: such as losses.dpo, or for a method
    model.GPT.response_logps. root: the repository's, or that of a copy. edited: {path: source} of
    files that are other ones in a variant. Returns (its syntax tree, its lines, unindented)."""
    module, *names = function.split(".")
    source = edited.get(f"{module}.py")
    if source is None:
        with open(os.path.join(root, f"{module}.py"), encoding="utf-8") as file:
            source = file.read()
    node = ast.parse(source)
    for name in names:
        node, = [child for child in node.body if getattr(child, "name", None) == name]
    lines = source.splitlines()[node.lineno - 1:node.end_lineno]
    return node, [line[node.col_offset:] for line in lines]


def signature(function, root=ROOT, edited={}):
    """Returns the lines of a function down to the end of its docstring, as one text."""
    node, lines = definition(function, root, edited)
    return "\n".join(lines[:node.body[0].end_lineno - node.lineno + 1])


def solution(function, edited={}):
    """Returns the lines of a function after its docstring, as one text."""
    node, lines = definition(function, ROOT, edited)
    return "\n".join(lines[node.body[0].end_lineno - node.lineno + 1:])


def folded(hints, name):
    """Returns the three hints to a function in Markdown, each folded."""
    levels = ("where to look", "the idea", "nearly the code")
    return [f"<details>\n<summary>Hint {number} for {name}: {level}</summary>\n\n{hint}\n\n"
            "</details>" for number, (level, hint) in enumerate(zip(levels, hints), 1)]


def about_variant(variant):
    """Returns the paragraphs that say how a student's variant differs from the set."""
    return ["**This copy is a variant.** The equation, the picture, the hints and the questions of "
            "this page are those of the set as it is published. What you write, and the points, "
            "are the variant's. It differs in this:",
            "\n".join(f"- {note}" for note in variant.notes)]


def page(name, teacher=False, root=ROOT, variant=None):
    """Puts the page of a set together, in Markdown. name: of the set. teacher: with the answers and
    the solutions. root: of the copy. variant: that of a student, see runs/variants.py."""
    title, sections = read_text(name)
    head, effort = title.split("\n", 1)
    points, hints = SETS.get(name, {}), read_hints(sections.pop("Hints", ""))
    edited, changed = {}, {}
    if variant:
        points = variant.points
        edited = variant.edited if teacher else {}      # a student's docstrings are in the copy
        changed = {function: note for note in variant.notes
                   for function in note.split(": ")[0].split(", ")}
    answers = sections.pop("For the teacher")
    minutes = [int(number) * (60 if unit == "hours" else 1)
               for number, unit in re.findall(r"(\d+) (minutes|hours)", effort)]
    minutes += [needed for needed, _ in hints.values()]
    summary = f"**About {duration(sum(minutes))} in all.** {effort.strip()}"
    if points:
        summary += (f" {sum(points.values())} points for the functions, which tests give, and "
                    f"{3 * QUESTION_POINTS} for the questions, which your teacher gives.")
    parts = [head + (", with answers" if teacher else ""), summary]
    if variant:
        parts += about_variant(variant)
    for heading, text in sections.items():
        if heading == "Commands" and points:
            parts += ["## What you write", HOW_TO_USE_HINTS]
            for function, worth in points.items():
                needed, levels = hints.get(function, (None, []))    # none for a loss of zoo.py
                time = f", about {needed} minutes" if needed else ""
                parts += [f"### `{function}`: {worth} points{time}",
                          f"```python\n{signature(function, root, edited)}\n```"]
                if function in changed:
                    parts.append(f"**In this variant:** {changed[function]}")
                parts += folded(levels, function)
        parts += [f"## {heading}", text]
    if teacher:
        parts += ["## For the teacher", answers]
        if points:
            parts.append("### Solutions")
            code = "\n\n\n".join(f"# {function}\n{solution(function, edited)}"
                                 for function in points)
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def duration(minutes):
    """Says how long a set takes: to the half hour."""
    hours = max(0.5, round(minutes / 30) / 2)
    return f"{hours:g} hour" if hours == 1 else f"{hours:g} hours"


# ------ files


def write_student(folder, name, variant=None):
    """Writes README.md and handout.html into a student's copy, and the picture, which README.md
    shows, into its folder img."""
    text = page(name, root=folder, variant=variant)
    for _, path in IMAGE.findall(text):
        os.makedirs(os.path.join(folder, "img"), exist_ok=True)
        shutil.copy(os.path.join(TEXTS, path), os.path.join(folder, "img"))
    write(os.path.join(folder, "README.md"),
          IMAGE.sub(lambda link: f"![{link[1]}](img/{os.path.basename(link[2])})", text))
    write(os.path.join(folder, "handout.html"), to_html(text, TEXTS))


def write_teacher(paths, name, variant=None):
    """Writes the teacher's page. paths: of the Markdown and of the HTML file."""
    text = page(name, teacher=True, variant=variant)
    where = os.path.relpath(TEXTS, os.path.dirname(os.path.abspath(paths[0])))
    write(paths[0], IMAGE.sub(lambda link: f"![{link[1]}]({where}/{link[2]})", text))
    write(paths[1], to_html(text, TEXTS).replace("<details>", "<details open>"))


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# ------ from Markdown to HTML: only the part of Markdown that the pages use


def to_html(text, folder):
    """Turns Markdown into a whole HTML page, its pictures included. text: headings, paragraphs,
    lists of "- ", tables, blocks of code, pictures and <details>. folder: to which the paths of
    pictures are relative."""
    parts = []
    for number, part in enumerate(re.split(r"^```.*\n", text, flags=re.M)):
        if number % 2:                                      # between two fences
            parts.append(f"<pre>{html.escape(part.rstrip())}</pre>")
        else:
            parts += [block(lines, folder) for lines in re.split(r"\n\s*\n", part.strip()) if lines]
    title = html.escape(text.split("\n", 1)[0].lstrip("# "))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n")


def block(text, folder):
    """Turns one block of Markdown into HTML."""
    lines = text.split("\n")
    if text.startswith(("<details>", "</details>")):
        return text
    if text.startswith("#"):
        marks, _, heading = text.partition(" ")
        return f"<h{len(marks)}>{inline(heading, folder)}</h{len(marks)}>"
    if text.startswith("- "):
        items = re.split(r"^- ", text, flags=re.M)[1:]
        return "<ul>" + "".join(f"<li>{inline(item, folder)}</li>\n" for item in items) + "</ul>"
    if text.startswith("|"):
        rows = [line.strip("|").split("|") for line in [lines[0], *lines[2:]]]
        cells = ["".join(f"<td>{inline(cell.strip(), folder)}</td>" for cell in row)
                 for row in rows]
        return "<table>" + "".join(f"<tr>{row}</tr>\n" for row in cells) + "</table>"
    return f"<p>{inline(text, folder)}</p>"


def inline(text, folder):
    """Turns what stands inside a block into HTML: code, pictures, links, bold and italic text."""
    parts = []
    for number, part in enumerate(text.split("`")):
        if number % 2:
            parts.append(f"<code>{html.escape(part)}</code>")
            continue
        part = html.escape(part, quote=False)
        part = IMAGE.sub(lambda link: picture(link[1], os.path.join(folder, link[2])), part)
        part = re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', part)
        part = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part, flags=re.S)
        parts.append(re.sub(r"\*(\S(?:.*?\S)?)\*", r"<em>\1</em>", part, flags=re.S))
    return "".join(parts)


def picture(text, path):
    """Returns an image tag that holds the picture itself. text: what it shows."""
    with open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    kind = "svg+xml" if path.endswith(".svg") else "png"
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{data}">'
