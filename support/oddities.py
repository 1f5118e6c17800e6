"""What looks like a mistake in rows that can be read all the same: counted, and said once a file.

Also what a `label` says, which is a word in some files.
"""
import math

TRUE = {"true", "yes", "y", "t", "1", "1.0", "desirable", "good", "chosen", "positive", "accepted",
        "liked", "thumbs_up", "thumbs up"}
FALSE = {"false", "no", "n", "f", "0", "0.0", "-1", "-1.0", "undesirable", "bad", "rejected",
         "negative", "disliked", "thumbs_down", "thumbs down"}
READ = {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "responses", "ranks",
        "scores", "pairs", "sft_target"}
READ_AS_DEMONSTRATIONS = READ | {"completion", "messages", "label"}
# Columns that belong to the prompt, whatever is in them
PROMPT_COLUMNS = {"system", "system_prompt", "system_message", "instruction", "instructions",
                  "input", "context", "question", "query", "history", "document", "passage"}


def is_false(label):
    """Does the label of a demonstration say that people did not want it? None and "" say nothing.
    ValueError if it is neither yes nor no."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
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
    ignored   {column that is not read: in how many records it has something}
    texts     {such a column: in how many records it is a text that a person would read}
    """

    def __init__(self, demonstrations):
        self.read = READ_AS_DEMONSTRATIONS if demonstrations else READ
        self.records = self.n = self.spaces = self.joined = self.scored = self.reversed = 0
        self.ignored, self.texts = {}, {}

    def count(self, record, rows):
        """One record of the file, and the rows that were made of it."""
        self.records += 1
        for column in record.keys() - self.read:
            value = record[column]
            if value not in (None, "", [], {}):
                self.ignored[column] = self.ignored.get(column, 0) + 1
                self.texts[column] = self.texts.get(column, 0) + is_text(column, value)
        for row in rows:
            prompt, responses = row["prompt"], row["responses"]
            if prompt:
                self.n += 1
                self.spaces += prompt[-1] in " \t"
                self.joined += any(joins(prompt[-1], response[0]) for response in responses)
            if "scores" in row and "ranks" not in record:     # ranks decide, and say so
                self.scored += 1
                self.reversed += sum(row["scores"][0]) < sum(row["scores"][-1])

    def messages(self):
        """Lines of text, none if nothing is odd."""
        texts = [column for column in self.texts if 2 * self.texts[column] > self.ignored[column]]
        columns = [f"{column!r}" for column in sorted(map(str, self.ignored.keys() - set(texts)))]
        if columns:
            yield f"columns that are not read: {', '.join(columns)}"
        if texts:
            counted = [f"{column!r} ({self.ignored[column]} rows)" for column in sorted(texts)]
            yield (f"warning: columns of text that are not read: {', '.join(counted)}; what "
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


def is_text(column, value):
    """Is it a text that a person would read: several words or a list of messages; in a column that
    is named like a part of the prompt, any text? Columns of another layout repeat what is read."""
    if column in READ_AS_DEMONSTRATIONS:
        return False
    if isinstance(value, list):
        return isinstance(value[0], dict) and bool({"content", "value"} & value[0].keys())
    return isinstance(value, str) and (str(column).lower() in PROMPT_COLUMNS
                                       or len(value.split()) > 1)


def joins(last, first):
    """Do a prompt's last character and a response's first one run together? In Chinese or Japanese
    they do anyway."""
    return not (last.isspace() or first.isspace() or max(last, first) >= "\u2e80")
