"""Records and trees of any shape: what holds of every one of them, by examples that hypothesis
makes up. The suite tries 100 of each, always the same ones; dev/fuzz.sh 50,000 others."""
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import collate
from model import GPT, GPTConfig, tree_mask
from support.flags import InputError
from support.rows import load_rows, parse_rows
from support.tokens import encode, fit
from tinytldr import tokenizer

CASES = int(os.environ.get("FUZZ_CASES", 0))        # of each test; 0 in the suite
anything = settings(max_examples=CASES or 100, derandomize=not CASES, database=None, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow])

# ------ records

texts = st.text(max_size=8) | st.sampled_from(["", " ", "\n\nHuman: a\n\nAssistant:", "NA", "true",
                                               "post\nTL;DR: b", "\ud83d"])
numbers = st.integers() | st.floats() | st.booleans()
messages = st.lists(st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool", "boss"]),
     "content": texts}), max_size=4)
values = st.recursive(st.none() | texts | numbers | messages, st.lists, max_leaves=4)
records = st.dictionaries(st.sampled_from([
    "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "completion", "label",
    "messages", "responses", "ranks", "scores", "preferred", "other"]), values, max_size=6)
good_pairs = st.fixed_dictionaries(
    {"prompt": texts | messages, "chosen": texts | messages, "rejected": texts | messages},
    optional={"score_chosen": numbers, "score_rejected": numbers, "label": values})


def check_row(row, demonstrations):
    """A row is what encode() expects: text, or messages of which the assistant's are answered; and
    responses that are not blank."""
    assert row.keys() <= {"prompt", "responses", "scores", "desirable"}
    single = demonstrations or "desirable" in row
    assert len(row["responses"]) == 1 if single else len(row["responses"]) >= 2
    assert all(row["responses"])
    assert len({type(part) for part in (row["prompt"], *row["responses"])}) == 1
    for part in (row["prompt"], *row["responses"]):
        for text in [part] if isinstance(part, str) else [message["content"] for message in part]:
            text.encode()
    if isinstance(row["prompt"], list):
        assert row["prompt"]
        for response in row["responses"]:
            assert response[0]["role"] == response[-1]["role"] == "assistant"
    examples = fit(encode([row], tokenizer()), 10 ** 6)
    for prompt, responses in examples:
        assert len(prompt) and all((np.array(response) >= 0).any() for response in responses)
    for scores in row.get("scores", []):
        assert scores and all(math.isfinite(np.float32(x)) for x in scores)


@anything
@given(records | good_pairs | st.fixed_dictionaries({"messages": messages | values}),
       st.booleans())
def test_a_record_is_rows_or_a_message_in_one_line(record, demonstrations):
    """Whatever is in its columns: nothing else is raised, nothing else comes out."""
    try:
        rows = parse_rows(record, demonstrations)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert demonstrations or len(rows) == 1
    for row in rows:
        check_row(row, demonstrations)


lines = st.lists(st.one_of(
    records.map(lambda record: json.dumps(record).encode()),
    good_pairs.map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=20)), max_size=5)


@anything
@given(content=lines.map(b"\n".join) | st.binary(max_size=60),
       ending=st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "csv.gz"]),
       demonstrations=st.booleans())
def test_a_file_is_rows_or_a_message_in_one_line(tmp_path_factory, content, ending, demonstrations):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{ending}"
    path.write_bytes(content)
    try:
        for row in load_rows(str(path), demonstrations):
            check_row(row, demonstrations)
    except InputError as error:
        assert str(error).startswith(f"--data: {path}: ") and "\n" not in str(error)


# ------ trees

tokens = st.lists(st.integers(0, 30), min_size=1, max_size=5)


@st.composite
def batches(draw):
    """One to four examples, each with the same number of responses."""
    K = draw(st.integers(1, 3))
    responses = st.lists(tokens, min_size=K, max_size=K)
    return draw(st.lists(st.tuples(tokens, responses), min_size=1, max_size=4))


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=31, n_layer=2, n_head=2, n_embd=8)).double()
    for parameter in model.parameters():        # biases too, and no weight small
        parameter.data.normal_(0, 0.5)
    return model


@anything
@given(examples=batches(), multiple=st.sampled_from([1, 4]))
def test_a_tree_equals_its_sequences(policy, examples, multiple):
    """The layout and the mask by their definitions, and the log-probs of every response equal those
    of prompt and response alone."""
    batch = collate(examples, multiple)
    mask = tree_mask(batch.branch, torch.float64)
    for b, (prompt, responses) in enumerate(examples):
        roles = [0] * len(prompt)
        positions = list(range(len(prompt)))
        for k, response in enumerate(responses, 1):
            roles += [k] * len(response)
            positions += range(len(prompt), len(prompt) + len(response))
        n = len(roles)
        assert batch.tokens[b, :n].tolist() == [*prompt, *sum(responses, [])]
        assert batch.branch[b].tolist() == roles + [-1] * (batch.branch.size(1) - n)
        assert batch.position[b, :n].tolist() == positions
        for q in range(n):
            sees = [k <= q and roles[k] in (0, roles[q]) for k in range(n)]
            assert (mask[b, 0, q, :n] == 0).tolist() == sees
    logps = policy.response_logps(batch)
    for b, (prompt, responses) in enumerate(examples):
        for k, response in enumerate(responses):
            sequence = torch.tensor([prompt + response])
            of_tokens = policy.logits(sequence)[0, :-1].log_softmax(dim=1)
            expected = of_tokens.gather(1, sequence[0, 1:, None])[len(prompt) - 1:].sum()
            assert math.isclose(logps[b, k].item(), expected.item(), abs_tol=1e-9)
