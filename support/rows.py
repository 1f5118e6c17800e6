"""Turns the records of a file into rows: a prompt and its responses, text or chat messages.

A row is {"prompt": ..., "responses": [..., ...]}, the better response first. It also has "scores"
if rewards came with it, and "desirable" if its one response has a label. Its parts are all text, or
all lists of chat messages. A record may have these columns, named as in TRL where TRL has them:

    prompt, chosen, rejected    a preference pair
    score_chosen, score_rejected    next to it: numbers, or lists of them
    chosen, rejected            whole dialogues, or posts with their TL;DR: the prompt is what they
                                have in common
    prompt, responses           K of them, the best first; or in the order of `ranks` (1 is best);
                                or of `scores` (as above)
    prompt, completion, label   one response that people wanted or did not want, without a partner
    prompt, completion          a demonstration, for supervised fine-tuning; but not if `label` is
                                false (or 0, no, undesirable)
    messages                    a dialogue: each turn of the assistant is a demonstration

Other columns are not read, and a message lists them. A column that looks like a label of which
response is better is refused.

Before a row becomes tokens it is cut into *segments*, (text, learnt) each. What the assistant says
in a response is learnt. What a person or a tool says between two of its turns is context, which the
model reads but does not learn to write.
"""
import datetime
import functools
import hashlib
import json
import os
import re
from collections import Counter
from itertools import chain, islice, takewhile

from support.flags import InputError, in_a_line
from support.sources import listed, read_records
from support.tokenizer import ROLES

PAIRS = (("chosen", "rejected"), ("prompt", "responses"))       # a row needs one of these
LABELLED = ("prompt", "completion", "label")
DEMONSTRATIONS = (("prompt", "completion"), ("messages",), *PAIRS)
READ = {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "responses", "ranks",
        "scores"}
READ_AS_DEMONSTRATIONS = READ | {"completion", "messages", "label"}
PERSON = r"\n\n(?:Human|System):.*?(?:\n\nAssistant:|\Z)"      # in a dialogue in text
BLANK = re.compile("[\\s\\u200b-\\u200f\\u2060\\ufeff]*")     # with invisible characters
# A list of chat messages that a program wrote as text
WRITTEN_MESSAGES = re.compile(r"""\s*(array\()?\[\s*\{\s*["'](role|content|from|value)["']\s*:.*"""
                              r"""[\])]\s*""", re.S)
TRUE = {"true", "yes", "1", "1.0", "desirable"}
FALSE = {"false", "no", "0", "0.0", "-1", "-1.0", "undesirable"}
# The name of a column that says which response is better has a word of the first kind, and no word
# but these: `preferred`, `better_response_id`, `isChosen`; but not `preference_strength`.
LABEL_WORDS = set(
    "label labels prefer prefers preferred preference preferences winner winning loser losing "
    "better best worse worst safer choice selected accepted liked desirable chosen rejected rank "
    "ranks ranking rankings pairs kto".split())
WORDS_BESIDE = set(
    "a b is the of response responses answer answers completion completions output outputs summary "
    "text side id ids idx index number human gold ai gpt model tie tag user annotator final "
    "overall".split())

# ------------------------------------------------------------------ one record


def parse_rows(record, demonstrations, notes=None):
    """Returns the rows in one record of a file. A preference is one row. A demonstration has a row
    for each turn of the assistant, and none if its label is false. ValueError says what is wrong.
    notes: a Counter of what was done to rows, as texts "{} rows ..." with room for the number."""
    if isinstance(record, ValueError):      # in place of a record that could not be read
        raise record
    if not isinstance(record, dict):
        raise ValueError("not a JSON object" + "; an array of them belongs into a file that ends "
                         "in .json" * isinstance(record, list))
    layouts = DEMONSTRATIONS if demonstrations else PAIRS
    if not demonstrations and "completion" in record:
        layouts += (LABELLED,)
    if not any(record.keys() >= set(columns) for columns in layouts):
        wanted = ", or ".join(" and ".join(columns) for columns in layouts)
        raise ValueError(f"needs columns {wanted}; has {', '.join(map(str, record)) or 'none'}")
    notes = Counter() if notes is None else notes
    # pandas writes NaN where there is nothing, and NaN is not equal to itself
    record = {str(name): value if value == value else None for name, value in record.items()}
    column = next((name for name in ("responses", "chosen") if record.get(name) is not None), None)
    if demonstrations or column is None and record.keys() >= set(LABELLED):
        names = ("completion", "messages") if demonstrations else ("completion",)
        there = [name for name in names if name in record]
        filled = [name for name in there if record[name] is not None]
        if filled or there and column is None:
            return single_response(record, (filled or there)[0], demonstrations, notes)
    column = column or "chosen"
    check_labels(record, column)
    responses, columns, scores = (ranking if column == "responses" else pair)(record, notes)
    if column == "responses" or "prompt" in record:
        part_of(record.get("prompt"), "prompt")         # it must be there
    prompt, responses = divide(record.get("prompt"), responses, columns, notes)
    if demonstrations:
        return turns_of(prompt, responses[0])
    return [{"prompt": prompt, "responses": responses} | ({"scores": scores} if scores else {})]


def single_response(record, column, demonstrations, notes):
    """Returns the rows of a record with one response, in this column: demonstrations, or a response
    with its label."""
    check_labels(record, column)
    label = record.get("label")
    label = "" if label is None else str(label).strip().lower()
    if label and label not in TRUE | FALSE:
        raise ValueError(f"column 'label' is {label[:40]!r}, which is neither true nor false (or 1 "
                         "and 0, yes and no, desirable and undesirable); if it says something "
                         "else, call the column another name")
    if demonstrations and label in FALSE:
        return []
    if not demonstrations and not label:
        raise ValueError("column 'label' is missing")
    if column == "messages" and not isinstance(record[column], list):
        raise ValueError("column 'messages' is missing, or is no list of chat messages")
    prompt = record.get("prompt") if column == "completion" else None
    prompt, responses = divide(prompt, [record[column]], [column], notes)
    if demonstrations:
        return turns_of(prompt, responses[0])
    return [{"prompt": prompt, "responses": responses, "desirable": label in TRUE}]


def turns_of(prompt, response):
    """Makes a demonstration of each turn of the assistant in a response that continues the dialogue
    of its prompt. The prompt of each is everything that was said before."""
    rows = []
    if isinstance(prompt, str):
        for text, learnt in text_segments(prompt, response, rf"{PERSON}|\n\nAssistant:"):
            if learnt:
                rows.append({"prompt": prompt, "responses": [text]})
            prompt += text
        if not rows:
            raise ValueError("the assistant says nothing in it")
        return rows
    return [{"prompt": prompt + response[:i], "responses": [[message]]}
            for i, message in enumerate(response) if is_assistant(message)
            and message.get("weight") != 0 and message.get("train") is not False]


# ------------------------------------------------------------------ text and messages


def part_of(value, column):
    """Returns the value of a column as text or as a list of chat messages. Text is unchanged;
    numbers and dates become text. ValueError if the value is anything else."""
    if value is None or value != value:
        raise ValueError(f"column {column!r} is missing")
    if isinstance(value, list):
        return [chat_message(message, column) for message in value]
    if isinstance(value, (bool, int, float)):       # a column of numbers is text all the same
        value = json.dumps(value)
    elif isinstance(value, (datetime.date, datetime.time)):         # Parquet has these
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is neither text nor chat messages")
    if WRITTEN_MESSAGES.fullmatch(value):
        raise ValueError(f"column {column!r} has a list of chat messages written out as text; save "
                         "the data as JSONL or Parquet")
    return checked_text(value, column)


def chat_message(message, column):
    """Checks a chat message, and joins content that comes in parts into one text. Other fields,
    such as `tool_calls`, are left for the chat template."""
    message = dict(message) if isinstance(message, dict) else {}
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = {str(part.get("type")) for part in content} - {"text"}
        if others:
            raise ValueError(f"column {column!r} has a message with a part of type "
                             f"{min(others)!r}; models here read text alone")
        content = "".join(str(part.get("text") or "") for part in content)
    if message.get("role") not in list(ROLES) or not isinstance(content, str):
        raise ValueError(f"column {column!r} is not a list of chat messages with a role "
                         f"({', '.join(ROLES)}) and a text as content")
    return message | {"content": checked_text(content, column)}


def checked_text(text, column):
    try:
        text.encode()
    except UnicodeEncodeError:      # half a letter, in a file or as JSON's "\ud83d"
        raise ValueError(f"column {column!r} is not utf-8 text") from None
    return text.replace("\r\n", "\n")       # dialogues in text are split at their blank lines


def divide(prompt, responses, columns, notes):
    """Separates the prompt from the responses. prompt, responses: values of the columns; None for
    no prompt. Returns (prompt, responses), all text or all messages. ValueError if something is
    missing, empty, or does not belong together."""
    if columns[0] == "responses" and any(text is None or text != text for text in responses):
        raise ValueError("column 'responses' is missing one of its texts")
    responses = [part_of(value, column) for value, column in zip(responses, columns)]
    given = prompt if prompt is None else part_of(prompt, "prompt")
    in_messages = any(isinstance(part, list) for part in (given, *responses))
    divide_parts = divide_messages if in_messages else divide_text
    prompt, responses = divide_parts(given, responses, columns, notes)
    for column, response in zip(columns, responses):
        text = response if isinstance(response, str) else "".join(
            message["content"] or "(calls a tool)" * bool(message.get("tool_calls"))
            for message in response if is_assistant(message))
        # In a whole dialogue a blank turn is what the assistant said; a blank column is a mistake.
        if BLANK.fullmatch(text) if given is not None or in_messages else not text:
            raise ValueError(f"the response {column!r} is empty")
    return prompt, responses


def divide_messages(prompt, responses, columns, notes):
    """Does what `divide` does if some part is a list of messages."""
    whole = [[{"role": "assistant", "content": part}] if isinstance(part, str) else part
             for part in responses]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    for column, reply in zip(columns, whole):
        if not any(map(is_assistant, reply)):
            raise ValueError(f"column {column!r} has no turn of the assistant")
    answers_alone = all(is_assistant(reply[0]) for reply in whole)
    if isinstance(prompt, str) and not answers_alone:
        asked = []              # the dialogues have it in them
    begins = [reply[:len(asked)] == asked for reply in whole]
    if not all(begins):
        if asked[-1]["role"] == "user" and not answers_alone:
            raise ValueError(f"column {columns[begins.index(False)]!r} is a dialogue that does not "
                             "begin with the prompt")
        whole = [asked + reply for reply in whole]

    n = least = len(asked)          # messages of the prompt
    if not all(is_assistant(*reply[n:n + 1]) for reply in whole):
        # All that the dialogues have in common, up to a turn of the assistant in each
        alike = takewhile(lambda each: all(message == each[0] for message in each), zip(*whole))
        n = len(list(alike))
        if len(whole) == 1:
            n = least + len(list(takewhile(lambda turn: not is_assistant(turn), whole[0][least:])))
        while n > least and not all(is_assistant(*reply[n:n + 1]) for reply in whole):
            n -= 1
    asked = whole[0][:n]
    said = [message["content"].strip() for message in asked]
    if isinstance(prompt, str) and not any(prompt.strip() in text or text and text in prompt
                                           for text in said):
        notes["warning: in {} rows the dialogues have another prompt than 'prompt'; theirs is "
              "taken"] += 1
    replies = [reply[n:] for reply in whole]
    for column, reply in zip(columns, replies):
        while reply and not is_assistant(reply[-1]):        # a person has the last word
            del reply[-1]
        if not reply:
            raise ValueError(f"column {column!r} has no turn of the assistant")
        if not is_assistant(reply[0]):
            raise ValueError(f"column {column!r} is a dialogue that does not begin with the prompt")
    if not asked:
        raise ValueError("there is no prompt: the dialogue begins with the assistant")
    return asked, replies


def is_assistant(message=None):
    return message is not None and message["role"] == "assistant"


def divide_text(prompt, responses, columns, notes):
    """Does what `divide` does if all parts are text."""
    if prompt is None:
        if len(responses) == 1:
            raise ValueError("column 'prompt' is missing")
        prompt = implicit_prompt(*responses)
        if not prompt:
            raise ValueError("there is no column 'prompt', and 'chosen' and 'rejected' share no "
                             "beginning that ends in 'Assistant:' or 'TL;DR:'; what they answer "
                             "belongs into a column 'prompt'")
        return prompt, [response[len(prompt):] for response in responses]
    rests = [after_prompt(prompt, response) if prompt.strip() else None for response in responses]
    if all(rest and rest.strip() for rest in rests):
        notes["{} rows: the responses begin with the prompt, which is taken off there"] += 1
        return prompt, rests
    if any(rest is not None for rest in rests):     # it may repeat the question
        notes["{} rows: a response begins with the prompt, but not all do or nothing comes after "
              "it; they are left as they are"] += 1
    return prompt, responses


def implicit_prompt(*texts):
    """Returns the prompt that whole texts share, or "": their common prefix up to its last
    "Assistant:", or "TL;DR:" at the start of a line. In other texts the common prefix may contain
    the responses' first words. Then two pairs on the same post would have different prompts, and
    one of them might train while the other is held out."""
    common = os.path.commonprefix(texts)
    ends = [match.end() for match in re.finditer(r"\n\nAssistant:|\nTL;DR:", common)]
    return common[:ends[-1]] if ends else ""


def after_prompt(prompt, response):
    """Returns what comes after the prompt in a response that begins with it, or None if it does not
    or only in the middle of a word. White space around the prompt may be missing there."""
    for beginning in (prompt, prompt.rstrip(), prompt.strip()):
        if response.startswith(beginning):
            rest = response[len(beginning):]
            if beginning[-1].isalnum() and rest[:1].isalnum():
                return None
            return rest.removeprefix(prompt[len(prompt.rstrip()):]) if beginning != prompt else rest
    return None


# ------------------------------------------------------------------ segments


def segments_of(row, template):
    """Turns a row into segments, by a ChatTemplate. Returns (the prompt's text, [segments of each
    response]), where segments are lists of (text, learnt). ValueError if the template does not take
    the row."""
    prompt, responses = row["prompt"], row["responses"]
    if isinstance(prompt, str):
        return prompt, [text_segments(prompt, response) for response in responses]
    thinking = any(message.get("reasoning_content") or "</think>" in message["content"]
                   for message in chain(*responses))
    rendered = [chat_segments(template, prompt, response, thinking) for response in responses]
    if any(text != rendered[0][0] for text, _ in rendered):
        raise ValueError("the chat template writes the prompt in another way for each response")
    return rendered[0][0], [segments for _, segments in rendered]


def text_segments(prompt, response, context=PERSON):
    """Cuts a response that is text into segments. If its prompt ends in "Assistant:", as an HH
    dialogue does, then what a person says later in the response is context. context: a regular
    expression for that, without groups."""
    if not prompt.endswith("\n\nAssistant:"):
        return [(response, True)]
    pieces = re.split(f"({context})", response, flags=re.S)
    parts = [(text, i % 2 == 0) for i, text in enumerate(pieces)]
    if len(parts) > 1 and not parts[-1][0]:     # a person has the last word: no reply follows
        parts = parts[:-2]
    return [(text, learnt) for text, learnt in parts if text]


def chat_segments(template, prompt, response, thinking=False):
    """Renders a prompt and a response, lists of messages, by a chat template. Returns (the prompt's
    text, [(text, learnt), ...]).

    The response begins with a turn of the assistant, or continues the one with which the prompt
    ends. White space around a reply is taken off: a reply's first token could merge with the new
    line before it. The response ends where the template ends its last turn; the new line that
    templates write after that is dropped. thinking: see ChatTemplate.render.
    """
    prompt = [template.guard(message) for message in prompt]
    response = [template.guard(message) for message in response]
    begun = ""                              # the part of the first turn that the prompt holds
    if prompt[-1]["role"] == "assistant":
        *prompt, last = prompt
        begun = last["content"].strip()
        response[0] = {**last, **response[0],
                       "content": last["content"] + response[0]["content"]}
    response = [{**message, "content": message["content"].strip()}
                if message["role"] == "assistant" else message for message in response]
    dialogue = prompt + response
    turns = []                              # where each of the assistant's turns begins and ends
    for i in range(len(prompt), len(dialogue)):
        if dialogue[i]["role"] == "assistant":
            head = template.render(dialogue[:i], True, thinking)
            tail = template.render(dialogue[:i + 1], False, thinking).rstrip()
            if begun and not turns:
                if begun not in tail[len(head):]:
                    raise ValueError("the chat template writes the turn with which the prompt ends "
                                     "in another way; end the prompt at a turn of the user")
                head = tail[:tail.index(begun, len(head)) + len(begun)]
            turns.append((head, tail))
    whole = turns[-1][1]
    segments, end = [], len(turns[0][0])
    for head, tail in turns:
        if not (whole.startswith(tail) and tail.startswith(head)):
            raise ValueError(
                "the chat template writes a turn of the assistant in another way than it asks for "
                "it, or in another way when the dialogue goes on; end the response at its first "
                "turn, or put the earlier turns into the prompt")
        segments += [(whole[end:len(head)], False), (whole[len(head):len(tail)], True)]
        end = len(tail)
    return turns[0][0], [(text, learnt) for text, learnt in segments if text]


# ------------------------------------------------------------------ pairs, rankings, scores


def pair(record, notes):
    """Returns the responses of a pair, their columns and their scores, or None."""
    columns, score_columns = ["chosen", "rejected"], ["score_chosen", "score_rejected"]
    scores = [record.get(column) for column in score_columns]
    scores = None if scores == [None, None] else scores_of(scores, score_columns)
    return [record.get(column) for column in columns], columns, scores


def ranking(record, notes):
    """Orders a list of responses. `ranks` (1 is best) say which is best, or else `scores`; without
    either, the best one comes first in the list. Returns the responses, the best first, their
    columns, and their scores or None."""
    responses, ranks, scores = (record.get(name) for name in ("responses", "ranks", "scores"))
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError("column 'responses' is not a list of two responses or more")
    K = len(responses)
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != K:
            raise ValueError(f"column 'scores' is not a list of {K}, one number or list for each "
                             "response")
        scores = scores_of(scores, ["scores"] * K)
    texts = [response if isinstance(response, str) else json.dumps(response, default=str)
             for response in responses]
    if 1 < len(set(texts)) < K:
        notes["{} rows: two of the responses are the same; neither is better"] += 1
    if ranks is None:
        ranks = [-sum(numbers) for numbers in scores] if scores else range(K)
    elif not (isinstance(ranks, list) and len(ranks) == K and all(map(is_number, ranks))):
        raise ValueError(f"column 'ranks' is not a list of {K} numbers, one for each response")
    # A tie is broken by a hash of the text, which is as good as by chance; with the prompt in it,
    # so that "yes" does not always win against "no".
    if len(set(ranks)) < K:
        notes["{} rows: a tie in their 'ranks' or 'scores' is broken by chance"] += 1
    ties = [hashlib.sha256(f"{text}\0{record.get('prompt')}".encode(errors="replace")).digest()
            for text in texts]
    by_rank = sorted(range(K), key=lambda k: (ranks[k], ties[k]))
    if scores:
        scores = [scores[k] for k in by_rank]
        if sum(scores[0]) < max(map(sum, scores)):
            notes["{} rows: 'ranks' and 'scores' have another response as the best; the ranks "
                  "decide"] += 1
    return [responses[k] for k in by_rank], ["responses"] * K, scores


def scores_of(values, columns):
    """Returns the rewards of K responses, numbers or lists with a number per reward model, as K
    lists."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    for numbers, column in zip(lists, columns):
        if numbers == [None]:
            which = " one of its numbers" if column == "scores" else ""
            raise ValueError(f"column {column!r} is missing{which}")
        if not numbers or not all(map(is_number, numbers)):
            raise ValueError(f"column {column!r} is neither a number below 1e12 nor a list of them")
        if len(numbers) != len(lists[0]):
            raise ValueError(f"column {column!r} has {len(numbers)} numbers for one response, "
                             f"{len(lists[0])} for another")
    return lists


def is_number(value):
    """Returns whether a value is a number whose square is finite in float32."""
    return isinstance(value, (int, float)) and abs(value) < 1e12


# ------------------------------------------------------------------ labels that would be ignored


@functools.lru_cache(maxsize=1000)
def looks_like_label(column):
    """Returns whether a column, by its name, says which response is better."""
    words = set(re.findall("[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()))
    return bool(words & LABEL_WORDS) and words <= LABEL_WORDS | WORDS_BESIDE


def check_labels(record, column):
    """Raises ValueError if a record has a column with a label that would be ignored. column: the
    one that its response is in: "completion", "messages", "chosen" or "responses"."""
    read, advice = {"chosen": ({"chosen", "rejected"}, "'chosen' and 'rejected'"),
                    "responses": ({"ranks"}, "'ranks'")}.get(
        column, ({"label"}, "'label', which is false for what is not to be imitated"))
    values = record.get("responses")
    unranked = (column == "responses" and isinstance(values, list)
                and record.get("ranks") is None and record.get("scores") is None)
    for name, value in record.items():
        of_a_side = column == "chosen" and re.match("chosen|rejected", name)    # chosen_model
        if not (value is None or name in read or of_a_side) and looks_like_label(name):
            raise ValueError(f"column {name!r} looks like a label of which response is better, and "
                             f"would be ignored; put what it says into {advice}, or leave it out")
        if (unranked and name != column and isinstance(value, list) and len(value) == len(values)
                and all(map(is_number, value)) and len(set(value)) > 1):
            raise ValueError(f"column {name!r} has a number for each of the 'responses' and "
                             "would be ignored; call it 'scores' (the highest is best) or 'ranks' "
                             "(1 is best), or leave it out")
    if column == "chosen" and record.get("scores") is not None:
        raise ValueError("column 'scores' belongs to 'responses' and would be ignored; next to "
                         "'chosen' and 'rejected' come 'score_chosen' and 'score_rejected'")


# ------------------------------------------------------------------ all records


def load_rows(data, demonstrations=False, skip_bad_rows=False, hub=None, say=print, prepare=None):
    """Yields the rows of a file, a folder or a data set on the hub, "name" or "name:split".

    demonstrations: whether to read demonstrations; preferences serve too, by their chosen
    responses. skip_bad_rows: leave bad rows out; otherwise InputError names the file and its bad
    rows. hub: what `open_hub` returned, if it has been called. say: called with lines on what is
    read, what was left out or changed, and what looks like a mistake. prepare: called with each row
    and a Counter of notes (see parse_rows); it may change the row, and a ValueError from it makes
    the row a bad one.
    """
    def parsed():
        for number, record in read_records(data, hub, say):
            notes = Counter()
            try:
                yield number, record, parse_rows(record, demonstrations, notes), notes
            except (ValueError, OverflowError, RecursionError) as error:
                yield number, record, error, notes

    bad, n_rows, unwanted, notes = [], 0, 0, Counter()
    oddities = Oddities(demonstrations)
    records = parsed()
    first = list(islice(records, 1000))
    counts = {}         # {(what, how many of it a row has): in how many rows}
    for _, _, rows, _ in first:
        for row in rows if isinstance(rows, list) else ():
            for what_and_size in sizes_of(row):
                counts[what_and_size] = counts.get(what_and_size, 0) + 1
    usual = dict(sorted(reversed(counts), key=counts.get))      # of each the most frequent one
    for number, record, rows, notes_of_record in chain(first, records):
        try:
            if not isinstance(rows, list):
                raise rows
            for row in rows:
                for what, size in sizes_of(row):
                    if size != usual.get(what, size):
                        raise ValueError(f"{size} {what}, most rows have {usual[what]}; they must "
                                         "be as many")
                if prepare is not None:
                    prepare(row, notes_of_record)
        except (ValueError, OverflowError, RecursionError) as error:
            bad.append((number, in_a_line(error)))
            continue
        notes.update(notes_of_record)
        unwanted += not rows
        n_rows += len(rows)
        oddities.count(record, rows)
        if skip_bad_rows or not bad:
            yield from rows
    if bad and not (skip_bad_rows and n_rows):
        advice = "; --skip_bad_rows leaves them out" if n_rows else ""
        if not n_rows and bad[0][1].startswith("needs columns"):
            advice = "; docs/layouts.md converts the layouts of well-known data sets"
        raise InputError(f"--data: {data}: {describe(bad)}{advice}")
    if bad:
        say(f"{len(bad)} bad row{'s' if len(bad) > 1 else ''} skipped: {describe(bad)}")
    for note, count in notes.items():
        message = note.format(count)
        say(message.replace("1 rows", "1 row", 1) if count == 1 else message)
    if unwanted:
        say(f"{unwanted} demonstrations left out, as their label is false")
    for message in oddities.messages():
        say(message)
    if not n_rows:
        raise InputError(f"--data: {data}: the file has no rows")


def sizes_of(row):
    """Yields (what, how many of it a row has), which must be the same in all rows."""
    yield "responses", len(row["responses"])
    if "scores" in row:
        yield "scores for each response", len(row["scores"][0])


def describe(bad, most=5):
    """Turns [(row number, what is wrong)] into "row 3: it is empty; rows 4, 9: ...": the first of
    each kind of error, and how many more there are."""
    rows = {}
    for number, message in bad:
        rows.setdefault(message, []).append(str(number))
    parts = []
    for message, numbers in list(rows.items())[:most]:
        more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
        rows_are = "rows" if len(numbers) > 1 else "row"
        parts.append(f"{rows_are} {', '.join(numbers[:most])}{more}: {message}")
    others = sum(map(len, list(rows.values())[most:]))
    return "; ".join(parts + [f"and {others} more"] * bool(others))


def row_texts(row):
    """Returns (the prompt, [the responses]) of a row as text. Of chat messages these are the last
    message of the prompt, and what the assistant says in each response."""
    if isinstance(row["prompt"], str):
        return row["prompt"], row["responses"]
    replies = ["\n".join(message["content"] for message in response if is_assistant(message))
               for response in row["responses"]]
    return row["prompt"][-1]["content"].rstrip() + "\n", replies


# ------------------------------------------------------------------ what looks like a mistake


def oddities_of(prompt, responses):
    """Yields the numbers of those lines of ODD that are true of a row (texts)."""
    if not prompt.strip():
        yield 0
    if prompt[-1:] in (" ", "\t"):
        yield 1
    # Chinese or Japanese words run together anyway.
    if any(not (prompt[-1].isspace() or text[0].isspace() or max(prompt[-1], text[0]) >= "\u2e80")
           for text in responses if prompt and text):
        yield 2


ODD = (     # (the share of rows above which this is said, what is said)
    (0, "in {} rows the prompt is empty"),
    (0.5, "{} prompts end in a space; tokens have it in front of a word, so it belongs at the "
     "beginning of the response"),
    (0.5, "in {} rows there is neither a space nor a new line between prompt and response: the "
     "response follows the prompt's last letter; begin responses with a space, or end prompts in a "
     "new line"),
    (0.5, "in {} rows the chosen response has the lower score; are the columns swapped, or is a "
     "lower score better?"))
SWAPPED = 3     # the last of them


class Oddities:
    """Counts what looks like a mistake in the rows of a file; `messages` says what was found."""

    def __init__(self, demonstrations):
        self.read = READ_AS_DEMONSTRATIONS if demonstrations else READ
        self.n, self.scored = 0, 0
        self.odd = Counter()                # {number of a line of ODD: rows}
        self.ignored = set()                # columns with something in them that is not read

    def count(self, record, rows):
        """Counts one record of the file, and the rows that were made of it."""
        labelled = {"completion", "label"} if rows and "desirable" in rows[0] else set()
        self.ignored |= {column for column in record.keys() - self.read - labelled
                         if record[column] not in (None, "", [], {})}
        for row in rows:
            self.n += 1
            self.odd.update(oddities_of(*row_texts(row)))
            if "scores" in row and "ranks" not in record:     # ranks decide, and say so
                self.scored += 1
                self.odd[SWAPPED] += sum(row["scores"][0]) < sum(row["scores"][-1])

    def messages(self):
        """Yields lines of text, none if nothing is odd."""
        if self.ignored:
            columns = sorted(f"{column!r}" for column in self.ignored)
            yield f"columns that are not read: {listed(columns, 20)}"
        for number, (share, message) in enumerate(ODD):
            n = self.scored if number == SWAPPED else self.n
            if self.odd[number] > share * n:
                yield f"warning: {message.format(f'{self.odd[number]} of {n}')}"
