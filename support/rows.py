"""Reads rows of text from files and from the Hugging Face hub, in every layout of preferences.

A row is {"prompt": str, "responses": [str, ...]}, the better response first, and "scores" if
rewards came with it. What a record may look like, in TRL's column names where it has some:

    prompt, chosen, rejected    a preference pair
    score_chosen, score_rejected    next to it: numbers, or lists of them
    chosen, rejected            whole dialogues, or posts with their TL;DR: the prompt is what they
                                have in common
    prompt, responses           K of them, the best first; or in the order of `ranks` (1 is best);
                                or of `scores` (as above); or with `pairs`, [[i, j], ...] for
                                "response i is better than j", or with `chosen` and `rejected` (one
                                of them each, or its index): then a pair each
    prompt, completion          a demonstration, for supervised fine-tuning; but not if `label` is
                                false (or 0, no, undesirable, ...)
    messages                    a dialogue: each turn of the assistant is a demonstration

Other columns are ignored, but not if they look like a label of which response is better.

A prompt or a response is text or a list of chat messages, [{"role": "user", "content": "Hi"}, ...]
(roles user, assistant, system). They become text as in Anthropic's HH data: "Human: Hi" and
"Assistant: Hello!", each after an empty line, and a prompt ends in "Assistant:".

JSON, CSV and Parquet files are read here, a part at a time, and nothing of them is kept: what is
trained on is what is in the file now. (`datasets` would keep a copy, named by path and time, and
guess types: it is asked for the hub alone.)
"""
import contextlib
import csv
import datetime
import functools
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from itertools import takewhile

from support.flags import InputError, in_a_line
from support.oddities import Oddities, is_false, is_gap
from support.sources import ENDINGS, folder_files, name_and_split, open_hub

PREFERENCES = (("chosen", "rejected"), ("prompt", "responses"))     # columns needed, either or
DEMONSTRATIONS = (("prompt", "completion"), ("messages",), *PREFERENCES)
BLANK = re.compile("[\\s\\u200b-\\u200f\\u2060\\ufeff]*")     # with characters that nobody sees
PART = 2 ** 20          # characters of JSON that are read in one go, or more for a longer record

# Chat messages that a program wrote as text: one, a list of them, an array of numpy
WRITTEN_MESSAGES = re.compile(r"""\s*(array\()?(\[\s*\{\s*["'](role|content|from|value)["']\s*:|"""
                              r"""\{\s*["'](role|from)["']\s*:\s*["']\w+["']\s*,\s*"""
                              r"""["'](content|value)["']\s*:)""")

# The name of a column that says which response is better has a word of the first kind, and no word
# but these: `preferred`, `better_response_id`, `isChosen`; but not `preference_strength`.
LABEL_WORDS = frozenset(
    "label labels prefer prefers preferred preference preferences winner winning loser losing "
    "better best worse worst safer choice selected accepted liked desirable chosen rejected rank "
    "ranks ranking rankings pairs kto".split())
WORDS_BESIDE = frozenset(
    "a b is the of response responses answer answers completion completions output outputs summary "
    "text side id ids idx index number human gold ai gpt model tie tag user annotator final "
    "overall".split())
# A column such as `is_good` beside a demonstration says whether it is wanted, if it says yes or no.
QUALITY_WORDS = frozenset("good correct approved upvoted vote thumbs feedback".split())
WORDS_BESIDE_QUALITY = frozenset("is the response completion human user".split())

# ------------------------------------------------------------------ chat messages and prompts


def chat_text(messages):
    """Turns chat messages into plain text: "\n\nHuman: ...\n\nAssistant: ..."."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def implicit_prompt(*texts):
    """Returns the prompt that whole texts share: their common prefix up to its last "Assistant:",
    or "TL;DR:" at the start of a line; "" if there is none. Other texts have no implicit prompt:
    the common prefix can have the responses' first words in it, and then two pairs on the same post
    have different prompts, and one of them may train while the other is held out."""
    common = os.path.commonprefix(texts)
    ends = [match.end() for match in re.finditer(r"\n\nAssistant:|\nTL;DR:", common)]
    return common[:ends[-1]] if ends else ""


def text_of(value, column, prompt=None):
    """Returns the text in a column: text unchanged, numbers and dates as they are written, chat
    messages as `chat_text`. ValueError if it is none of these."""
    value = None if is_gap(value) else value
    if isinstance(value, (bool, int, float)):       # a column of numbers is text all the same
        value = json.dumps(value)
    elif isinstance(value, (datetime.date, datetime.time)):         # Parquet has these
        value = str(value)
    messages = isinstance(value, list)
    if messages:
        try:
            value = chat_text(value)
        except (KeyError, TypeError):
            raise ValueError(f"column {column!r} is not a list of chat messages with a role (user, "
                             "assistant or system) and a text as content") from None
    if value is None:
        raise ValueError(f"column {column!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is neither text nor chat messages")
    if WRITTEN_MESSAGES.match(value) and value.rstrip().endswith(("}", "]", ")")):
        raise ValueError(f"column {column!r} has a list of chat messages written out as text; save "
                         "the data as JSONL or Parquet")
    try:
        value.encode()
    except UnicodeEncodeError:      # half a letter, in a file or as JSON's "\ud83d"
        raise ValueError(f"column {column!r} is not utf-8 text") from None
    value = value.replace("\r\n", "\n")       # dialogues are split at their blank lines
    if messages and column == "prompt":
        value += "\n\nAssistant:"
    elif messages and prompt is not None:   # may stand again before the response
        value = value.removeprefix(prompt).removeprefix("\n\nAssistant:")
        if value.startswith(("\n\nHuman:", "\n\nSystem:")):
            raise ValueError(f"column {column!r} is a dialogue that does not begin with the prompt")
    return value


def assistant_turns(prompt, response):
    """Splits a response that goes on with the dialogue of its prompt into the turns of the
    assistant: a list of (prompt, response), each prompt being all that was said before. Other
    responses are one turn. ValueError if there is no turn."""
    if not prompt.endswith("\n\nAssistant:"):
        return [(prompt, response)]
    dialogue, turns = prompt + response, []
    starts = [match for match in re.finditer(r"\n\n(Human|Assistant|System):", dialogue)
              if match.end() >= len(prompt)]
    ends = [match.start() for match in starts[1:]] + [len(dialogue)]
    for start, end in zip(starts, ends):
        if start[1] == "Assistant" and end > start.end():
            turns.append((dialogue[:start.end()], dialogue[start.end():end]))
    if not turns:
        raise ValueError("the assistant says nothing in it")
    return turns


# ------------------------------------------------------------------ one record


def parse_rows(record, demonstrations, notes=None):
    """Returns the rows in one record of a file: preferences, one or one for each of its `pairs`; or
    demonstrations, one for each turn of the assistant, none if the label is false. ValueError says
    what is wrong. notes: a Counter of what was done to rows, each "{} rows ..." for a number."""
    if isinstance(record, ValueError):      # in place of a record that could not be read
        raise record
    if not isinstance(record, dict):
        raise ValueError("not a JSON object" + "; an array of them belongs into a file that ends "
                         "in .json" * isinstance(record, list))
    notes = Counter() if notes is None else notes
    layouts = DEMONSTRATIONS if demonstrations else PREFERENCES
    if not any(set(columns) <= record.keys() for columns in layouts):
        wanted = ", or ".join(" and ".join(columns) for columns in layouts)
        raise ValueError(f"needs columns {wanted}; has {', '.join(map(str, record)) or 'none'}")
    record = {str(name): None if is_gap(value) else value for name, value in record.items()}
    if not demonstrations:
        check_labels(record, demonstration=False)
        return [parse_row(part, False, notes) for part in pairs_of(record, demonstrations)]

    demonstration = record.get("completion") is not None or bool(record.get("messages"))
    check_labels(record, demonstration)
    if demonstration and is_false(record.get("label")):
        return []
    parts = [record] if demonstration else pairs_of(record, demonstrations)
    rows = []
    for part in parts:
        row = parse_row(prompt_and_completion(part), True, notes)
        rows += [{"prompt": prompt, "responses": [response]}
                 for prompt, response in assistant_turns(row["prompt"], *row["responses"])]
    if demonstration:
        check_not_rejected(record, rows)
    return rows


# ------------------------------------------------------------------ labels


def looks_like_label(column):
    """Returns whether the name of a column says that it tells which response is better."""
    return has_words(column, LABEL_WORDS, WORDS_BESIDE)


@functools.lru_cache(maxsize=1000)
def has_words(column, wanted, beside):
    """Returns whether a name has one of the wanted words, and no others but these and those beside
    them."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()
    words = set(re.findall(r"[a-z]+", name))
    return bool(words & wanted) and words <= wanted | beside


def says_no(column, value):
    """Returns whether a column beside a demonstration says that it is not wanted, such as is_good:
    false."""
    try:
        return has_words(column, QUALITY_WORDS, WORDS_BESIDE_QUALITY) and is_false(value)
    except ValueError:      # it says something else
        return False


def check_labels(record, demonstration):
    """Raises ValueError if a record has a column with a label that would be ignored. demonstration:
    is it read as one, from `completion` or `messages`?"""
    has_pair = record.get("chosen") is not None and record.get("rejected") is not None
    has_ranking = record.get("responses") is not None
    read = {"label"} if demonstration else set()
    if has_ranking:
        read |= {"ranks", "pairs"}
        if not demonstration:
            read |= {"chosen", "rejected"}
    for column, value in record.items():
        of_a_side = has_pair and re.match("chosen|rejected", column)    # such as chosen_model
        is_label = looks_like_label(column) or demonstration and says_no(column, value)
        if value is None or column in read or of_a_side or not is_label:
            continue
        if column in ("chosen", "rejected") and not demonstration and not has_ranking:
            continue        # half a pair: what is missing is named later
        advice = ("'label', which is false for what is not to be imitated" if demonstration
                  else "'chosen' and 'rejected'")
        raise ValueError(f"column {column!r} looks like a label of which response is better, and "
                         f"would be ignored; put what it says into {advice}, or leave it out")
    if has_ranking and not demonstration:
        check_ranking_labels(record)
    if has_pair and not has_ranking and record.get("scores") is not None:
        raise ValueError("column 'scores' belongs to 'responses' and would be ignored; beside "
                         "'chosen' and 'rejected' it takes 'score_chosen' and 'score_rejected'")


def check_ranking_labels(record):
    """Raises ValueError if two columns say in which order `responses` are, or a column that is not
    read may do so."""
    sources = [column for column in ("ranks", "pairs") if record.get(column) is not None]
    sources += [column for column in ("chosen", "rejected") if record.get(column) is not None][:1]
    if len(sources) > 1:
        raise ValueError(f"columns {sources[0]!r} and {sources[1]!r} both say which of the "
                         "'responses' is better; keep one of them")
    if sources or record.get("scores") is not None or not isinstance(record["responses"], list):
        return
    for column, value in record.items():
        if column == "responses":
            continue
        numbers = numbers_in(value)
        if len(numbers) == len(record["responses"]) and len(set(numbers)) > 1:
            raise ValueError(f"column {column!r} has a number for each of the 'responses' and "
                             "would be ignored; call it 'scores' (the highest is best) or 'ranks' "
                             "(1 is best), or leave it out")


def numbers_in(values):
    """Lists the numbers of a list. They may be written as text, or stand in objects under a name
    such as `rating`. Returns an empty list if it is no such list."""
    numbers = []
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict):
            value = next((value[name] for name in ("rating", "score", "reward", "rank", "label")
                          if name in value), None)
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):      # none, or a text
            return []
    return numbers


def check_not_rejected(record, demonstrations):
    """Raises ValueError if what is to be imitated is a worse response of a preference in the same
    record."""
    if not {"chosen", "responses"} & record.keys():
        return
    try:
        preferences = parse_rows({**record, "label": None}, False)
    except ValueError:          # there is none
        return
    text = demonstrations[-1]["responses"][0].strip()
    better = {row["responses"][0].strip() for row in preferences}
    worse = {response.strip() for row in preferences for response in row["responses"][1:]}
    if text in worse - better:
        column = "completion" if record.get("completion") is not None else "messages"
        raise ValueError(f"column {column!r} is what was rejected in the preference next to it")


def pairs_of(record, demonstrations):
    """Splits a record whose labels of `responses` stand in `pairs`, or in `chosen` and `rejected`,
    into one record for each pair, with columns `chosen` and `rejected`; returns other records
    unchanged. For demonstrations there is a record for each response that is never the worse one,
    or for `sft_target`."""
    listed, pairs = record.get("responses"), record.get("pairs")
    if listed is None:
        return [record]
    if demonstrations and record.get("sft_target") is not None:
        return [{"prompt": record.get("prompt"), "completion": record["sft_target"]}]
    sides = {side: record[side] for side in ("chosen", "rejected") if record.get(side) is not None}
    if pairs is None and not sides:
        return [record]
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError("column 'responses' is not a list of two responses or more")
    pairs = [pair_among(listed, sides)] if pairs is None else check_pairs(pairs, len(listed))
    if demonstrations:
        losers = {worse for _, worse in pairs}
        first_of = {better: [better, worse] for better, worse in reversed(pairs)
                    if better not in losers}
        pairs = list(reversed(first_of.values()))
        if not pairs:
            raise ValueError("column 'pairs' goes round in a circle: no response is the best")
    scores = record.get("scores")
    if scores is not None:
        scores = check_scores(scores, len(listed))
    rest = {name: value for name, value in record.items()
            if name not in ("responses", "pairs", "scores", "sft_target")}
    records = []
    for better, worse in pairs:
        pair = {"chosen": listed[better], "rejected": listed[worse]}
        if scores:
            pair |= {"score_chosen": scores[better], "score_rejected": scores[worse]}
        records.append(rest | pair)
    return records


def check_pairs(pairs, K):
    """Returns a column `pairs`: [[i, j], ...], response i being better than j. ValueError if it is
    not that."""
    is_pairs = isinstance(pairs, list) and len(pairs) > 0 and all(
        isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
        and all(type(k) is int and 0 <= k < K for k in pair) for pair in pairs)
    if not is_pairs:
        raise ValueError("column 'pairs' is not a list of [better, worse], two different numbers "
                         f"from 0 to {K - 1} which count the 'responses'")
    return pairs


def pair_among(listed, sides):
    """Returns [index of `chosen`, index of `rejected`] among a list of responses. sides: the
    columns that there are, one of `responses` or its index each; of two responses one is enough."""
    texts, places = [last_text(response) for response in listed], {}
    for side, value in sides.items():
        if type(value) is int and 0 <= value < len(listed) and value not in listed:
            places[side] = value
        elif last_text(value) in texts:
            places[side] = texts.index(last_text(value))
        else:
            raise ValueError(f"column {side!r} is none of the 'responses', nor the index of one")
    if len(places) == 1 and len(listed) == 2:
        places |= {side: 1 - place for place in places.values()
                   for side in ("chosen", "rejected") if side not in places}
    if len(set(places.values())) != 2:
        raise ValueError("columns 'chosen' and 'rejected' do not name two of the 'responses'")
    return [places["chosen"], places["rejected"]]


def last_text(value):
    """Returns a response without the white space around it; of a dialogue, its last message."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value.strip() if isinstance(value, str) else value


# ------------------------------------------------------------------ a prompt and its responses


def prompt_and_completion(record):
    """Divides a demonstration in chat messages between its columns `prompt` and `completion` such
    that the completion begins with a turn of the assistant. Returns other records unchanged."""
    column = "completion" if record.get("completion") is not None else "messages"
    prompt, completion = record.get("prompt"), record.get(column)
    if not isinstance(completion, list) or not completion:
        if "messages" in record and not {"completion", "chosen", "responses"} & record.keys():
            raise ValueError("column 'messages' is missing, or is no list of chat messages")
        return record
    if column == "messages" or prompt is None:
        prompt = []
    elif not isinstance(prompt, list):      # what the person says, if that is not in the dialogue
        prompt = [{"role": "user", "content": prompt}] if is_assistant(completion[0]) else []
    if completion[:len(prompt)] == prompt:
        completion = completion[len(prompt):]
    opening = list(takewhile(lambda message: not is_assistant(message), completion))
    if len(opening) == len(completion):
        raise ValueError(f"column {column!r} has no turn of the assistant")
    for message in completion[len(opening):]:
        if is_assistant(message) and (message.get("weight") == 0 or message.get("train") is False):
            raise ValueError(f"column {column!r} has a turn of the assistant that is not to be "
                             "imitated (weight 0, or train false); end the dialogue before it, or "
                             "put what comes before the turn to imitate into 'prompt'")
    return {"prompt": prompt + opening, "completion": completion[len(opening):]}


def is_dialogue(value):
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def is_said(prompt, messages):
    """Returns whether the text of a prompt is in one of the messages, or one of them in it."""
    prompt = prompt.strip()
    said = [str(message.get("content")).strip() for message in messages]
    return any(prompt in text or text and text in prompt for text in said)


def is_assistant(message):
    return isinstance(message, dict) and message.get("role") == "assistant"


def parse_row(record, demonstrations, notes=None):
    """Turns one record of a file, in any of the layouts, into a row. ValueError says what is wrong.
    notes: see parse_rows."""
    notes = Counter() if notes is None else notes
    from_preference = any(record.get(column) is not None for column in ("chosen", "responses"))
    if demonstrations and "completion" in record and not (
            record["completion"] is None and from_preference):
        columns = ["completion"]
    elif record.get("responses") is not None:
        columns = ["responses"]
    else:
        columns = ["chosen", "rejected"]
    ranking = columns == ["responses"]
    texts = record["responses"] if ranking else [record.get(column) for column in columns]

    prompt, scores = record.get("prompt"), None
    if isinstance(prompt, str) and isinstance(texts, list) and texts and is_dialogue(texts[0]):
        # The responses are dialogues, which either hold the prompt themselves, or are one message
        # each; then the text is what the person says.
        before = texts[0][:-1]
        if not before or is_assistant(before[0]):
            before = [{"role": "user", "content": prompt}]
        elif not is_said(prompt, before):
            notes["warning: in {} rows the dialogues have another prompt than 'prompt'; theirs is "
                  "taken"] += 1
        prompt = before
    if "prompt" in record or ranking:
        prompt = text_of(prompt, "prompt")

    if ranking:
        responses, scores = parse_ranking(record, prompt, notes)
        columns *= len(responses)
    else:
        responses = [text_of(text, column, prompt) for text, column in zip(texts, columns)]
        score_columns = [f"score_{column}" for column in columns]
        values = [record.get(column) for column in score_columns]
        if len(columns) == 2 and values != [None, None]:
            scores = scores_of(values, score_columns)

    if prompt is None:
        if len(responses) == 1:
            raise ValueError("column 'prompt' is missing")
        prompt = implicit_prompt(*responses)
        if not prompt:
            raise ValueError("there is no column 'prompt', and 'chosen' and 'rejected' share no "
                             "beginning that ends in 'Assistant:' or 'TL;DR:'; what they answer "
                             "belongs into a column 'prompt'")
        responses = [response[len(prompt):] for response in responses]
    else:
        prompt, responses = prompt_once(prompt, responses, notes)
    for column, response in zip(columns, responses):
        # In a whole dialogue a blank turn is what the assistant said; a blank column is a mistake.
        empty = BLANK.fullmatch(response) if "prompt" in record else not response
        if empty:
            raise ValueError(f"the response {column!r} is empty")
    if demonstrations:
        return {"prompt": prompt, "responses": responses[:1]}
    row = {"prompt": prompt, "responses": responses}
    if scores:
        row["scores"] = scores
    return row


def prompt_once(prompt, responses, notes):
    """Takes the prompt off responses that begin with it. Both are text. Returns (prompt,
    responses).

    All of the responses have to begin with it, and to go on. Where only some do, they may repeat
    the question: they stay as they are, and `notes` counts them."""
    text = prompt.strip()
    if not text:
        return prompt, responses
    if all(response.lstrip().startswith(("Human:", "System:")) for response in responses):
        # They may be whole dialogues, in which the prompt is what the person says.
        dialogues = ["\n\n" + response.lstrip() for response in responses]
        spoken = f"\n\nHuman: {text}\n\nAssistant:"
        opening = spoken if len(dialogues) == 1 else implicit_prompt(*dialogues)
        if spoken in opening and all(dialogue.startswith(opening) for dialogue in dialogues):
            notes["{} rows: the responses are dialogues with the prompt in them, which is taken "
                  "off there"] += 1
            return opening, [dialogue[len(opening):] for dialogue in dialogues]

    rests = [after_prompt(prompt, response) for response in responses]
    if all(rest and rest.strip() for rest in rests):
        notes["{} rows: the responses begin with the prompt, which is taken off there"] += 1
        return prompt, rests
    # "... Assistant:" and "Assistant: Hello!"
    label = text.rpartition("\n")[2]
    if label.endswith(":") and all(response.lstrip().startswith(label) for response in responses):
        rests = [response.lstrip().removeprefix(label) for response in responses]
        if all(rest.strip() for rest in rests):
            notes["{} rows: the responses begin with the prompt's last line, which is taken off "
                  "there"] += 1
            return prompt, rests
    if any(rest is not None for rest in rests):
        notes["{} rows: a response begins with the prompt, but not all do or nothing comes after "
              "it; they are left as they are"] += 1
    return prompt, responses


def after_prompt(prompt, response):
    """Returns what comes after the prompt in a response that begins with it, in the middle of no
    word; else None. The prompt may stand there without the white space around it."""
    for beginning in (prompt, prompt.rstrip(), prompt.strip()):
        if response.startswith(beginning):
            rest = response[len(beginning):]
            if beginning[-1].isalnum() and rest[:1].isalnum():
                return None
            return rest.removeprefix(prompt[len(prompt.rstrip()):]) if beginning != prompt else rest
    return None


def scores_of(values, columns):
    """Returns the rewards of K responses, numbers or lists with a number per reward model, as K
    lists."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    for numbers, column in zip(lists, columns):
        if numbers == [None]:
            which = " one of its numbers" if column == "scores" else ""
            raise ValueError(f"column {column!r} is missing{which}")
        # whose squares are finite in float32
        if not numbers or not all(isinstance(x, (int, float)) and abs(x) < 1e12 for x in numbers):
            raise ValueError(f"column {column!r} is neither a number below 1e12 nor a list of them")
        if len(numbers) != len(lists[0]):
            raise ValueError(f"column {column!r} has {len(numbers)} numbers for one response, "
                             f"{len(lists[0])} for another")
    return lists


def check_scores(scores, K):
    """Returns a column `scores`, rewards of K responses, as K lists. ValueError if it is not
    that."""
    if not isinstance(scores, list) or len(scores) != K:
        raise ValueError(f"column 'scores' is not a list of {K}, one number or list for each "
                         "response")
    return scores_of(scores, ["scores"] * K)


def parse_ranking(record, prompt, notes):
    """Reads a list of responses, the best first, or with `ranks` (1 is best) or else `scores` that
    say which is best. Returns (responses, the best first, and their scores or None)."""
    listed = record["responses"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError("column 'responses' is not a list of two responses or more")
    if any(response is None or is_gap(response) for response in listed):
        raise ValueError("column 'responses' is missing one of its texts")
    responses = [text_of(response, "responses", prompt) for response in listed]
    K = len(responses)
    if 1 < len(set(responses)) < K:
        notes["{} rows: two of the responses are the same; neither is better"] += 1

    scores = record.get("scores")
    if scores is not None:
        scores = check_scores(scores, K)

    order = record.get("ranks")
    if order is None:
        order = [-sum(numbers) for numbers in scores] if scores else range(K)
    elif not is_list_of_numbers(order, K):
        raise ValueError(f"column 'ranks' is not a list of {K} numbers, one for each response")

    # A tie is broken by a hash of the text, which is as good as by chance; with the prompt in it,
    # so that "yes" does not always win against "no".
    if len(set(order)) < K:
        notes["{} rows: a tie in their 'ranks' or 'scores' is broken by chance"] += 1
    ties = [hashlib.sha256(f"{response}\0{prompt}".encode()).digest() for response in responses]
    by_rank = sorted(range(K), key=lambda k: (order[k], ties[k]))
    if scores:
        scores = [scores[k] for k in by_rank]
        if sum(scores[0]) < max(map(sum, scores)):
            notes["{} rows: 'ranks' and 'scores' have another response as the best; the ranks "
                  "decide"] += 1
    return [responses[k] for k in by_rank], scores


def is_list_of_numbers(values, n):
    return (isinstance(values, list) and len(values) == n
            and all(isinstance(x, (int, float)) and abs(x) < 1e12 for x in values))


# ------------------------------------------------------------------ files and the hub


def load_rows(data, demonstrations=False, skip_bad_rows=False, hub=None, say=print, prepare=None):
    """Yields the rows of a file, folder or hub data set, "name" or "name:split"; for
    demonstrations, preferences serve too (their chosen responses). InputError names the file and
    its bad rows; with skip_bad_rows these are left out. hub: what `open_hub` gave, if it has been
    called. say: is called with what is read, what was left out or changed, and what looks like a
    mistake. prepare: is called with each row and a Counter of notes (see parse_rows) and may change
    the row; a ValueError from it makes the row a bad one."""
    source, _ = name_and_split(data)
    check_is_file(source)
    if hub is None and not os.path.exists(source):
        hub = open_hub(data)
    bad, n_rows, unwanted, notes = [], 0, 0, Counter()
    oddities = Oddities(demonstrations)
    sizes = {} if demonstrations else usual_sizes(data, hub)
    for number, record in read_records(data, hub, say):
        notes_of_record = Counter()
        try:
            rows = parse_rows(record, demonstrations, notes_of_record)
            for row in rows:
                check_sizes(row, sizes)
                if prepare is not None:
                    prepare(row, notes_of_record)
        except (ValueError, OverflowError, RecursionError) as error:
            bad.append((number, in_a_line(error)))
            continue
        if notes_of_record:
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


def usual_sizes(data, hub=None):
    """Counts how many responses, and scores for each, most records of preferences have: {name:
    number}."""
    sizes = Counter()
    for _, record in read_records(data, hub, say=lambda line: None):
        if isinstance(record, dict):
            sizes[sizes_of_record(record)] += 1
    if not sizes:
        return {}
    responses = Counter()
    for (K, _), count in sizes.items():
        responses[K] += count
    usual = {"responses": responses.most_common(1)[0][0]}
    scores = Counter({M: count for (K, M), count in sizes.items()
                      if K == usual["responses"] and M})
    if scores:
        usual["scores for each response"] = scores.most_common(1)[0][0]
    return usual


def sizes_of_record(record):
    """Returns (responses in each row, scores for each response or 0) of a record that need not be
    right."""
    labels = [record.get(column) for column in ("pairs", "chosen", "rejected")]
    listed, scores = record.get("responses"), record.get("scores")
    is_ranking = isinstance(listed, list) and all(label is None for label in labels)
    if not isinstance(listed, list):
        scores = [record.get("score_chosen")]
    score = scores[0] if isinstance(scores, list) and scores else None
    M = len(score) if isinstance(score, list) else int(score is not None and not is_gap(score))
    return len(listed) if is_ranking else 2, M


def check_sizes(row, sizes):
    """Raises ValueError if a row has not as many responses, or scores for each, as most rows
    have."""
    own = {"responses": len(row["responses"])}
    if "scores" in row:
        own["scores for each response"] = len(row["scores"][0])
    for name, size in own.items():
        if sizes.get(name, size) != size:
            raise ValueError(f"{size} {name}, most rows have {sizes[name]}; they must be as many")


def check_is_file(path):
    """Raises InputError if there is something with this name that is neither a file nor a folder: a
    pipe or a device may have no end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"--data: {path}: a pipe, socket or device, not a file; save what comes "
                         "out of it in a file first")


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
    if others:
        parts.append(f"and {others} more")
    return "; ".join(parts)


def read_records(data, hub=None, say=print):
    """Yields (row number, record) of a JSONL, JSON, CSV or Parquet file (text also gzipped), of the
    files of one split of a folder, or of a hub data set; say: is called with the files or the split
    that are read. In place of a record that can't be read stands the ValueError that says why.
    InputError if the rest can't be read either."""
    try:
        source, split = name_and_split(data)
        if os.path.isfile(source):
            yield from read_file(source)
        elif os.path.isdir(source):
            for file in folder_files(source, split, say):
                for number, record in read_file(os.path.join(source, file)):
                    yield f"{number} of {file}", record
        else:
            hub = hub or open_hub(data)
            if hub.split:
                others = [name for name in hub.info.splits or () if name != str(hub.split)]
                not_read = f"; not read: {', '.join(others)}" if others else ""
                say(f"reads the split {hub.split}{not_read}")
            batches = hub.iter(1000)        # {name: list of values}
            records = (dict(zip(batch, values)) for batch in batches
                       for values in zip(*batch.values()))
            yield from enumerate(records, 1)
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"--data: {data}: not a whole gzip file: {error}") from error
    except Exception as error:     # pyarrow and datasets raise whatever their readers do
        reason = in_a_line(error.__cause__ or error)
        raise InputError(f"--data: {data}: {reason}") from error


KINDS = {       # the first bytes of a file: what it is
    b"\xff\xfe": "UTF-16 text; save it as UTF-8", b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"{\0": "UTF-16 text; save it as UTF-8", b"\0{": "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "packed with gzip",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it", b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip file or a spreadsheet; unpack it, or save it as CSV",
    b"BZh": "packed with bzip2; unpack it", b"\xfd7zXZ": "packed with xz; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch it with git lfs pull",
    b"<!DOCTYPE html": "a web page", b"<html": "a web page"}


def read_file(path):
    """Yields what `read_records` does, of one file."""
    suffix = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix not in ENDINGS:
        raise InputError(f"--data: {path}: files end in {', '.join(ENDINGS)}, or one of these and "
                         ".gz")
    check_is_file(path)
    if os.path.getsize(path) == 0:
        raise InputError(f"--data: {path}: the file is empty")
    check_content(path, suffix)
    if suffix == "parquet":
        yield from enumerate(parquet_records(path), 1)
        return
    open_text = gzip.open if path.lower().endswith(".gz") else open
    # A byte that is not UTF-8 becomes half a letter, which `text_of` refuses where it matters.
    with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from {"jsonl": json_lines, "json": json_values, "csv": csv_records}[suffix](file)


def check_content(path, suffix):
    """Raises InputError if a file begins like one of another kind than its name says."""
    with open(path, "rb") as file:
        beginning = file.read(40)
    for signature, kind in KINDS.items():
        right = (kind == "packed with gzip" and path.lower().endswith(".gz")
                 or kind == "Parquet" and suffix == "parquet")
        if beginning.startswith(signature) and not right:
            raise InputError(f"--data: {path}: by its first bytes it is {kind}")


def unique_names(pairs):
    """Makes an object of some (name, value). ValueError if a name is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        check_unique([name for name, _ in pairs])
    return record


def check_unique(names):
    """Raises ValueError if a column is there twice: which of them is meant?"""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"column {twice[0]!r} is there twice")


DECODER = json.JSONDecoder(object_pairs_hook=unique_names)


def json_lines(file):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, DECODER.decode(line.removeprefix("\ufeff"))
            except RecursionError:
                yield number, ValueError("JSON nested too deeply")
            except ValueError as error:
                if number == 1 and line.strip().startswith("["):
                    raise ValueError("row 1: not JSON; an array over several lines belongs into a "
                                     "file that ends in .json") from None
                yield number, ValueError(f"not JSON: {error}")


def json_values(file):
    """Yields the elements of a JSON array, or JSON values one after the other. ValueError beyond
    which nothing can be read."""
    between, decode, number = re.compile(r"[\s,]*"), DECODER.raw_decode, 0
    text = file.read(PART)
    start = between.match(text).end()
    is_array = text.startswith("[", start)
    start += is_array
    while True:
        start = between.match(text, start).end()
        try:
            value, start = decode(text, start)
        except RecursionError:
            raise ValueError(f"row {number + 1}: JSON nested too deeply") from None
        except ValueError as error:     # wrong, or cut off where this part ends
            more = file.read(max(PART, len(text) - start))
            if more:
                text, start = text[start:] + more, 0
                continue
            if text[start:].strip() != ("]" if is_array else ""):
                raise ValueError(f"row {number + 1}: not JSON: {error}") from None
            return
        number += 1
        yield number, value


def csv_records(file):
    """Yields the records of a CSV file. All fields are text but scores; an empty one is missing,
    and one too many is a mistake."""
    csv.field_size_limit(2 ** 31 - 1)       # posts may be long
    reader, number = csv.DictReader(file, strict=True), 0
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if len(names) == 1 and re.search(r"[;\t|]", names[0]):
            raise ValueError("the columns of the first line are not separated by commas")
        check_unique(names)
        reader.fieldnames = names
        for number, fields in enumerate(reader, 1):
            if None in fields:
                yield number, ValueError(f"{len(names) + len(fields[None])} fields, the header "
                                         f"has {len(names)}")
            else:
                yield number, {name: csv_value(name, text) for name, text in fields.items()}
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: not CSV: {error}") from None


def csv_value(name, text):
    if name in ("score_chosen", "score_rejected"):
        with contextlib.suppress(ValueError, TypeError):    # of what is no number, or missing
            return float(text)
    return text or None


def parquet_records(path):
    import pyarrow.parquet  # comes with datasets
    file = pyarrow.parquet.ParquetFile(path)
    check_unique(file.schema_arrow.names)
    for batch in file.iter_batches(1000):
        yield from batch.to_pylist()
