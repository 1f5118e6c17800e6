"""Samples that were cut off, at --max_new_tokens or at block_size, and so do not end in
end-of-text: reward models judge them with one appended, they are counted, and penalised if that is
asked for."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import reward
import tinytldr
import train_policy
from data import Dataset
from model import GPT, GPTConfig
from reward import RewardModel, judge_samples
from runs import score as score_script
from support import columns
from support.columns import count_cut_off, was_cut_off, with_end
from support.flags import InputError, comparison_flags
from support.report import cut_off_note
from support.tokens import encode, longest_sample
from tinytldr import tokenizer

EOT = tokenizer().eot_token
OTHER_END = 0
GOOD, FILL, QUIRK = (tokenizer().encode_ordinary(text)[0] for text in (" sad", " broke", " afraid"))
CONFIG = GPTConfig(48, tokenizer().n_vocab, n_layer=1, n_head=1, n_embd=16)


class Judge(torch.nn.Module):
    """A reward model that is right where it was trained to be read: at end-of-text, it counts GOOD
    in the response. At any other last token it says what it happens to say there: the token's
    number."""

    def __init__(self, block_size=48):
        super().__init__()
        self.config = GPTConfig(block_size, tokenizer().n_vocab)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        values = []
        for tokens, branch, last in zip(batch.tokens, batch.branch, batch.last):
            assert len(last) == 1 and (branch >= 0).sum() <= self.config.block_size
            final = batch.tokens.flatten()[last[0]]
            n_good = (tokens[branch == 1] == GOOD).sum()
            values.append([n_good.item() if final == EOT else final.item()])
        return torch.tensor(values, dtype=torch.float32)


def judge(judges, prompts, samples, **changed):
    args = SimpleNamespace(**{"missing_eos_penalty": None, "max_new_tokens": 3} | changed)
    texts = ["POST:"] * len(prompts)
    return judge_samples("pi", judges, texts, prompts, samples, tokenizer(), args)


# ------------------------------------------------------------------ one sample

@pytest.mark.parametrize("prompt, sample, block_size, wanted", [
    ([1, 2, 3], [4, EOT], 48, ([1, 2, 3], [4, EOT])),               # it has ended
    ([1, 2, 3], [4, OTHER_END], 48, ([1, 2, 3], [4, EOT])),         # in another end
    ([1, 2, 3], [4, EOT], 5, ([1, 2, 3], [4, EOT])),
    ([1, 2, 3], [4, 5], 48, ([1, 2, 3], [4, 5, EOT])),
    ([1, 2, 3], [4, 5], 6, ([1, 2, 3], [4, 5, EOT])),
    ([1, 2, 3], [4, 5], 5, ([2, 3], [4, 5, EOT])),                  # it filled block_size
    ([1], [4, 5, 6, 7], 5, ([1], [4, 5, 6, EOT])),                  # with one token of prompt
    ([1, 2, 3], [EOT, 4], 48, ([1, 2, 3], [EOT, 4, EOT])),
    ([1, 2], [], 2, ([2], [EOT]))])
def test_what_is_judged_ends_in_end_of_text_and_fits(prompt, sample, block_size, wanted):
    before = list(sample)
    assert with_end(prompt, sample, [EOT, OTHER_END], block_size) == wanted
    assert sample == before         # as it was drawn, for its log-prob


def test_a_sample_that_fills_the_block_size_is_cut_off(capsys):
    """Whatever max_new_tokens is."""
    prompts = [[GOOD] * 48, [GOOD] * 45, [GOOD] * 10]
    samples = GPT(CONFIG).generate(prompts, 20, temperature=0, stop=EOT)
    assert list(map(len, samples)) == [0, 3, 20]
    assert count_cut_off("pi", samples, [EOT], 20, "so").all()
    assert "1 at --max_new_tokens=20 and 2 at block_size" in capsys.readouterr().out
    assert not was_cut_off([EOT], [EOT]) and was_cut_off([EOT, FILL], [EOT])
    assert not was_cut_off([FILL, OTHER_END], [EOT, OTHER_END])


# ------------------------------------------------------------------ many samples

def test_the_reward_of_a_sample_does_not_depend_on_where_it_was_cut():
    """A judge with a quirk at tokens that are not end-of-text."""
    whole = [[GOOD, FILL, QUIRK, EOT], [FILL, GOOD, GOOD, EOT]]
    cut = [sample[:3] for sample in whole]
    prompts = [[FILL, FILL], [FILL]]
    judges = {"a": Judge(), "b": Judge()}
    rewards, which = judge(judges, prompts, whole)
    assert rewards.tolist() == [1, 2] and which.tolist() == [False, False]
    rewards, which = judge(judges, prompts, cut)
    assert rewards.tolist() == [1, 2] and which.tolist() == [True, True]
    raw = Dataset([(prompt, [sample]) for prompt, sample in zip(prompts, cut)])
    assert columns.score(judges["a"], raw)[:, 0].tolist() == [QUIRK, GOOD]     # what it was


def test_a_judge_without_room_for_the_end():
    """The prompt loses its start, in all members of a family alike."""
    rewards, _ = judge({"a": Judge(block_size=5), "b": Judge()}, [[FILL] * 3], [[GOOD, GOOD]])
    assert rewards.tolist() == [2]


@pytest.mark.parametrize("penalty, wanted", [(None, [1, 2, 1]), (0.0, [1, 2, 1]),
                                             (2.5, [-1.5, 2, -1.5])])
def test_the_penalty_is_for_samples_without_an_end(penalty, wanted, capsys):
    samples = [[GOOD, FILL, QUIRK], [GOOD, GOOD, EOT], [GOOD]]
    rewards, _ = judge({"a": Judge()}, [[FILL]] * 3, samples, missing_eos_penalty=penalty)
    assert rewards.tolist() == wanted
    said = capsys.readouterr().out
    assert said.startswith("warning: pi: 2 of 3 samples (66.7%) were cut off before their "
                           "end-of-text token, 1 at --max_new_tokens=3 and 1 at block_size: judged "
                           "with one appended")
    assert ("minus --missing_eos_penalty=2.5" in said) == (penalty == 2.5)


def test_the_oracle_of_text_judges_what_there_is(monkeypatch, capsys):
    """It needs no end; what was cut is counted and penalised all the same."""
    monkeypatch.setattr(tinytldr, "oracle_reward", lambda text, reply: len(reply.split()))
    samples = [[GOOD, FILL, FILL], [GOOD, EOT]]
    rewards, cut = judge({}, [[FILL]] * 2, samples)
    assert rewards.tolist() == [3, 1] and cut.tolist() == [True, False]
    assert "the oracle judges the text that there is" in capsys.readouterr().out
    rewards, _ = judge({}, [[FILL]] * 2, samples, missing_eos_penalty=1.0)
    assert rewards.tolist() == [2, 1]


@pytest.mark.parametrize("n_cut, line", [
    (0, ""), (1, "pi: 1 of 40 samples (2.5%) were cut"), (2, "pi: 2 of 40 samples (5.0%)"),
    (3, "warning: pi: 3 of 40 samples (7.5%) were cut")])
def test_a_warning_above_five_percent(capsys, n_cut, line):
    samples = [[FILL, FILL]] * n_cut + [[FILL, EOT]] * (40 - n_cut)
    assert count_cut_off("pi", samples, [EOT], 2, "so").sum() == n_cut
    said = capsys.readouterr().out
    assert said.startswith(line) and (n_cut > 0) == bool(said)
    assert said.endswith("a higher --max_new_tokens cuts off fewer\n") == (n_cut == 3)


def test_the_report_says_it():
    args = SimpleNamespace(max_new_tokens=8, missing_eos_penalty=None, oracle="out/oracle")
    results = {"reference": {"unended": 0.0}, "dpo": {"unended": 0.0}}
    assert cut_off_note(results, args) == ""
    results["dpo"]["unended"] = 0.04
    assert "end-of-text token appended" in cut_off_note(results, args)
    assert "Warning" not in cut_off_note(results, args)
    results["dpo"]["unended"], args.missing_eos_penalty = 0.06, 2.0
    note = cut_off_note(results, args)
    assert "more than 5% of the samples of dpo were cut off" in note
    assert "--missing_eos_penalty=2." in note
    args.oracle = None
    assert "appended" not in cut_off_note(results, args)


# ------------------------------------------------------------------ the scripts

@pytest.fixture(scope="module")
def toy(tmp_path_factory, hub_cache):
    """A file of pairs, and two policies that do not depend on what came before: in each token, `pi`
    says GOOD more often than the reference, and both end one time in ten."""
    root = tmp_path_factory.mktemp("toy")
    with open(root / "pairs.jsonl", "w") as file:
        for i in range(600):
            row = {"prompt": f"{i}:", "chosen": " sad" * (i % 5 + 1), "rejected": " broke"}
            file.write(json.dumps(row) + "\n")
    for name, good, fill in (("ref", 0.2, 0.7), ("pi", 0.5, 0.4)):
        model = GPT(CONFIG)
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(torch.eye(16)[0])
            model.transformer.wte.weight[:, 0] = -50        # the logits are this column
            for token, p in ((GOOD, good), (FILL, fill), (EOT, 0.1)):
                model.transformer.wte.weight[token, 0] = np.log(p)
        model.save_pretrained(root / name, EOT)
        (root / name / "config.json").write_text(json.dumps(
            json.loads((root / name / "config.json").read_text())
            | {"nanopref": {"tokenizer": "tinytldr"}}))
    RewardModel(CONFIG).save_pretrained(root / "oracle", EOT)
    (root / "oracle/config.json").write_text((root / "ref/config.json").read_text())
    return root


def compare(toy, tmp_path, monkeypatch, *flags):
    """results.json of evaluate.py on the toy file, judged by `Judge`."""
    def judges(folders, flag, *_):
        return {folders: Judge()} if folders else {}

    monkeypatch.setattr(evaluate, "load_reward_models", judges)
    evaluate.main([f"--ref={toy}/ref", f"{toy}/pi", f"--data={toy}/pairs.jsonl", "--n_prompts=60",
                   f"--oracle={toy}/oracle", f"--out_dir={tmp_path}/report", "--device=cpu",
                   "--show=0", *flags])
    return json.loads((tmp_path / "report/results.json").read_text())


def test_policies_are_compared_alike_wherever_their_samples_are_cut(toy, tmp_path, monkeypatch,
                                                                    capsys):
    """A token earns 0.3 more under pi than under the reference, for each token that was drawn. Read
    at the last token, whatever it is, pi would be ahead by the numbers of tokens."""
    for limit in (2, 4, 8):
        results = compare(toy, tmp_path, monkeypatch, f"--max_new_tokens={limit}")
        pi, ref = results["policies"]["pi"], results["reference"]
        n_tokens = (1 - 0.9 ** limit) / 0.1         # drawn, the end too: one in ten of these ends
        assert pi["advantage"] == pytest.approx(0.3 * n_tokens, abs=3 * pi["advantage_95"])
        assert pi["advantage_95"] < 1
        # Chance of a false alarm: 60 samples, 5 standard deviations.
        for numbers in (pi, ref):
            assert numbers["unended"] == pytest.approx(0.9 ** limit, abs=5 * (0.25 / 60) ** 0.5)
        assert "warning: pi: " in capsys.readouterr().out
        report = (tmp_path / "report/report.md").read_text()
        assert "more than 5% of the samples of reference, pi were cut off" in report
        # The log-probs are those of what was drawn: without an end, its -log 0.1 each would show.
        per_token = 0.5 * np.log(0.5 / 0.2) + 0.4 * np.log(0.4 / 0.7)
        assert pi["kl_pi_ref"] == pytest.approx(per_token * n_tokens, abs=0.25 * n_tokens)


def test_log_probs_are_of_samples_as_they_were_drawn(toy, tmp_path, monkeypatch):
    """What evaluate.py asks log-probs of has no end where the sample has none."""
    drawn, asked = [], []
    sample, score = evaluate.sample, evaluate.score

    def noted_sample(*values):
        drawn.append(sample(*values))
        return drawn[-1]

    def noted_score(model, dataset, *values):
        asked.append(dataset)
        return score(model, dataset, *values)

    monkeypatch.setattr(evaluate, "sample", noted_sample)
    monkeypatch.setattr(evaluate, "score", noted_score)
    results = compare(toy, tmp_path, monkeypatch, "--max_new_tokens=4")
    of_ref, of_pi = drawn
    assert any(was_cut_off(reply, [EOT]) for reply in of_ref)
    responses = [[reply for _, (reply,) in dataset.examples] for dataset in asked]
    assert responses == [of_ref, of_pi, of_pi, of_ref]
    gain = {GOOD: np.log(0.5 / 0.2), FILL: np.log(0.4 / 0.7), EOT: 0}
    wanted = np.mean([sum(gain[token] for token in reply) for reply in of_pi])
    assert results["policies"]["pi"]["kl_pi_ref"] == pytest.approx(wanted, abs=1e-4)
    wanted = np.mean([-sum(gain[token] for token in reply) for reply in of_ref])
    assert results["policies"]["pi"]["kl_ref_pi"] == pytest.approx(wanted, abs=1e-4)


def test_the_default_limit_of_an_evaluation_is_that_of_the_held_out_responses(toy, tmp_path,
                                                                              monkeypatch, capsys):
    """The longest responses are five words and the end. The penalty is in the numbers, and said."""
    results = compare(toy, tmp_path, monkeypatch)
    assert results["evaluation"]["max_new_tokens"] == 6
    assert "--max_new_tokens=6: 99% of the held-out responses are no longer" in (
        capsys.readouterr().out)
    penalised = compare(toy, tmp_path, monkeypatch, "--missing_eos_penalty=3")
    for before, after in ((results["reference"], penalised["reference"]),
                          (results["policies"]["pi"], penalised["policies"]["pi"])):
        assert after["unended"] == before["unended"] > 0
        assert after["reward"] == pytest.approx(before["reward"] - 3 * before["unended"])
    assert penalised["evaluation"]["missing_eos_penalty"] == 3


def test_training_selects_by_samples_with_an_end(toy, tmp_path, monkeypatch, capsys):
    """The default limit is that of the training responses, and is in the run's flags; the KL term's
    samples are cut there too, which is said, and stay as they were drawn."""
    seen = []

    def mean_reward(judges, dataset, *_):
        if len(dataset) == 20:      # and not the two samples that are shown
            seen.extend(reply for _, (reply,) in dataset.examples)
        return np.zeros((len(dataset), 1), np.float32)

    monkeypatch.setattr(reward, "mean_reward", mean_reward)
    flags = ["--loss=p-dpo", f"--init_from={toy}/ref", f"--data={toy}/pairs.jsonl", "--n_eval=20",
             "--max_steps=1", "--batch_size=8", f"--select={toy}/oracle", "--device=cpu",
             f"--out_dir={tmp_path}/run"]
    train_policy.main(flags)
    said = capsys.readouterr().out
    assert "--max_new_tokens=6: 99% of the training responses are no longer" in said
    assert "train samples for the KL term: " in said and "warning: --select: " in said
    config = json.loads((tmp_path / "run/config.json").read_text())["nanopref"]
    assert config["max_new_tokens"] == 6 and config["missing_eos_penalty"] is None
    assert len(seen) == 2 * 20 and all(reply[-1] == EOT for reply in seen)
    assert max(map(len, seen)) == 7
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    unended = [line["validation/unended"] for line in lines if "validation/unended" in line]
    assert unended[0] == np.mean([len(reply) == 7 for reply in seen[:20]]) > 0
    # A flag that is the default changes nothing, and so the run goes on; nor is it ignored.
    train_policy.main([*flags, "--max_new_tokens=6", "--resume"])


def test_distillation_that_samples_nothing_needs_no_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)         # where no speedrun has been

    def parsed(*flags):
        return train_policy.parse_flags(list(flags))

    assert parsed("--loss=e-dpo").max_new_tokens == 64                  # on tinytldr, as ever
    assert parsed("--loss=dpo", "--select=oracle").max_new_tokens == 64
    assert parsed("--loss=e-dpo", "--data=a.jsonl", "--rewards=x").max_new_tokens is None
    assert parsed("--loss=e-dpo", "--data=a.jsonl", "--rewards=x",
                  "--max_new_tokens=9").max_new_tokens == 9
    assert comparison_flags(["a"], "").max_new_tokens == 64
    assert comparison_flags(["a", "--data=b", "--oracle=c"], "").max_new_tokens is None
    with pytest.raises(InputError, match="--missing_eos_penalty: it would be ignored"):
        parsed("--loss=dpo", "--missing_eos_penalty=1")
    assert parsed("--loss=dpo", "--select=oracle",
                  "--missing_eos_penalty=1").missing_eos_penalty == 1


@pytest.mark.parametrize("prompt, responses, block_size, wanted", [
    (10, range(1, 101), 1024, 100),         # the 99th percentile is 99.01, rounded up
    (10, [5] * 10, 1024, 5),
    (10, [60] * 10, 64, 54),                # the room that prompts leave
    (60, [50] * 10, 64, 32)])               # which is at least half of it
def test_the_default_limit(capsys, prompt, responses, block_size, wanted):
    lengths = np.array([[prompt, length, 1] for length in responses])
    lengths[:, 2] = lengths[:, 1]
    assert longest_sample(lengths, block_size, "held-out") == wanted
    said = capsys.readouterr().out
    assert said.startswith(f"--max_new_tokens={wanted}: 99% of the held-out responses ")
    assert ("need" in said) == (block_size == 64)


# ------------------------------------------------------------------ runs/score.py

def test_scores_of_samples_in_a_file(toy, tmp_path, capsys):
    """Every response is read at the end-of-text token after it. Text has none to tell what was cut
    off: --max_new_tokens says where."""
    RewardModel(CONFIG).save_pretrained(tmp_path / "rm", EOT)
    path = tmp_path / "rm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text())
                               | {"nanopref": {"tokenizer": "tinytldr"}}))
    flags = [f"--data={toy}/pairs.jsonl", f"--rewards={tmp_path}/rm", "--device=cpu",
             f"--out={tmp_path}/scored.jsonl"]

    def scores(*more):
        score_script.main([*flags, *more])
        return [json.loads(line) for line in open(tmp_path / "scored.jsonl")]

    assert "cut off" not in capsys.readouterr().out
    plain = scores()
    assert "read with the end-of-text token after it" in capsys.readouterr().out
    assert scores("--max_new_tokens=4") == plain
    assert ("240 of 1200 samples (20.0%) were cut off before their end-of-text token, 240 at "
            "--max_new_tokens=4") in capsys.readouterr().out
    rows = scores("--max_new_tokens=4", "--missing_eos_penalty=2")
    assert [row["score_chosen"] for row in rows[:5]] == [0, 0, 0, -2, -2]    # a zero head
    assert {row["score_rejected"] for row in rows} == {0}
    with pytest.raises(InputError, match="--missing_eos_penalty: it would be ignored"):
        scores("--missing_eos_penalty=2")


def test_every_response_of_a_file_has_its_end():
    arrays = encode([{"prompt": "a", "responses": [" sad", " broke sad"]}], tokenizer())
    assert (arrays["tokens"][arrays["lengths"].cumsum()[1:] - 1] == EOT).all()
