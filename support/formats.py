"""Rows of text from files and from the Hugging Face hub, in every layout of preferences.

A row is {"prompt": str, "responses": [str, ...]}, the better response first, and "scores" if
rewards came with it. What a record may look like, in TRL's column names where it has some:

    prompt, chosen, rejected    a preference pair
    score_chosen, score_rejected    beside it: numbers, or lists of them
    chosen, rejected            whole texts or dialogues: the prompt is what they have in common
    prompt, responses           K of them, the best first; or in the order of `ranks` (1 is best);
                                or of `scores` (as above)
    prompt, completion          a demonstration, for supervised fine-tuning

A prompt or a response is text or a list of chat messages, [{"role": "user", "content": "Hi"}, ...]
(roles user, assistant, system). They become text as in Anthropic's HH data: "Human: Hi" and
"Assistant: Hello!", each after an empty line, and a prompt ends in "Assistant:".
"""
import glob
import gzip
import hashlib
import json
import math
import os
import warnings

from support.flags import InputError

BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}    # file endings
COLUMNS = ("prompt", "completion", "chosen", "rejected", "score_chosen", "score_rejected",
           "responses", "scores", "ranks")

# ------------------------------------------------------------------ chat messages and prompts


def chat_text(messages):
    """Chat messages as plain text: "\n\nHuman: ...\n\nAssistant: ..."."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def implicit_prompt(chosen, rejected):
    """The prompt that two whole texts share: up to the last "Assistant:" of their common prefix in
    a dialogue, up to its last space otherwise. "" if they share nothing."""
    common = os.path.commonprefix([chosen, rejected])
    turn = common.rfind("\n\nAssistant:")
    if turn >= 0:
        return common[:turn + len("\n\nAssistant:")]
    return common[:max(common.rfind(" "), 0)]


def text_of(value, column, prompt=None):
    """The text in a column: text as it is, chat messages as `chat_text`. ValueError if neither."""
    if isinstance(value, list):
        try:
            value = chat_text(value)
        except (KeyError, TypeError):
            raise ValueError(f"column {column!r} is not a list of chat messages with a role (user, "
                             "assistant or system) and a text as content") from None
        if column == "prompt":
            value += "\n\nAssistant:"
        elif prompt is not None:    # may stand again before the response; ends in "Assistant:"
            value = value.removeprefix(prompt).removeprefix("\n\nAssistant:")
            if value.startswith(("\n\nHuman:", "\n\nSystem:")):
                raise ValueError(f"column {column!r} is a dialogue that does not begin with the "
                                 "prompt")
    if value is None:
        raise ValueError(f"column {column!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is neither text nor chat messages")
    return value


# ------------------------------------------------------------------ one record


def parse_row(record, demonstrations):
    """One record of a file, in any of the layouts, as a row. ValueError says what is wrong."""
    if demonstrations and "completion" in record:
        columns = ["completion"]
    elif record.get("responses") is not None:
        columns = ["responses"]
    else:
        columns = ["chosen", "rejected"]
    ranking = columns == ["responses"]
    texts = record["responses"] if ranking else [record.get(column) for column in columns]

    prompt, scores = record.get("prompt"), None
    if isinstance(prompt, str) and isinstance(texts, list) and texts and isinstance(texts[0], list):
        # A text beside dialogues, which either hold the prompt themselves, or are one message each;
        # then the text is what the person says.
        prompt = texts[0][:-1] or [{"role": "user", "content": prompt}]
    if "prompt" in record or ranking:
        prompt = text_of(prompt, "prompt")

    if ranking:
        responses, scores = parse_ranking(record, prompt)
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
                             "beginning of whole words")
        responses = [response[len(prompt):] for response in responses]
    for column, response in zip(columns, responses):
        # In a whole dialogue a blank turn is what the assistant said; a blank column is a mistake.
        empty = not response.strip() if "prompt" in record else not response
        if empty:
            raise ValueError(f"the response {column!r} is empty")
    if demonstrations:
        return {"prompt": prompt, "responses": responses[:1]}
    row = {"prompt": prompt, "responses": responses}
    if scores:
        row["scores"] = scores
    return row


def scores_of(values, columns):
    """Rewards of K responses, numbers or lists with a number per reward model -> K lists."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    for numbers, column in zip(lists, columns):
        if numbers == [None]:
            raise ValueError(f"column {column!r} is missing")
        # finite in float32
        if not numbers or not all(isinstance(x, (int, float)) and abs(x) < 3e38 for x in numbers):
            raise ValueError(f"column {column!r} is neither a number nor a list of numbers")
        if len(numbers) != len(lists[0]):
            raise ValueError(f"column {column!r} has {len(numbers)} numbers for one response, "
                             f"{len(lists[0])} for another")
    return lists


def parse_ranking(record, prompt):
    """A list of responses, the best first, or with `ranks` (1 is best) or else `scores` that say
    which is best. Returns (responses, the best first, and their scores or None)."""
    listed = record["responses"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError("column 'responses' is not a list of two responses or more")
    responses = [text_of(response, "responses", prompt) for response in listed]
    K = len(responses)

    scores = record.get("scores")
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != K:
            raise ValueError(f"column 'scores' is not a list of {K}, one number or list for each "
                             "response")
        scores = scores_of(scores, ["scores"] * K)

    order = record.get("ranks")
    if order is None:
        order = [-sum(numbers) for numbers in scores] if scores else range(K)
    elif not is_list_of_numbers(order, K):
        raise ValueError(f"column 'ranks' is not a list of {K} numbers, one for each response")

    # A tie is broken by a hash of the text, which is as good as by chance.
    ties = [hashlib.sha256(response.encode()).digest() for response in responses]
    by_rank = sorted(range(K), key=lambda k: (order[k], ties[k]))
    if scores:
        scores = [scores[k] for k in by_rank]
    return [responses[k] for k in by_rank], scores


def is_list_of_numbers(values, n):
    return (isinstance(values, list) and len(values) == n
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values))


# ------------------------------------------------------------------ files and the hub


def open_records(data):
    """A datasets.Dataset of a JSONL, JSON, CSV or Parquet file (text also gzipped); or of the
    `train` split of a data set on the hub: owner/name, or owner/name/folder for the files in one
    folder of it; or of a folder like one. InputError says what is wrong."""
    import datasets  # here, so that the rest runs where it is not installed
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)   # we report its troubles below
    suffix = data.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if os.path.isfile(data):
            return open_file(data, suffix)
        if os.path.isdir(data):
            return datasets.load_dataset(data, split="train")
        like_a_path = data.startswith((".", "/", "~")) or data.count("/") > 2
        if suffix in BUILDERS or like_a_path or not data:
            raise InputError(f"--data: {data}: no such file")
        owner_name, folder = "/".join(data.split("/")[:2]), data.split("/")[2:]
        return datasets.load_dataset(owner_name, data_dir=folder[0] if folder else None,
                                     split="train")
    except InputError:
        raise
    except Exception as error:     # datasets raises whatever its readers do
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        no_rows = "corresponds to no data" in reason or "BatchSize must be greater" in reason
        if no_rows or not reason:
            reason = "the file has no rows"
        raise InputError(f"--data: {data}: {first_bad_line(data) or reason}") from error


def open_file(path, suffix):
    import datasets
    if suffix not in BUILDERS:
        raise InputError(f"--data: {path}: files end in {', '.join(BUILDERS)}, or one of these and "
                         ".gz")
    if os.path.getsize(path) == 0:
        raise InputError(f"--data: {path}: the file is empty")
    options = {}
    if suffix == "csv":     # "NA" is a word, and a row with a field too many is a mistake
        options = {"keep_default_na": False, "na_values": [""], "index_col": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Length of header")
        return datasets.load_dataset(BUILDERS[suffix], data_files=glob.escape(path), split="train",
                                     **options)


def load_rows(data, demonstrations=False, records=None):
    """Yields the rows of a file, folder or hub data set; for demonstrations, preferences serve too
    (their chosen responses). Other columns are ignored. InputError names the file and the row.
    records: what `open_records` gave, if it has been called."""
    records = open_records(data) if records is None else records
    layouts = [("chosen", "rejected"), ("prompt", "responses")]
    if demonstrations:
        layouts.insert(0, ("prompt", "completion"))
    if not any(set(columns) <= set(records.column_names) for columns in layouts):
        wanted = ", or ".join(" and ".join(columns) for columns in layouts)
        raise InputError(f"--data: {data}: needs columns {wanted}; has "
                         f"{', '.join(records.column_names) or 'none'}")
    if not len(records):
        raise InputError(f"--data: {data}: the file has no rows")
    records = records.select_columns([c for c in records.column_names if c in COLUMNS])
    for first in range(0, len(records), 1000):
        number = first
        try:
            for record in thousand(records, first):
                yield parse_row(record, demonstrations)
                number += 1
        except ValueError as error:
            raise InputError(f"--data: {data}: row {number + 1}: {error}") from error


def thousand(records, first):
    """A thousand records from `first` on, as dictionaries: much faster than one by one."""
    try:
        columns = records[first:first + 1000]                       # {name: list}
    except ValueError:      # text that is not UTF-8: one by one, so that the error says where
        return (records[number] for number in range(first, min(first + 1000, len(records))))
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def first_bad_line(path):
    """Which line of a JSONL file is not JSON, which `datasets` does not say; None if all are."""
    if not path.removesuffix(".gz").endswith(".jsonl") or not os.path.isfile(path):
        return None
    open_text = gzip.open if path.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8", errors="replace") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"row {number}: not a JSON object"
        except ValueError as error:
            return f"row {number}: not JSON: {error}"
        except (OSError, EOFError) as error:
            return f"not a whole gzip file: {error}"
