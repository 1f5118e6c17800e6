"""Every family of models against Hugging Face's transformers: tiny models with random weights, and
where it is there SmolLM2-135M (NANOPREF_SMOLLM2), in and out.

Skipped where transformers is not installed; `bash dev/parity.sh` installs it into an environment of
its own and runs this.
"""
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from data import collate
from model import GPT
from reward import RewardModel
from support.families import FAMILIES, our_sizes

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")        # theirs

VOCAB, BLOCK = 61, 64
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=BLOCK,
             bos_token_id=1, eos_token_id=VOCAB - 1, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 20, "rope_theta": 500.0}
CASES = {       # name: what transformers' config of the family gets besides SIZES
    "llama": {},
    "llama-3": dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-both": dict(rope_parameters={"rope_theta": 9.0}, rope_scaling=LLAMA3, rope_theta=50.0),
    "llama-biases": dict(attention_bias=True, mlp_bias=True, head_dim=6, num_key_value_heads=4),
    "mistral": dict(sliding_window=None, num_key_value_heads=1),
    "mistral-window": dict(sliding_window=48),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16, rms_norm_eps=1e-2),
    "qwen3-biases": dict(head_dim=8, attention_bias=True),
    "smollm3": dict(num_hidden_layers=5),
    "olmo2": dict(rms_norm_eps=1e-3)}
TOKENS = torch.randint(2, VOCAB - 1, (4, 40), generator=torch.Generator().manual_seed(0))
EXAMPLES = [(TOKENS[0, :10].tolist(), [TOKENS[1, :n].tolist() + [VOCAB - 1] for n in (3, 12)]),
            (TOKENS[2, :1].tolist(), [TOKENS[3, :n].tolist() + [VOCAB - 1] for n in (20, 1)])]
# transformers computes norms and angles in float32 for a float64 model too: its log-probs are no
# closer to ours. (tests/test_model.py compares in float64, to 1e-10, with the formulas in numpy.)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def random_model(case, kind="ForCausalLM"):
    """A model of transformers whose norms, biases and heads are far from their first values."""
    title = FAMILIES[case.split("-")[0]].title
    sizes = SIZES | CASES[case] | ({"num_labels": 1} if kind != "ForCausalLM" else {})
    config = getattr(transformers, f"{title}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, title + kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def saved_again(model, kind, folder):
    """What transformers loads from what is saved here; every weight has its place."""
    model.save_pretrained(folder, eos_token_id=VOCAB - 1)
    again, loading = getattr(transformers, f"AutoModel{kind}").from_pretrained(
        folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert {t.dtype for t in again.parameters()} == {torch.float32}
    return again.eval()


def separate_logps(model, examples):
    """The summed log-prob of each response, from a sequence of its own."""
    rows = []
    for prompt, responses in examples:
        sums = []
        for response in responses:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            logps = logits.log_softmax(dim=1).gather(1, torch.tensor(response)[:, None])
            sums.append(logps.sum())
        rows.append(torch.stack(sums))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_language_models(case, tmp_path):
    """Logits, log-probs of responses in a tree and greedy generation, in and out, to 1e-5."""
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    assert ours.config.block_size == (CASES[case].get("sliding_window") or BLOCK)
    wanted = theirs(TOKENS).logits
    assert wanted.abs().max() > 1
    logits = ours.logits(TOKENS)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    again = saved_again(ours, "ForCausalLM", tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(again(TOKENS).logits, wanted)
    read_again = GPT.from_pretrained(str(tmp_path / "ours"))
    assert read_again.config == ours.config
    assert all(torch.equal(*pair) for pair in zip(read_again.state_dict().values(),
                                                  ours.state_dict().values()))

    prompts = [TOKENS[0, :10].tolist(), TOKENS[1, :3].tolist()]
    for prompt, response in zip(prompts, ours.generate(prompts, 20, temperature=0)):
        text = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20,
                               eos_token_id=None, pad_token_id=0)
        assert response == text[0, len(prompt):].tolist()

    batch = collate(EXAMPLES)
    logps, wanted_logps = ours.response_logps(batch), separate_logps(theirs, EXAMPLES)
    torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=3e-5)
    print(f"{case}: logits up to {wanted.abs().max():.1f} differ by at most "
          f"{(logits - wanted).abs().max():.1e}, log-probs of responses (nats) by "
          f"{(logps - wanted_logps).abs().max():.1e}")
    ours, theirs = ours.double(), theirs.double()
    torch.testing.assert_close(ours.logits(TOKENS), theirs(TOKENS).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_reward_models(case, tmp_path):
    """The reward is read at the last token, the same in a padded batch of transformers."""
    theirs = random_model(case, "ForSequenceClassification")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RewardModel.from_pretrained(str(tmp_path / "theirs"))
    rewards = ours(collate(EXAMPLES))                                       # (2, 2)
    assert rewards.abs().max() > 0.5
    again = saved_again(ours, "ForSequenceClassification", tmp_path / "ours")
    assert type(again) is type(theirs) and again.config.num_labels == 1
    for model in (theirs, again):
        for (prompt, responses), row in zip(EXAMPLES, rewards):
            texts = [torch.tensor(prompt + response) for response in responses]
            padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True,
                                                     padding_value=model.config.pad_token_id)
            wanted = model(padded, attention_mask=padded != model.config.pad_token_id)
            torch.testing.assert_close(row, wanted.logits[:, 0], **CLOSE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_what_holds_where_config_json_is_silent(family):
    """A config.json with sizes alone means here what it means there."""
    needed = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=6,
                  num_attention_heads=32, max_position_embeddings=BLOCK, model_type=family)
    config = getattr(transformers, FAMILIES[family].title + "Config").from_dict(dict(needed))
    theirs = our_sizes(json.loads(config.to_json_string(use_diff=False)), "there")
    ours = our_sizes(needed, "here")
    for sizes in (ours, theirs):
        del sizes["token_ids"]
        sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
        sizes["head_size"] = sizes["head_size"] or sizes["n_embd"] // sizes["n_head"]
    assert ours == theirs


@torch.no_grad()
@pytest.mark.real_data
@pytest.mark.skipif("NANOPREF_SMOLLM2" not in os.environ, reason="needs NANOPREF_SMOLLM2")
def test_smollm2(tmp_path):
    """Real weights: the same logits, log-probs, text, rewards, and the same numbers in a file."""
    folder = os.environ["NANOPREF_SMOLLM2"]
    ours = GPT.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 49152, (2, 60), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    examples = [(tokens[0, :20].tolist(), [tokens[0, 20:45].tolist(), tokens[1, :13].tolist()])]
    torch.testing.assert_close(ours.response_logps(collate(examples)),
                               separate_logps(theirs, examples), rtol=1e-6, atol=1e-4)
    prompt = tokens[0, :20].tolist()
    text = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20,
                           eos_token_id=None)[0, 20:].tolist()
    assert ours.generate([prompt], 20, temperature=0) == [text]

    # Rewards add up 576 numbers of either sign. float32 leaves an error of some 1e-6 of the hidden
    # state's length, which is 50 here, and weights of N(0, 1) make as much of it in the reward.
    reward_model = RewardModel.from_policy(ours)
    torch.nn.init.normal_(reward_model.score.weight, generator=torch.Generator().manual_seed(0))
    judge = saved_again(reward_model, "ForSequenceClassification", tmp_path / "rm")
    rewards = reward_model(collate(examples))[0]
    for reward, response in zip(rewards, examples[0][1]):
        wanted = judge(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(reward, wanted, rtol=0, atol=5e-4)

    saved_again(ours, "ForCausalLM", tmp_path / "again")
    before = load_file(os.path.join(folder, "model.safetensors"))
    after = load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
