"""What rows look like that can be read and are probably a mistake, if there are many of them."""
import os
import re

# What programs write where there is nothing, if it is taken for text
GAPS = {"nan", "NaN", "NaT", "<NA>"}
# A list, or bytes, as Python or JSON writes them
WRITTEN_OUT = re.compile(r"""\s*(\[\s*["'].*["']\s*\]|b'.*'|b".*")\s*""", re.S)


def repeats_prompt(prompt, responses):
    """Do all responses have the prompt in what they begin with, other than as the prompt is
    written: after a name or a mark, or with other spaces or capitals?"""
    question = prompt.rpartition("\n\nHuman:")[2].removesuffix("\n\nAssistant:")
    length = len(question.strip())
    if len(responses) == 1:     # what is said in a first sentence may well repeat some words
        beginning = responses[0][:length + 100] if length >= 20 else ""
    else:
        beginning = os.path.commonprefix(responses)
    if not 0 < 0.8 * length <= len(beginning):
        return False
    words, beginning = (" ".join(text.casefold().split()) for text in (question, beginning))
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", beginning) is not None


def has_no_prompt(prompt, responses):
    return not prompt.strip()


def same_but_for_space(prompt, responses):
    stripped = {response.strip() for response in responses}
    return len(stripped) == 1 < len(set(responses))


def has_a_gap(prompt, responses):
    return prompt.strip() in GAPS or any(response.strip() in GAPS for response in responses)


def is_written_out(prompt, responses):
    return all(WRITTEN_OUT.fullmatch(response) for response in responses)


def has_no_lines(prompt, responses):
    text = prompt + "".join(responses)
    return "\\n" in text and "\n" not in text


def is_misread(prompt, responses):
    return any(mark in text for text in (prompt, *responses) for mark in ("\ufffd", "\u00e2\u20ac"))


# (what a row looks like, above which part of the rows it is said, what is said)
LOOKS = (
    (repeats_prompt, 0.5, "the responses repeat the prompt where they begin; what is imitated or "
     "compared begins after it"),
    (same_but_for_space, 0, "chosen and rejected differ in the white space around them alone"),
    (has_a_gap, 0, "a prompt or a response is a word for a gap, such as 'nan'; is something "
     "missing there?"),
    (has_no_prompt, 0, "the prompt is empty"),
    (is_written_out, 0.5, "the responses are lists or bytes, written out as text; the text in them "
     "is probably what is meant"),
    (has_no_lines, 0.5, "there is a backslash and an n where a new line is probably meant"),
    (is_misread, 0.05, "there are letters that look misread, such as \ufffd or "
     "\u00e2\u20ac\u2122; was the file written in another encoding than UTF-8?"))
