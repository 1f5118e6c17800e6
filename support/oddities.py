"""Counts what looks like a mistake in rows that can be read all the same, and says it once a file.

Reads also what a `label` says, which is a word in some files.
"""
import math
import os
import re
from array import array

import numpy as np

from support.sources import listed

TRUE = {"true", "yes", "y", "t", "1", "1.0", "desirable", "good", "chosen", "positive", "accepted",
        "liked", "thumbs_up", "thumbs up"}
FALSE = {"false", "no", "n", "f", "0", "0.0", "-1", "-1.0", "undesirable", "bad", "rejected",
         "negative", "disliked", "thumbs_down", "thumbs down"}
READ = {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "responses", "ranks",
        "scores", "pairs", "sft_target"}
READ_AS_DEMONSTRATIONS = READ | {"completion", "messages", "label"}
# Columns that belong to the prompt, whatever is in them
PROMPT_COLUMNS = {"system", "system_prompt", "system_message", "instruction", "instructions",
                  "input", "context", "question", "query", "history", "document", "documents",
                  "passage", "tools", "functions"}
NOT_TEXT = {"image", "images", "audio", "audios", "video", "videos"}
# A column with one of them in its name, beside chosen or rejected, says how good that is.
SCORE_WORDS = re.compile(r"score|rating|reward", re.I)
# What programs write where there is nothing, if it is taken for text
GAPS = {"nan", "NaN", "NaT", "<NA>"}
# A list, or bytes, as Python or JSON writes them
WRITTEN_OUT = re.compile(r"""\s*(\[\s*["'].*["']\s*\]|b'.*'|b".*")\s*""", re.S)


def is_gap(value):
    """Returns whether a value is NaN, which is what pandas writes where there is nothing."""
    return isinstance(value, float) and math.isnan(value)


def is_false(label):
    """Returns whether the label of a demonstration says that people did not want it. None and ""
    say nothing. ValueError if it is neither yes nor no."""
    if label is None or is_gap(label):
        return False
    word = str(label).strip().lower()
    if word in FALSE:
        return True
    if word and word not in TRUE:
        raise ValueError(f"column 'label' is {word[:40]!r}, which is neither true nor false (or 1 "
                         "and 0, yes and no, desirable and undesirable); if it says something "
                         "else, call the column another name")
    return False


class Oddities:
    """Counts, over the rows of a file, what looks like a mistake; `messages` says what was found.

    n         rows with a prompt
    spaces    those whose prompt ends in a space
    joined    those in which a response follows the prompt's last letter or dot
    scored    preferences with scores
    reversed  those whose best response has a lower score than the worst
    looks     rows that look like each of `LOOKS`
    rated     {a column that is not read, such as chosen_rating: [in how many records it and its
              partner are numbers, in how many it is the lower one]}
    rows      a hash of each row; without_order, the same whatever the order of its responses
    ignored   {column that is not read: in how many records it has something}
    texts     {such a column: in how many records it is a text that a person would read}
    """

    def __init__(self, demonstrations):
        self.read = READ_AS_DEMONSTRATIONS if demonstrations else READ
        self.n = self.spaces = self.joined = self.scored = self.reversed = 0
        self.looks = [0] * len(LOOKS)
        self.ignored, self.texts, self.rated = {}, {}, {}
        self.rows, self.without_order = array("q"), array("q")

    def count(self, record, rows):
        """Counts one record of the file, and the rows that were made of it."""
        for column in record.keys() - self.read:
            self.count_ignored(column, record[column])
            if "chosen" in str(column) and SCORE_WORDS.search(column):
                self.count_rating(column, record)
        for column in record.keys() & self.read:
            for message in record[column] if isinstance(record[column], list) else ():
                if isinstance(message, dict):
                    for name in message.keys() - {"role", "content"}:
                        self.count_ignored(f"{name} in {column}", message[name])
        for row in rows:
            prompt, responses = row["prompt"], row["responses"]
            self.rows.append(hash((prompt, *responses)))
            self.without_order.append(hash((prompt, frozenset(responses))))
            for i, (looks_so, _, _) in enumerate(LOOKS):
                self.looks[i] += looks_so(prompt, responses)
            if prompt:
                self.n += 1
                self.spaces += prompt[-1] in " \t"
                self.joined += any(joins(prompt[-1], response[0]) for response in responses)
            if "scores" in row and "ranks" not in record:     # ranks decide, and say so
                self.scored += 1
                self.reversed += sum(row["scores"][0]) < sum(row["scores"][-1])

    def count_ignored(self, column, value):
        """Counts a value in a column that is not read."""
        if value not in (None, "", [], {}):
            self.ignored[column] = self.ignored.get(column, 0) + 1
            self.texts[column] = self.texts.get(column, 0) + is_text(column, value)

    def count_rating(self, column, record):
        """Compares a column such as chosen_rating, which is not read, with its partner."""
        try:
            chosen, rejected = (float(record[name])
                                for name in (column, column.replace("chosen", "rejected")))
        except (KeyError, TypeError, ValueError):       # not there, or no number
            return
        counts = self.rated.setdefault(column, [0, 0])
        counts[0] += 1
        counts[1] += chosen < rejected

    def messages(self):
        """Yields lines of text, none if nothing is odd."""
        texts = [column for column in self.texts if 2 * self.texts[column] > self.ignored[column]]
        columns = [f"{column!r}" for column in sorted(map(str, self.ignored.keys() - set(texts)))]
        if columns:
            yield f"columns that are not read: {listed(columns, 20)}"
        no_texts = [column for column in texts if str(column).lower() in NOT_TEXT]
        texts = [column for column in texts if column not in no_texts]
        if no_texts:
            counted = [f"{column!r} ({self.ignored[column]} rows)" for column in sorted(no_texts)]
            yield (f"warning: columns that are not read: {', '.join(counted)}; models here read "
                   "text alone")
        if texts:
            counted = [f"{column!r} ({self.ignored[column]} rows)" for column in sorted(texts)]
            yield (f"warning: columns of text that are not read: {listed(counted, 20)}; what "
                   "belongs to the prompt has to stand in 'prompt'")
        if 2 * self.spaces > self.n:
            yield (f"warning: {self.spaces} of {self.n} prompts end in a space; tokens have it in "
                   "front of a word, so it belongs at the beginning of the response")
        if 2 * self.joined > self.n:
            yield (f"warning: in {self.joined} of {self.n} rows there is neither a space nor a new "
                   "line between prompt and response: the response follows the prompt's last "
                   "letter; begin responses with a space, or end prompts in a new line")
        if 2 * self.reversed > self.scored:
            yield (f"warning: in {self.reversed} of {self.scored} rows the chosen response has the "
                   "lower score; are the columns swapped, or is a lower score better?")
        for column, (n, n_lower) in self.rated.items():
            if 2 * n_lower > n:
                yield (f"warning: in {n_lower} of {n} rows {column!r} is lower than "
                       f"{column.replace('chosen', 'rejected')!r}; are 'chosen' and 'rejected' "
                       "swapped, or is a lower one better?")
        n_rows = len(self.rows)
        for count, (_, share, message) in zip(self.looks, LOOKS):
            if count > share * n_rows:
                yield f"warning: in {count} of {n_rows} rows {message}"
        distinct, sets = len(np.unique(self.rows)), len(np.unique(self.without_order))
        if distinct - sets >= max(10, 0.05 * n_rows):
            yield (f"warning: {distinct - sets} of {n_rows} rows prefer what an earlier row with "
                   "the same prompt and responses does not")


def is_text(column, value):
    """Returns whether a value is a text that a person would read: several words or a list of
    messages; in a column that is named like a part of the prompt, anything. Columns of another
    layout repeat what is read."""
    if column in READ_AS_DEMONSTRATIONS:
        return False
    if str(column).lower() in PROMPT_COLUMNS | NOT_TEXT:
        return True
    if isinstance(value, list):
        return isinstance(value[0], dict) and bool({"content", "value"} & value[0].keys())
    return isinstance(value, str) and len(value.split()) > 1


def joins(last, first):
    """Returns whether a prompt's last character and a response's first one run together. In Chinese
    or Japanese they do anyway."""
    return not (last.isspace() or first.isspace() or max(last, first) >= "\u2e80")


# ------------------------------------------------------------------ what many rows look like

def repeats_prompt(prompt, responses):
    """Returns whether all responses have the prompt in what they begin with, other than as the
    prompt is written: after a name or a mark, or with other spaces or capitals."""
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
