"""Chats: messages become tokens by a model's own template, and only what the assistant says is
learnt. Expected ids and masks are exact, on a made-up tokenizer of bytes with ChatML's tokens."""
import json
import os

import numpy as np
import pytest
import torch

import sample
from data import collate, get_tokenizer
from model import GPT, GPTConfig
from runs.score import record, scorable
from support.flags import InputError
from support.rows import chat_segments, segments_of, text_segments
from support.tokenizer import HH, MARK, ChatTemplate, save_tokenizer, to_text
from support.tokens import encode, fit, prompt_tokens, prompts_of, tokenised_file

pytestmark = pytest.mark.usefixtures("hub_cache")

START, END, BOS = "<|im_start|>", "<|im_end|>", "<s>"
SPECIALS = (BOS, START, END)        # tokens 256, 257, 258
CHATML = ("{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
          "'<|im_end|>' + '\n' }}{% endfor %}\n"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# As Qwen3's: thoughts stand in the last reply alone, and an empty one where none is wanted.
THINKING = CHATML.replace("m['content'] +", "(('<think>\n\n</think>\n\n' if loop.last and "
                          "m['role'] == 'assistant' else '') + m['content']) +").replace(
    "assistant\n' }}", "assistant\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}")


def says(role, content, **more):
    return {"role": role, "content": content, **more}


HI, YES, GO, NO = (says("user", "Hi"), says("assistant", "Yes"), says("user", "Go"),
                   says("assistant", "No"))


def write_tokenizer(folder, template=CHATML, bos=False, **settings):
    """A model's tokenizer: of bytes, token b being byte b."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = sorted(set(range(256)) - set(letters.values()))
    letters |= {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[(BOS, 256)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": BOS, **settings}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return get_tokenizer(f"{folder}/")


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "own")


def ids_of(text):
    """The tokens of a text in which special tokens are tokens."""
    for number, special in enumerate(SPECIALS):
        text = text.replace(special, chr(0xE000 + number))
    return [token for letter in text for token in
            ([256 + ord(letter) - 0xE000] if letter in "\ue000\ue001\ue002" else letter.encode())]


def example(row, tokenizer):
    """The example of a row: its prompt and its responses, lists of token ids."""
    (prompt, responses), = fit(encode([row], tokenizer), 10_000)
    return prompt.tolist(), [ids.tolist() for ids in responses]


# ------------------------------------------------------------------ exact ids and masks

def test_a_chat_in_the_template(tokenizer):
    """The prompt ends where the reply is asked for; a reply ends in the template's end of turn, and
    the new line after it is nobody's."""
    assert tokenizer.eot_token == 258
    prompt, responses = example({"prompt": [says("system", "Be kind"), HI],
                                 "responses": [[YES], [says("assistant", " No!\n")]]}, tokenizer)
    assert prompt == ids_of(f"{START}system\nBe kind{END}\n{START}user\nHi{END}\n"
                            f"{START}assistant\n")
    assert responses == [ids_of(f"Yes{END}"), ids_of(f"No!{END}")]


def test_what_a_person_says_in_a_response_is_not_learnt(tokenizer):
    """It is written as complements: the model reads it, no log-prob of it counts."""
    row = {"prompt": [HI], "responses": [[YES, GO, NO], [NO]]}
    _, responses = example(row, tokenizer)
    between = ids_of(f"\n{START}user\nGo{END}\n{START}assistant\n")
    assert responses == [ids_of(f"Yes{END}") + [~token for token in between] + ids_of(f"No{END}"),
                         ids_of(f"No{END}")]


def test_a_model_that_may_end_in_several_tokens(tmp_path):
    """Responses are trained to end in the template's end of turn; a sample may end in the others
    that the model's files list with it, too, and in special tokens that they list alone."""
    write_tokenizer(tmp_path / "own")
    listed = tmp_path / "own/generation_config.json"
    (tmp_path / "own/config.json").write_text(json.dumps({"eos_token_id": [258, 7]}))
    for ends, wanted in (([256, 258], [258, 256]), (258, [258]), ([7, 258], [258, 7]),
                         ([256, 7], [258, 256]), (None, [258, 7])):
        listed.write_text(json.dumps({"eos_token_id": ends}))
        tokenizer = get_tokenizer(f"{tmp_path}/own/")
        assert (tokenizer.eot_token, tokenizer.ends) == (258, wanted)
    listed.write_text(json.dumps({"eos_token_id": [256, 258]}))
    tokenizer = get_tokenizer(f"{tmp_path}/own/")
    assert [to_text([*b"No", end], tokenizer) for end in (256, 258, 257)] == (
        ["No", "No", f"No{START}"])


def test_the_layout_of_hh_is_the_template_of_models_without_one(tmp_path):
    """Every letter as today, and the same mask whether the dialogue comes as messages or text."""
    tokenizer = write_tokenizer(tmp_path / "own", template=None)
    assert tokenizer.eot_token == 256
    rows = [{"prompt": [HI], "responses": [[YES, GO, NO], [NO]]},
            {"prompt": "\n\nHuman: Hi\n\nAssistant:",
             "responses": [" Yes\n\nHuman: Go\n\nAssistant: No", " No"]}]
    for row in rows:
        prompt, responses = example(row, tokenizer)
        assert prompt == ids_of("\n\nHuman: Hi\n\nAssistant:")
        between = [~token for token in b"\n\nHuman: Go\n\nAssistant:"]
        assert responses == [[*b" Yes", *between, *b" No", 256], [*b" No", 256]]
    first, second = (encode([row], tokenizer)["hash"] for row in rows)
    assert first == second                                      # and the same split


def test_names_inside_a_message_do_not_split_it(tokenizer, tmp_path):
    text = "Write\n\nHuman: x\n\nAssistant: y"
    row = {"prompt": [says("user", text)], "responses": [[says("assistant", text)]]}
    for own in (tokenizer, write_tokenizer(tmp_path / "bare", template=None)):
        _, (response,) = example(row, own)
        assert min(response) >= 0 and own.decode(response[:-1]).strip() == text


@pytest.mark.parametrize("metaspace", [True, False])
def test_a_space_that_the_tokenizer_puts_before_a_text(tmp_path, metaspace):
    """As in Llama 2's: before a prompt, and not before a response that goes on with it."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b", *(f"<0x{b:02X}>" for b in range(256))]
    number = {name: i for i, name in enumerate(names)}
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(
        number, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        bare.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        bare.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    bare.add_special_tokens(["</s>"])
    bare.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "</s>", "chat_template": template}))
    own = get_tokenizer(f"{tmp_path}/")

    def ids(*tokens):
        return [number[token] for token in tokens]
    assert example({"prompt": "a b\n", "responses": ["a b", " b"]}, own) == (
        ids("▁a", "▁b", "<0x0A>"), [ids("a", "▁b", "</s>"), ids("▁b", "</s>")])
    assert own.encode_rendered(["b a</s>", f"a<{MARK}/s>"], inside=True)[0][0] == (
        ids("b", "▁a", "</s>"))
    row = {"prompt": [says("user", "a ")], "responses": [[says("assistant", "b")]]}
    prompt, (response,) = example(row, own)         # "▁b" would be a token across the border
    assert (prompt, response) == (ids("▁a", "▁"), ids("b", "</s>"))


@pytest.mark.parametrize("response, wanted", [
    (" a", [(" a", True)]),
    (" a\n\nHuman: b\n\nAssistant: c",
     [(" a", True), ("\n\nHuman: b\n\nAssistant:", False), (" c", True)]),
    (" a\n\nHuman: b", [(" a", True)]),
    ("\n\nSystem: b\n\nAssistant: c", [("\n\nSystem: b\n\nAssistant:", False), (" c", True)])])
def test_segments_of_text(response, wanted):
    """A dialogue in text; other text is not looked into."""
    assert text_segments("\n\nHuman: Hi\n\nAssistant:", response) == wanted
    assert text_segments("Post:", response) == [(response, True)]


@pytest.mark.parametrize("begun, reply", [("Sure,", " here"), ("Sure, ", "here"),
                                          ("  Sure,", " here")])
def test_a_prompt_that_ends_with_the_assistant(tokenizer, begun, reply):
    """Its turn goes on, there is no second one, and a space between is the reply's."""
    row = {"prompt": [HI, says("assistant", begun)], "responses": [[says("assistant", reply)]]}
    prompt, responses = example(row, tokenizer)
    assert prompt == ids_of(f"{START}user\nHi{END}\n{START}assistant\nSure,")
    assert responses == [ids_of(f" here{END}")]
    assert segments_of(row, HH) == ("\n\nHuman: Hi\n\nAssistant: Sure,", [[(" here", True)]])


def test_a_begun_turn_that_the_template_writes_in_another_way():
    """It is refused: where the prompt ends could only be guessed, and what a person said would be
    learnt."""
    lines = CHATML.replace("m['content'] +", "m['content'].replace('</think>', '\n</think>\n') +")
    template = ChatTemplate(lines, {}, SPECIALS)
    end, reply = f"{START}user\nHi{END}\n{START}assistant\n", [says("assistant", " on")]
    assert chat_segments(template, [HI, says("assistant", "So")], reply) == (
        f"{end}So", [(f" on{END}", True)])
    with pytest.raises(ValueError, match="^the chat template writes the turn with which the prom"):
        chat_segments(template, [HI, says("assistant", "<think>a</think>So")], reply)


def test_special_tokens_in_what_people_write_are_text(tokenizer):
    """Those of the template around them are tokens."""
    text = f"What is {END}?{BOS}"
    prompt, (response,) = example({"prompt": [says("user", text)],
                                   "responses": [[says("assistant", f"It ends {START}."), GO, NO]]},
                                  tokenizer)
    assert prompt == [257, *b"user\n", *text.encode(), 258, *b"\n", 257, *b"assistant\n"]
    between = [*b"\n", 257, *b"user\nGo", 258, *b"\n", 257, *b"assistant\n"]
    assert response == [*f"It ends {START}.".encode(), 258, *[~token for token in between],
                        *b"No", 258]


def test_a_template_that_drops_thoughts(tmp_path):
    """Thinking is off in prompt and reply, so the prompt is where the reply begins. Where earlier
    replies would be written otherwise than they were drawn, a row is refused; SFT has a row for
    each turn, as it is drawn."""
    tokenizer = write_tokenizer(tmp_path / "own", THINKING)
    assert tokenizer.eot_token == 258
    empty = "<think>\n\n</think>\n\n"
    prompt, responses = example({"prompt": [HI], "responses": [[YES]]}, tokenizer)
    assert prompt == ids_of(f"{START}user\nHi{END}\n{START}assistant\n{empty}")
    assert responses == [ids_of(f"Yes{END}")]
    prompt, responses = example({"prompt": [HI, YES, GO], "responses": [[NO]]}, tokenizer)
    assert prompt == ids_of(f"{START}user\nHi{END}\n{START}assistant\nYes{END}\n{START}user\nGo"
                            f"{END}\n{START}assistant\n{empty}")
    with pytest.raises(ValueError, match="^the chat template writes a turn of the assistant in an"):
        segments_of({"prompt": [HI], "responses": [[YES, GO, NO]]}, tokenizer.template)


def test_thoughts_in_a_reply_are_learnt(tmp_path):
    """Then the template asks for thoughts, in the whole row; those of earlier turns it may drop."""
    tokenizer = write_tokenizer(tmp_path / "own", THINKING.replace("loop.last and ", "loop.last "
                                "and '</think>' not in m['content'] and "))
    thought = "<think>\nhm\n</think>\n\nYes"
    prompt, responses = example({"prompt": [HI], "responses": [[says("assistant", thought)], [NO]]},
                                tokenizer)
    assert prompt == ids_of(f"{START}user\nHi{END}\n{START}assistant\n")
    assert responses == [ids_of(f"{thought}{END}"), ids_of(f"<think>\n\n</think>\n\nNo{END}")]
    prompt, _ = example({"prompt": [says("user", thought)], "responses": [[NO]]}, tokenizer)
    assert prompt[-len("<think>\n\n</think>\n\n"):] == [*b"<think>\n\n</think>\n\n"]


@pytest.mark.parametrize("template, rows, message", [
    (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
     [{"prompt": [HI, YES, says("tool", "a 42")], "chosen": "a", "rejected": "b"}] * 2,
     "warning: in 2 rows the chat template writes nothing of what 'tool' says"),
    (CHATML, [{"prompt": [HI, YES, says("tool", "a 42")], "chosen": "a", "rejected": "b"}], ""),
    (CHATML, [{"prompt": [HI, says("assistant", "", tool_calls=["f"]), GO], "chosen": "a",
               "rejected": "b"}], "1 row: 'tool_calls' of their messages is not read"),
    (CHATML, [{"prompt": [HI], "chosen": "a", "rejected": "b"},
              {"prompt": [HI], "chosen": [says("assistant", "", tool_calls=["f"])],
               "rejected": [NO]}],
     "row 2: a reply is nothing but 'tool_calls', which are not read by the chat layout"),
    (None, [{"messages": [HI, says("assistant", "", tool_calls=["f"])]}],
     "row 1: a reply is nothing but 'tool_calls'")])
def test_what_a_template_leaves_out(tmp_path, capsys, template, rows, message):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, demonstrations = write_tokenizer(tmp_path / "own", template), "messages" in rows[0]
    if message.startswith("row"):
        with pytest.raises(ValueError, match=message):
            tokenised_file(str(tmp_path / "a.jsonl"), own, demonstrations)
        return
    tokenised_file(str(tmp_path / "a.jsonl"), own)
    said = capsys.readouterr().out
    assert message in said and (message or "template" not in said)


def test_a_bad_row_of_a_template(tmp_path, capsys):
    """What the template refuses is a bad row, and so is a fault in the template itself."""
    path, rows = tmp_path / "a.jsonl", [{"prompt": [HI], "chosen": "a", "rejected": "b"}] * 2
    rows[1] = {**rows[1], "prompt": [says("system", "x"), HI]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strict = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}"
              "{% endif %}" + CHATML)
    own = write_tokenizer(tmp_path / "strict", strict)
    with pytest.raises(ValueError, match="row 2: the chat template does not take these messages: "
                                         "no system here; --skip_bad_rows leaves them out$"):
        tokenised_file(str(path), own)
    assert len(tokenised_file(str(path), own, skip_bad_rows=True)["hash"]) == 1
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}{% endif %}"
    assert write_tokenizer(tmp_path / "asks", asks + CHATML).eot_token == 258
    for broken in (5, ["x"], [{"name": "other", "template": CHATML}], [{"template": CHATML}]):
        with pytest.raises(ValueError, match="own/tokenizer_config.json: its chat_template is nei"):
            write_tokenizer(tmp_path / "own", broken)
    for broken in ("{% if %}", "{{ messages.nothing() }}", "{{ ''.__class__.__mro__ }}x"):
        with pytest.raises(ValueError, match="own/: .*chat template"):
            write_tokenizer(tmp_path / "own", broken)


def test_keys_of_messages_that_the_layout_does_not_read(tmp_path, capsys):
    row = {"prompt": [HI | {"name": "Ann"}], "chosen": "a", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    tokenised_file(str(tmp_path / "a.jsonl"), write_tokenizer(tmp_path / "own"))
    assert "1 row: 'name' of their messages is not read by the chat layout" in (
        capsys.readouterr().out)


def test_what_templates_may_use():
    """What `transformers` gives them; but no date of today, or runs on two days would differ."""
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% generation %}"
        "{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%d %b %Y') }}"
        "{{ bos_token }}", {"bos_token": BOS})
    assert template.render([HI, says("user", "é")]) == (
        '{"role": "user", "content": "é"}26 Jul 2024<s>')


@pytest.mark.parametrize("where", ["jinja", "list"])
def test_where_templates_are(tmp_path, where):
    """In a file of their own, which goes first, or among several."""
    if where == "list":
        own = write_tokenizer(tmp_path / "own", [{"name": "tools", "template": "x"},
                                                 {"name": "default", "template": CHATML}])
    else:
        (tmp_path / "own").mkdir()
        (tmp_path / "own/chat_template.jinja").write_text(CHATML)
        own = write_tokenizer(tmp_path / "own", "x")
    assert example({"prompt": [HI], "responses": [[YES]]}, own)[1] == [ids_of(f"Yes{END}")]


# ------------------------------------------------------------------ text, and what is saved

def test_a_text_begins_with_bos_where_the_model_has_one(tmp_path):
    """As in Llama 3. A template writes its own. An empty prompt is BOS alone."""
    own = write_tokenizer(tmp_path / "own", "{{ bos_token }}" + CHATML, bos=True)
    assert own.start == [256]
    assert example({"prompt": "Hi", "responses": [" you"]}, own) == (
        [256, *b"Hi"], [[*b" you", 258]])
    assert example({"prompt": "", "responses": ["a"]}, own)[0] == [256]
    prompt, _ = example({"prompt": [HI], "responses": [[YES]]}, own)
    assert prompt == ids_of(f"{BOS}{START}user\nHi{END}\n{START}assistant\n")
    assert prompt_tokens(["Hi"], own, 99, chat=False) == [256, *b"Hi"]


def test_the_end_of_turn_and_the_model_s_list_of_ends(tmp_path, capsys):
    """generation_config.json goes along if its ends have the template's; else what is trained would
    not stop there."""
    for ends, kept in (([256, 258], True), (258, True), ([256], False)):
        folder = tmp_path / str(ends)
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        own = write_tokenizer(folder)
        assert own.eot_token == 258 and ("and not in 256" in capsys.readouterr().out) != kept
        save_tokenizer(tmp_path / "saved", own, 20)
        files = {"tokenizer.json", "tokenizer_config.json"}
        files |= {"generation_config.json"} if kept else set()
        assert set(own.files) == files
        for name in files:
            assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


def test_scored_chats_stay_messages(tmp_path, tokenizer):
    """runs/score.py writes them as it read them, next to their scores."""
    pair = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}
    (tmp_path / "a.jsonl").write_text(json.dumps(pair) + "\n")
    (row,), dataset = scorable(str(tmp_path / "a.jsonl"), tokenizer, 99)
    assert record(row, [2, 1]) == {**pair, "score_chosen": 2, "score_rejected": 1}
    assert dataset.response_lengths().tolist() == [[4, 3]]


# ------------------------------------------------------------------ the model sees all, learns some

def test_log_probs_add_up_learnt_tokens_alone():
    """By hand, from the plain logits; context is read: another one changes what comes after it."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=8)).double()
    for parameter in policy.parameters():
        parameter.data.normal_(0, 0.5)
    prompt, response = [3, 1, 4], [5, ~9, ~2, 6, 7]
    batch = collate([(prompt, [response, [8]])])
    assert batch.tokens.tolist() == [[3, 1, 4, 5, 9, 2, 6, 7, 8]]
    assert batch.own.tolist() == [3, 6, 7, 8] and batch.predictor.tolist() == [2, 5, 6, 2]
    assert batch.target.tolist() == [5, 6, 7, 8] and batch.slot.tolist() == [0, 0, 0, 1]
    assert batch.lengths.tolist() == [[3, 1]] and batch.last.tolist() == [[7, 8]]
    logps = policy.logits(batch.tokens[:, :8])[0].log_softmax(dim=1)
    wanted = logps[2, 5] + logps[5, 6] + logps[6, 7]
    assert torch.allclose(policy.response_logps(batch)[0, 0], wanted)
    other = collate([(prompt, [[5, ~9, ~3, 6, 7], [8]])])
    assert policy.response_logps(other)[0, 0] != policy.response_logps(batch)[0, 0]


def test_a_response_of_context_first():
    """The prompt's last token predicts nothing then."""
    batch = collate([([1, 2], [np.array([~3, 4], np.int32)])])
    assert batch.predictor.tolist() == [2] and batch.target.tolist() == [4]


# ------------------------------------------------------------------ talking

class Echo:
    """A policy that keeps what it was asked, and answers "Yes"."""

    def __init__(self, config):
        self.config, self.asked = config, []

    def to(self, device):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompts, max_new_tokens, temperature, stop, *args, on_token=None, **more):
        self.asked.append((prompts[0], stop))
        for token in (*b"Yes", 258):
            on_token([token])
        return [[*b"Yes", 258]]


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """What sample.py reads in place of the policy in the folder own."""
    write_tokenizer(tmp_path / "own", bos=True)
    GPT(GPTConfig(block_size=200, vocab_size=259, n_layer=1, n_head=1, n_embd=4)).save_pretrained(
        tmp_path / "own")
    echo = Echo(GPTConfig(block_size=200))
    monkeypatch.setattr(sample.GPT, "from_pretrained", lambda name: echo)
    monkeypatch.setattr(sample, "check_vocabulary", lambda *args: None)
    return echo


def test_sample_talks_in_the_template(tmp_path, echo, monkeypatch, capsys):
    """Each turn with all that was said before, and it stops at the template's end of a turn."""
    folder = str(tmp_path / "own")
    monkeypatch.setattr(sample, "prompts_to_answer",
                        lambda *args: iter([("Hi", None), ("Go", None)]))
    sample.main([folder, "--chat", "--max_new_tokens=5"])
    first = f"{START}user\nHi{END}\n{START}assistant\n"
    second = first + f"Yes{END}\n{START}user\nGo{END}\n{START}assistant\n"
    assert echo.asked == [(ids_of(first), [258]), (ids_of(second), [258])]
    assert f"[{folder}] Yes\n" in capsys.readouterr().out


@pytest.mark.parametrize("as_chat, layout", [
    (True, f"{START}user\n%{END}\n{START}assistant\n"), (False, f"{BOS}%")])
def test_sample_answers_held_out_prompts_as_evaluate_does(tmp_path, echo, as_chat, layout):
    """Their special tokens are tokens, not text, and BOS is not there twice."""
    texts = [f"Hi {i}" for i in range(60)]
    rows = [{"prompt": text, "chosen": " Yes", "rejected": " No"} for text in texts]
    if as_chat:
        rows = [{"prompt": [says("user", text)], "chosen": [YES], "rejected": [NO]}
                for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample.main([str(tmp_path / "own"), f"--data={tmp_path}/rows.jsonl", "--max_new_tokens=5"])
    asked = [ids for ids, _ in echo.asked]
    assert len(asked) > 1
    assert all(ids in [ids_of(layout.replace("%", text)) for text in texts] for ids in asked)


def test_a_prompt_of_bytes_that_are_no_text(tokenizer):
    """Python reads them from a terminal as halves of letters."""
    for chat in (True, False):
        with pytest.raises(InputError, match="^the prompt: not UTF-8 text$"):
            prompt_tokens(["a \udcff"], tokenizer, 20, chat)


# ------------------------------------------------------------------ transformers, real weights

FOLDER, DATA = os.environ.get("NANOPREF_SMOLLM2", ""), os.environ.get("NANOPREF_DATA", "")
TEXTS = ["", "Hello  world\n\n\n x  1234567 ", "def f(x):\n\treturn x**2  # é", "😀👩‍👩‍👧 naïve",
         "日本語", f"{END} ﬁ \u200b \x00\x7f \r\n{START}user"]
CHATS = [([HI], [YES, GO, NO]), ([says("system", "Be kind."), HI, YES, GO], [NO]),
         ([HI, YES, says("tool", "42"), GO], [says("assistant", "\n Well…\n")]),
         ([says("user", "\n\nHuman: 😀 ")], [says("assistant", "code:\n```\nx\n```")])]


def check_parity(own, theirs, prompt, response):
    """Our tokens of a dialogue are those of `apply_chat_template`, and end with the last turn."""
    spoken = [{**message, "content": message["content"].strip()}
              if message["role"] == "assistant" else message for message in response]
    whole = theirs.apply_chat_template(prompt + spoken, return_dict=False)
    asked = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    start, (ids,) = example({"prompt": prompt, "responses": [response]}, own)
    assert start == asked
    ids = [token if token >= 0 else ~token for token in ids]
    assert whole[:len(asked) + len(ids)] == asked + ids
    assert theirs.decode(whole[len(asked) + len(ids):]).strip() == ""


@pytest.mark.parametrize("bos", [True, False])
def test_parity_with_transformers(tmp_path, bos):
    transformers = pytest.importorskip("transformers")
    own = write_tokenizer(tmp_path / "own", "{{ bos_token }}" * bos + CHATML, bos)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "own"))
    for text in TEXTS:
        ids = theirs.encode(text, split_special_tokens=True)
        assert own.start + own.encode_ordinary(text) == ids
    for chat in CHATS:
        check_parity(own, theirs, *chat)


@pytest.mark.real_data
@pytest.mark.skipif(not os.path.isdir(FOLDER), reason="NANOPREF_SMOLLM2 names no folder")
def test_smollm2(tmp_path):
    """Its ids of any text and of dialogues, HH's among them where NANOPREF_DATA has some; and what
    is saved is its files."""
    own = get_tokenizer(f"{FOLDER}/")
    assert own.decode([own.eot_token]) == END and own.start == []
    save_tokenizer(tmp_path, own, 20)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        with open(os.path.join(FOLDER, name), "rb") as file:
            assert (tmp_path / name).read_bytes() == file.read()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chats, path = list(CHATS), os.path.join(DATA, "hh_helpful-base.jsonl.gz")
    if os.path.isfile(path):
        tokens = tokenised_file(path, get_tokenizer("tinytldr"))
        for text in map(get_tokenizer("tinytldr").decode, prompts_of(tokens, "test")[:100]):
            turns = [turn for turn in text.split("\n\nHuman:")[1:]]
            prompt = []
            for turn in turns:
                asked, *answered = turn.split("\n\nAssistant:")
                prompt += [says("user", asked), *(says("assistant", each) for each in answered)]
            if prompt[-1]["role"] == "assistant":
                del prompt[-1]
            chats.append((prompt, [says("assistant", f" {text[-60:]} ")]))
            TEXTS.append(text)
    for text in TEXTS:
        assert own.encode_ordinary(text) == theirs.encode(text, split_special_tokens=True)
    for chat in chats:
        check_parity(own, theirs, *chat)


def test_hh_has_no_end_of_turn():
    assert HH.end_of_turn() is None
    assert chat_segments(HH, [HI], [YES]) == ("\n\nHuman: Hi\n\nAssistant:", [(" Yes", True)])
