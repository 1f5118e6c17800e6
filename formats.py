"""Rows of text from files and from the Hugging Face hub, in every layout that people keep preferences in.

A row is {"prompt": str, "responses": [str, ...]}, the better response first, and "scores" if rewards came with it. What a
record may look like, in TRL's column names where it has some:

    prompt, chosen, rejected            a preference pair; also score_chosen, score_rejected: numbers, or lists of them
    chosen, rejected                    whole texts or dialogues: the prompt is what they have in common
    prompt, responses                   K of them, the best first; or in the order of `ranks` (1 is best); or of `scores` (as above)
    prompt, completion                  a demonstration, for supervised fine-tuning

A prompt or a response is text or a list of chat messages, [{"role": "user", "content": "Hi"}, ...] (roles user, assistant,
system). They become text as in Anthropic's HH data: "Human: Hi", "Assistant: Hello!", each after an empty line, and a prompt
ends in "Assistant:".
"""
import glob
import hashlib
import json
import math
import os
import warnings

from runtime import InputError


def chat_text(messages):
    """Chat messages as plain text, in the layout of Anthropic's HH data: "\n\nHuman: ...\n\nAssistant: ..."."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def implicit_prompt(chosen, rejected):
    """The prompt that two whole texts share: up to the last "Assistant:" of their common prefix in a dialogue, up to its
    last space otherwise. "" if they share nothing."""
    common = os.path.commonprefix([chosen, rejected])
    turn = common.rfind("\n\nAssistant:")
    return common[:turn + len("\n\nAssistant:")] if turn >= 0 else common[:max(common.rfind(" "), 0)]


def text_of(value, column, prompt=None):
    """The text in a column: text as it is, chat messages as `chat_text`. ValueError if it is neither."""
    if isinstance(value, list):
        try:
            value = chat_text(value)
        except (KeyError, TypeError):
            raise ValueError(f"column {column!r} is not a list of chat messages with a role (user, assistant or system) "
                             "and a text as content") from None
        if column == "prompt":
            value += "\n\nAssistant:"
        elif prompt is not None:       # which may stand again before the response, and ends in "Assistant:" already
            value = value.removeprefix(prompt).removeprefix("\n\nAssistant:")
            if value.startswith(("\n\nHuman:", "\n\nSystem:")):
                raise ValueError(f"column {column!r} is a dialogue that does not begin with the prompt")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {'missing' if value is None else 'neither text nor chat messages'}")
    return value


def scores_of(values, columns):
    """Rewards that came with K responses, numbers or lists with one number per reward model -> K lists of floats."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    for numbers, column in zip(lists, columns):
        if not numbers or not all(isinstance(x, (int, float)) and abs(x) < 3e38 for x in numbers):      # finite in float32
            raise ValueError(f"column {column!r} is {'missing' if numbers == [None] else 'neither a number nor a list of numbers'}")
        if len(numbers) != len(lists[0]):
            raise ValueError(f"column {column!r} has {len(numbers)} numbers for one response, {len(lists[0])} for another")
    return lists


def parse_ranking(record, prompt):
    """A list of responses, the best first, or with `ranks` (1 is best) or else `scores` that say which is best. Returns
    (responses, the best first, and their scores or None)."""
    listed = record["responses"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError("column 'responses' is not a list of two responses or more")
    responses = [text_of(response, "responses", prompt) for response in listed]
    scores = record.get("scores")
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise ValueError(f"column 'scores' is not a list of {len(responses)}, one number or list for each response")
        scores = scores_of(scores, ["scores"] * len(responses))
    order = record.get("ranks")
    if order is None:
        order = [-sum(numbers) for numbers in scores] if scores else range(len(responses))
    elif not isinstance(order, list) or len(order) != len(responses) or not all(
            isinstance(x, (int, float)) and math.isfinite(x) for x in order):
        raise ValueError(f"column 'ranks' is not a list of {len(responses)} numbers, one for each response")
    # A tie is broken by a hash of the text, which is as good as by chance.
    by_rank = sorted(range(len(responses)), key=lambda k: (order[k], hashlib.sha256(responses[k].encode()).digest()))
    return [responses[k] for k in by_rank], scores and [scores[k] for k in by_rank]


def parse_row(record, demonstrations):
    """One record of a file, in any of TRL's layouts or with a list of responses -> a row. ValueError says what is wrong."""
    if demonstrations and "completion" in record:
        columns = ("completion",)
    elif record.get("responses") is not None:
        columns = ("responses",)
    else:
        columns = ("chosen", "rejected")
    prompt, scores = record.get("prompt"), None
    texts = record["responses"] if columns == ("responses",) else [record.get(column) for column in columns]
    if isinstance(prompt, str) and isinstance(texts, list) and texts and isinstance(texts[0], list):
        # a text beside dialogues: they hold the prompt themselves, or are one message, and the text is what the person says
        prompt = texts[0][:-1] or [{"role": "user", "content": prompt}]
    if "prompt" in record or columns == ("responses",):
        prompt = text_of(prompt, "prompt")
    if columns == ("responses",):
        responses, scores = parse_ranking(record, prompt)
        columns *= len(responses)
    else:
        responses = [text_of(text, column, prompt) for text, column in zip(texts, columns)]
        score_columns = [f"score_{column}" for column in columns]
        if len(columns) == 2 and any(record.get(column) is not None for column in score_columns):
            scores = scores_of([record.get(column) for column in score_columns], score_columns)
    if prompt is None:
        if len(responses) == 1:
            raise ValueError("column 'prompt' is missing")
        prompt = implicit_prompt(*responses)
        if not prompt:
            raise ValueError("there is no column 'prompt', and 'chosen' and 'rejected' share no beginning of whole words")
        responses = [response[len(prompt):] for response in responses]
    for column, response in zip(columns, responses):
        # a blank turn in a whole dialogue is what the assistant said there; a blank column is a mistake in the file
        if not (response.strip() if "prompt" in record else response):
            raise ValueError(f"the response {column!r} is empty")
    if demonstrations:
        return {"prompt": prompt, "responses": responses[:1]}
    return {"prompt": prompt, "responses": responses} | ({"scores": scores} if scores else {})


BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def open_records(data):
    """A datasets.Dataset: a JSONL, JSON, CSV or Parquet file (text also gzipped); or the `train` split of a data set on the
    hub: owner/name, or owner/name/folder for the files in one folder of it; or of a folder like one. InputError says what is
    wrong."""
    import datasets   # here, so that the rest runs where it is not installed
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)      # its troubles are reported below, in one line
    suffix = data.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if os.path.isfile(data):
            if suffix not in BUILDERS:
                raise InputError(f"--data: {data}: files end in {', '.join(BUILDERS)}, or one of these and .gz")
            if os.path.getsize(data) == 0:
                raise InputError(f"--data: {data}: the file is empty")
            # in a CSV file "NA" is a word, and a row with a field too many is a mistake, not one with a name in front
            options = {"keep_default_na": False, "na_values": [""], "index_col": False} if suffix == "csv" else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Length of header")
                return datasets.load_dataset(BUILDERS[suffix], data_files=glob.escape(data), split="train", **options)
        if os.path.isdir(data):
            return datasets.load_dataset(data, split="train")
        if suffix in BUILDERS or data.startswith((".", "/", "~")) or data.count("/") > 2 or not data:
            raise InputError(f"--data: {data}: no such file")
        owner_name, folder = "/".join(data.split("/")[:2]), data.split("/")[2:]
        return datasets.load_dataset(owner_name, data_dir=folder[0] if folder else None, split="train")
    except InputError:
        raise
    except Exception as error:     # datasets raises whatever its readers do
        reason = ' '.join(str(error.__cause__ or error).split())[:200]
        if not reason or "corresponds to no data" in reason or "BatchSize must be greater" in reason:
            reason = "the file has no rows"
        raise InputError(f"--data: {data}: {first_bad_line(data) or reason}") from error


COLUMNS = ("prompt", "completion", "chosen", "rejected", "score_chosen", "score_rejected", "responses", "scores", "ranks")


def load_rows(data, demonstrations=False, records=None):
    """Yields the rows of a file, folder or hub data set in TRL's column names: prompt, chosen, rejected; or chosen, rejected
    with the prompt as their common beginning; or, for demonstrations, prompt, completion (a preference file serves too: its
    chosen responses). Also prompt, responses (a list). Other columns are ignored. InputError names the file and the row.
    records: what `open_records` gave, if it has been called."""
    records = open_records(data) if records is None else records
    wanted = [("chosen", "rejected"), ("prompt", "responses")]
    if demonstrations:
        wanted.insert(0, ("prompt", "completion"))
    if not any(set(columns) <= set(records.column_names) for columns in wanted):
        raise InputError(f"--data: {data}: needs columns {', or '.join(' and '.join(columns) for columns in wanted)}; "
                         f"has {', '.join(records.column_names) or 'none'}")
    if not len(records):
        raise InputError(f"--data: {data}: the file has no rows")
    records = records.select_columns([column for column in records.column_names if column in COLUMNS])
    for at in range(0, len(records), 1000):
        try:
            columns = records[at:at + 1000]                        # {name: list}: much faster than row by row
            part = [dict(zip(columns, values)) for values in zip(*columns.values())]
        except ValueError:                                         # text that is not UTF-8: row by row, to say where
            part = (records[number] for number in range(at, min(at + 1000, len(records))))
        number = at
        try:
            for record in part:
                yield parse_row(record, demonstrations)
                number += 1
        except ValueError as error:
            raise InputError(f"--data: {data}: row {number + 1}: {error}") from error


def first_bad_line(path):
    """Which line of a JSONL file is not JSON: what `datasets` does not say. None if that is not the trouble."""
    if not path.removesuffix(".gz").endswith(".jsonl") or not os.path.isfile(path):
        return None
    import gzip
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"row {number}: not a JSON object"
        except ValueError as error:
            return f"row {number}: not JSON: {error}"
        except (OSError, EOFError) as error:
            return f"not a whole gzip file: {error}"
