"""Parity with the libraries people trust: Hugging Face transformers and TRL, on identical weights, batches and settings.

Skipped where they are not installed; `bash runs/parity.sh` installs them into an environment of their own and runs this.
"""
import contextlib
import json
import os
import random

import pytest
import tiktoken
import torch

import runtime
import tinytldr
import train_policy
from data import batch_order, collate, get_tokenizer, preferences, save_tokenizer
from losses import bradley_terry, dpo, ipo
from model import GPT, TRANSPOSED, GPTConfig
from reward import RewardModel

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")        # theirs

VOCAB, BETA, TAU = 97, 0.3, 0.7


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gpt2_config(tied=True, block_size=48, vocab_size=VOCAB, **fields):
    return transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=32, n_layer=3, n_head=4, tie_word_embeddings=tied, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1, pad_token_id=0, **fields)


def random_weights(model, seed):
    """Away from the initial zeros and ones, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


TOKENS = torch.randint(0, VOCAB, (4, 40), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- transformers: weights in and out

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block_size", [48, 1024, 1500])
def test_gpt2_in_and_out(tmp_path, tied, block_size):
    """A transformers GPT-2 loads here, and what is saved here loads there: the same logits, the same parameters."""
    theirs = random_weights(transformers.GPT2LMHeadModel(gpt2_config(tied, block_size)), seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    assert ours.config.block_size == block_size and ours.config.tie_word_embeddings == tied
    with torch.no_grad():
        wanted = theirs.double()(TOKENS).logits      # in float64, where rounding can't hide or cause a difference
        torch.testing.assert_close(ours.double().logits(TOKENS), wanted, rtol=0, atol=1e-10)
    ours.float()
    ours.save_pretrained(tmp_path / "ours")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is transformers.GPT2LMHeadModel and again.config.n_positions == block_size
    with torch.no_grad():
        torch.testing.assert_close(again.double()(TOKENS).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block_size", [48, 1500])
def test_reward_model_in_and_out(tmp_path, block_size):
    """The same for a reward model and GPT2ForSequenceClassification with one label, whose reward is read at the last token.
    transformers takes the last token that is not config.pad_token_id: that must not be the end-of-text token, or the reward
    would be read one token too early."""
    theirs = random_weights(transformers.GPT2ForSequenceClassification(gpt2_config(True, block_size, num_labels=1)), seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RewardModel.from_pretrained(str(tmp_path / "theirs"))
    examples = [(TOKENS[0, :10].tolist(), [TOKENS[1, :n].tolist() + [VOCAB - 1] for n in (3, 12)]),
                (TOKENS[2, :1].tolist(), [TOKENS[3, :n].tolist() + [VOCAB - 1] for n in (20, 1)])]
    with torch.no_grad():
        found = ours(collate(examples))
        wanted = [[theirs(torch.tensor([prompt + response])).logits.item() for response in responses]
                  for prompt, responses in examples]
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, loading = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is transformers.GPT2ForSequenceClassification and again.config.num_labels == 1
    with torch.no_grad():
        for (prompt, responses), rewards in zip(examples, found):                   # each pair as one padded batch
            rows = [torch.tensor(prompt + response) for response in responses]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=again.config.pad_token_id)
            torch.testing.assert_close(again(padded).logits[:, 0], rewards, rtol=0, atol=1e-5)


def test_greedy_generation(tmp_path):
    theirs = random_weights(transformers.GPT2LMHeadModel(gpt2_config()), seed=3)
    theirs.save_pretrained(tmp_path)
    prompts = [TOKENS[row, :10].tolist() for row in range(4)]
    wanted = theirs.generate(torch.tensor(prompts), attention_mask=torch.ones(4, 10), do_sample=False, max_new_tokens=20,
                             eos_token_id=None)[:, 10:].tolist()
    assert GPT.from_pretrained(str(tmp_path)).generate(prompts, 20, temperature=0) == wanted


@pytest.mark.parametrize("encoding", ["tinytldr", "digits", "gpt2"])
def test_tokenizer_out(tmp_path, encoding):
    """AutoTokenizer reads the saved tokenizer and gives tiktoken's tokens, there and back, for all kinds of text."""
    if encoding == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no network, and TIKTOKEN_CACHE_DIR names no copy of tiktoken's files")
    if encoding == "digits":       # a pattern with possessive counts, as in the encodings after GPT-2's
        words = [bytes([b]) for b in range(256)] + [b"12", b"23", b"123", b"34", b" a"]
        ours = tiktoken.Encoding("digits", pat_str=r"\p{N}{1,3}+| ?\p{L}++|[^\p{L}\p{N}]", special_tokens={"<|endoftext|>": 261},
                                 mergeable_ranks={word: rank for rank, word in enumerate(words)})
    else:
        ours = get_tokenizer(encoding)
    save_tokenizer(tmp_path, ours, 4096)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eot_token and theirs.model_max_length == 4096
    draw = random.Random(0)
    letters = [chr(c) for c in (*range(32, 127), *range(160, 1500), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640))] + list(" \n\t") * 200
    texts = ["", " ", "  a   b\n\n c\t d  ", "It's I'LL we've 12345 67", "1234567 34 1 2334", "\r\n\r\n   ", "na\u00efve \u65e5\u672c\u8a9e x\u00b2", "end<|endoftext|>start",
             *(tinytldr.post(0, "train", i) + tinytldr.demonstration(0, "train", i, 0) for i in range(100)),
             *("".join(draw.choices(letters, k=60)) for _ in range(300))]
    for text in texts:
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


def test_a_run_folder_in_a_pipeline(world):
    """What transformers' pipelines make of run folders: the policy's greedy reply, and the reward model's reward."""
    tokenizer, prompt = get_tokenizer("tinytldr"), tinytldr.post(0, "test", 0)
    policy, reward_model = GPT.from_pretrained(f"{world}/sft"), RewardModel.from_pretrained(f"{world}/rm")
    ids, = policy.generate([tokenizer.encode_ordinary(prompt)], 20, temperature=0, stop=tokenizer.eot_token)
    reply = tokenizer.decode([token for token in ids if token != tokenizer.eot_token])
    generate = transformers.pipeline("text-generation", model=f"{world}/sft", device="cpu")
    assert generate(prompt, do_sample=False, max_new_tokens=20)[0]["generated_text"] == prompt + reply
    classify = transformers.pipeline("text-classification", model=f"{world}/rm", device="cpu", function_to_apply="none")
    with torch.no_grad():
        wanted = reward_model(collate([(tokenizer.encode_ordinary(prompt), [tokenizer.encode_ordinary(reply) + [tokenizer.eot_token]])]))
    assert classify(f"{prompt}{reply}<|endoftext|>")[0]["score"] == pytest.approx(wanted.item(), abs=1e-5)


# ---------------------------------------------------------------- TRL: losses, gradients, a whole run

@pytest.fixture
def peer():
    """runs/peer.py, if TRL is installed."""
    pytest.importorskip("trl")
    from runs import peer
    return peer


def random_pairs(n, seed):
    """Ragged pairs that end in the end-of-text token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()

    return [(draw(1, 20), [draw(0, 12) + [VOCAB - 1] for _ in range(2)]) for _ in range(n)]


def assert_same_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    checked = 0
    for name, parameter in ours.named_parameters():
        wanted = theirs[name].grad
        torch.testing.assert_close(parameter.grad, wanted.t() if name.endswith(TRANSPOSED) else wanted, rtol=1e-5, atol=1e-5,
                                   msg=lambda message: f"{name}: {message}")
        checked += 1
    assert checked == len(theirs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_losses_gradients_and_log_probs_equal_dpo_trainers(tmp_path, peer, loss_type):
    """DPO, and IPO on per-token means: TRL's loss, gradient of every parameter, and response log-probs, to 1e-5."""
    import datasets
    examples = random_pairs(6, seed=4)
    ref = random_weights(transformers.GPT2LMHeadModel(gpt2_config()), seed=5)
    policy = transformers.GPT2LMHeadModel(gpt2_config())
    policy.load_state_dict(ref.state_dict())
    random_weights(policy, seed=6).save_pretrained(tmp_path / "policy")
    ref.save_pretrained(tmp_path / "ref")
    ours, our_ref = GPT.from_pretrained(str(tmp_path / "policy")), GPT.from_pretrained(str(tmp_path / "ref"))

    temperature = BETA if loss_type == "sigmoid" else TAU
    trainer = peer.PreparedDPOTrainer(
        policy, ref, peer.trl.DPOConfig(str(tmp_path / "out"), beta=temperature, loss_type=[loss_type], **peer.SETTINGS, **peer.BEST),
        train_dataset=datasets.Dataset.from_list(peer.features(examples)), processing_class=peer.peer_tokenizer(VOCAB))
    inputs = trainer.data_collator(peer.features(examples))
    batch = collate(examples)
    with torch.no_grad():
        ref_logps = our_ref.response_logps(batch)                                   # (6, 2)
        for column, wanted in enumerate(trainer.compute_ref_log_probs(ref, inputs)):
            torch.testing.assert_close(ref_logps[:, column], wanted, rtol=1e-5, atol=1e-5)
    theirs = trainer.compute_loss(policy, inputs)
    theirs.backward()

    logps = ours.response_logps(batch)
    if loss_type == "sigmoid":
        loss = dpo(logps, ref_logps, BETA).mean()
    else:
        loss = ipo(logps / batch.lengths, ref_logps / batch.lengths, TAU).mean()
    loss.backward()
    assert abs((logps - ref_logps).detach()).max() > 0.1                          # they do differ
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, policy)


def test_bradley_terry_equals_reward_trainers(tmp_path, peer):
    """The reward model's loss and the gradient of every parameter equal RewardTrainer's, to 1e-5."""
    import datasets
    examples = random_pairs(6, seed=7)
    theirs = random_weights(transformers.GPT2ForSequenceClassification(gpt2_config(num_labels=1)), seed=8)
    theirs.save_pretrained(tmp_path / "model")
    ours = RewardModel.from_pretrained(str(tmp_path / "model"))
    rows = peer.reward_features(examples)
    trainer = peer.trl.RewardTrainer(theirs, peer.trl.RewardConfig(str(tmp_path / "out"), **peer.SETTINGS, **peer.BEST),
                                train_dataset=datasets.Dataset.from_list(rows), processing_class=peer.peer_tokenizer(VOCAB))
    wanted = trainer.compute_loss(theirs, trainer.data_collator(rows))
    wanted.backward()
    loss = bradley_terry(ours(collate(examples))).mean()
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, theirs)


def test_a_whole_dpo_run_follows_trls(tmp_path, peer, hub_cache, capsys):
    """Twenty steps of `train_policy.py --loss=dpo` and of TRL's DPOTrainer from the same weights, data order, learning rates
    and optimizer settings: the training loss agrees to 1e-4 at every step, and falls."""
    import datasets
    steps, batch_size, lr = 20, 8, 5e-3
    tokenizer = get_tokenizer("tinytldr")
    path = tmp_path / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(240):
            texts = [tinytldr.demonstration(0, "train", i, person) for person in range(2)]
            file.write(json.dumps({"prompt": tinytldr.post(0, "train", i), "chosen": max(texts, key=len),
                                   "rejected": min(texts, key=len)}) + "\n")
    GPT(GPTConfig(192, tokenizer.n_vocab, n_layer=2, n_head=4, n_embd=32)).save_pretrained(tmp_path / "start")
    start = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    random_weights(start, seed=9).save_pretrained(tmp_path / "start")

    train_policy.main(["--loss=dpo", f"--data={path}", f"--init_from={tmp_path}/start", "--tokenizer=tinytldr",
                       f"--out_dir={tmp_path}/ours", f"--max_steps={steps}", f"--batch_size={batch_size}", f"--lr={lr}",
                       f"--beta={BETA}", "--eval_every=1", "--n_eval=8", "--device=cpu"])
    with open(tmp_path / "ours" / "metrics.jsonl", encoding="utf-8") as file:
        ours = [line["loss"] for line in map(json.loads, file) if "loss" in line]

    train, = preferences(str(path), ["train"], tokenizer, 192)
    batch_rows = batch_order(train.row_lengths(), batch_size, seed=0)
    in_order = peer.features([train.examples[i] for step in range(steps) for i in batch_rows(step)])

    policy, ref = (transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "start") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: runtime.learning_rate(step, steps, 1.0))
    trainer = peer.PreparedDPOTrainer(
        policy, ref, peer.trl.DPOConfig(str(tmp_path / "out"), beta=BETA, per_device_train_batch_size=batch_size, num_train_epochs=1,
                                   logging_steps=1, max_grad_norm=1.0, **peer.SETTINGS, **peer.BEST),
        train_dataset=datasets.Dataset.from_list(in_order), processing_class=peer.peer_tokenizer(tokenizer.n_vocab),
        optimizers=(optimizer, schedule))
    with contextlib.redirect_stdout(None):
        trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    with capsys.disabled():
        print("\nDPO, 20 steps: training loss\nstep  here    TRL")
        for step, (a, b) in enumerate(zip(ours, theirs)):
            print(f"{step:4d}  {a:.5f} {b:.5f}")
    assert len(ours) == len(theirs) == steps
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(ours[-5:]) < 0.8 * sum(ours[:5])
