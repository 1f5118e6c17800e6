"""Parity with the libraries people trust: Hugging Face transformers and TRL, on identical weights,
batches and settings.

Skipped where they are not installed; `bash dev/parity.sh` installs them into an environment of
their own and runs this.
"""
import contextlib
import json
import os
import random
import shutil

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import tinytldr
import train_policy
from data import BatchOrder, Dataset, collate, get_tokenizer, preferences
from lora import add_lora
from losses import batch_loss, bradley_terry
from model import GPT, GPTConfig
from reward import RewardModel
from support.families import TRANSPOSED
from support.flags import InputError
from support.tokenizer import save_tokenizer
from train_policy import learning_rate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")        # theirs

VOCAB, BETA, TAU = 97, 0.3, 0.7


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gpt2_config(tied=True, block_size=48, vocab_size=VOCAB, **fields):
    return transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=32, n_layer=3, n_head=4,
        tie_word_embeddings=tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1, pad_token_id=0, **fields)


def random_weights(model, seed):
    """Away from the initial zeros and ones, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


TOKENS = torch.randint(0, VOCAB, (4, 40), generator=torch.Generator().manual_seed(0))


# ---------------- transformers: weights in and out


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_both_gelus(tmp_path, activation):
    """GPT-2's approximation and the exact one, in and out. (The initial weights are too small to
    tell them apart.)"""
    config = gpt2_config(activation_function=activation)
    theirs = random_weights(transformers.GPT2LMHeadModel(config), seed=1)
    for layer in theirs.transformer.h:
        layer.mlp.c_fc.weight.data *= 10
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        logits = ours.double().logits(TOKENS)
        for model in (theirs, again):
            torch.testing.assert_close(logits, model.double()(TOKENS).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("head", ["own", "alone"])
def test_heads_that_transformers_keeps(tmp_path, head):
    """A head that differs from the embedding under a config.json that says nothing of it, which
    transformers 5 keeps too; and a tied model whose file has the head alone."""
    theirs = random_weights(transformers.GPT2LMHeadModel(gpt2_config(head == "alone")), seed=1)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if head == "alone":
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        save_file(tensors, path, metadata={"format": "pt"})
    with torch.no_grad():
        logits = GPT.from_pretrained(str(tmp_path)).double().logits(TOKENS)
        torch.testing.assert_close(logits, theirs.double()(TOKENS).logits, rtol=0, atol=1e-10)


# ---------------- PEFT: LoRA adapters


def base_model(family, tmp_path, kind="CausalLM"):
    """A small model of a family, saved in the folder `base`."""
    if family == "gpt2":
        config, name = gpt2_config(), "GPT2LMHeadModel"
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        name = "LlamaForCausalLM"
    random_weights(getattr(transformers, name)(config), seed=1).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_that_peft_loads(tmp_path, family):
    """An adapter that is written here: PEFT's logits and PEFT's merged model are ours, and so are
    the rewards of a reward model's."""
    peft = pytest.importorskip("peft")
    base = base_model(family, tmp_path)
    ours = GPT.from_pretrained(base)
    add_lora(ours, 4, base)
    random_weights(ours, seed=2)
    ours_frozen = GPT.from_pretrained(base).state_dict()
    ours.load_state_dict(ours_frozen, strict=False)             # the base as it is in its file
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = ours.double().logits(TOKENS)
        assert (wanted - GPT.from_pretrained(base).double().logits(TOKENS)).abs().max() > 0.1
        for model in (theirs, by_transformers, theirs.merge_and_unload()):
            got = model.double()(TOKENS).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)

    policy = GPT.from_pretrained(base)
    add_lora(policy, 4, base)
    reward_model = RewardModel.from_policy(policy)
    with torch.no_grad():
        for weight in reward_model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape)
    reward_model.save_pretrained(tmp_path / "rm")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", num_labels=1, pad_token_id=0).eval()
    examples = [([3, 4, 5], [[7, 8, 9], [1, 2]])]
    with torch.no_grad():
        rewards = reward_model(collate(examples))[0]
        for reward, response in zip(rewards, examples[0][1]):
            got = theirs(torch.tensor([examples[0][0] + response])).logits[0, 0]
            torch.testing.assert_close(got, reward, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, targets, options", [
    ("gpt2", ["c_attn"], {}), ("gpt2", ["c_attn", "c_proj", "c_fc"], {"use_rslora": True}),
    ("llama", ["q_proj", "v_proj"], {}), ("llama", "all-linear", {}),
    ("llama", ["q_proj", "up_proj", "o_proj"], {"rank_pattern": {"up_proj": 3}})])
def test_an_adapter_of_peft(tmp_path, family, targets, options):
    """An adapter that PEFT made, of some of the layers or of all, each with its own A: the logits
    are PEFT's, unmerged and merged."""
    peft = pytest.importorskip("peft")
    base = base_model(family, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if ".lora_" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs.double()(TOKENS).logits
        for merge in (False, True):
            ours = GPT.from_pretrained(str(tmp_path / "adapter"), merge=merge).double()
            torch.testing.assert_close(ours.logits(TOKENS), wanted, rtol=0, atol=1e-5)


def test_peft_on_other_layers_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = base_model("llama", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])
                        ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="can't be read, because LoRA here is only for"):
        GPT.from_pretrained(str(tmp_path / "adapter"))


# ---------------- transformers: models


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block_size", [48, 1024, 1500])
def test_gpt2_in_and_out(tmp_path, tied, block_size):
    """A transformers GPT-2 loads here, and what is saved here loads there: the same logits, the
    same parameters."""
    theirs = random_weights(transformers.GPT2LMHeadModel(gpt2_config(tied, block_size)), seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    assert ours.config.block_size == block_size and ours.config.tie_word_embeddings == tied
    with torch.no_grad():      # in float64, where rounding can't hide or cause a difference
        wanted = theirs.double()(TOKENS).logits
        torch.testing.assert_close(ours.double().logits(TOKENS), wanted, rtol=0, atol=1e-10)
    ours.float()
    ours.save_pretrained(tmp_path / "ours")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is transformers.GPT2LMHeadModel and again.config.n_positions == block_size
    with torch.no_grad():
        torch.testing.assert_close(again.double()(TOKENS).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block_size", [48, 1500])
def test_reward_model_in_and_out(tmp_path, block_size):
    """The same for a reward model and GPT2ForSequenceClassification with one label, whose reward is
    read at the last token. transformers takes the last token that is not config.pad_token_id: that
    must not be the end-of-text token, or the reward would be read one token too early."""
    config = gpt2_config(True, block_size, num_labels=1)
    theirs = random_weights(transformers.GPT2ForSequenceClassification(config), seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RewardModel.from_pretrained(str(tmp_path / "theirs"))
    end = [VOCAB - 1]
    examples = [(TOKENS[0, :10].tolist(), [TOKENS[1, :n].tolist() + end for n in (3, 12)]),
                (TOKENS[2, :1].tolist(), [TOKENS[3, :n].tolist() + end for n in (20, 1)])]
    with torch.no_grad():
        rewards = ours(collate(examples))                                           # (2, 2)
        for row, (prompt, responses) in enumerate(examples):
            for k, response in enumerate(responses):
                wanted = theirs(torch.tensor([prompt + response])).logits[0, 0]
                torch.testing.assert_close(rewards[row, k], wanted, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is transformers.GPT2ForSequenceClassification
    assert again.config.num_labels == 1
    with torch.no_grad():
        for (prompt, responses), wanted in zip(examples, rewards):      # a pair as a padded batch
            texts = [torch.tensor(prompt + response) for response in responses]
            padded = pad_sequence(texts, batch_first=True, padding_value=again.config.pad_token_id)
            torch.testing.assert_close(again(padded).logits[:, 0], wanted, rtol=0, atol=1e-5)


def test_greedy_generation(tmp_path):
    theirs = random_weights(transformers.GPT2LMHeadModel(gpt2_config()), seed=3)
    theirs.save_pretrained(tmp_path)
    prompts = TOKENS[:, :10]
    wanted = theirs.generate(prompts, attention_mask=torch.ones(4, 10), do_sample=False,
                             max_new_tokens=20, eos_token_id=None)[:, 10:].tolist()
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.generate(prompts.tolist(), 20, temperature=0) == wanted


# ---------------- transformers: the tokenizer, and pipelines


def digits_encoding():
    """A pattern with possessive counts, as in the encodings after GPT-2's."""
    words = [bytes([b]) for b in range(256)] + [b"12", b"23", b"123", b"34", b" a"]
    return tiktoken.Encoding(
        "digits", pat_str=r"\p{N}{1,3}+| ?\p{L}++|[^\p{L}\p{N}]",
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={"<|endoftext|>": len(words)})


def all_kinds_of_text():
    posts = [tinytldr.post(0, "train", i) + tinytldr.demonstration(0, "train", i)
             for i in range(100)]
    ranges = (range(32, 127), range(160, 1500), range(0x4E00, 0x4E40), range(0x1F600, 0x1F640))
    letters = [chr(c) for codes in ranges for c in codes] + list(" \n\t") * 200
    draw = random.Random(0)
    noise = ["".join(draw.choices(letters, k=60)) for _ in range(300)]
    return ["", " ", "  a   b\n\n c\t d  ", "It's I'LL we've 12345 67", "1234567 34 1 2334",
            "\r\n\r\n   ", "na\u00efve \u65e5\u672c\u8a9e x\u00b2", "end<|endoftext|>start",
            *posts, *noise]


@pytest.mark.parametrize("encoding", ["tinytldr", "digits", "gpt2"])
def test_tokenizer_out(tmp_path, encoding):
    """AutoTokenizer reads the saved tokenizer and gives tiktoken's tokens, there and back, for all
    kinds of text."""
    if encoding == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no network, and TIKTOKEN_CACHE_DIR names no copy of tiktoken's files")
    ours = digits_encoding() if encoding == "digits" else get_tokenizer(encoding)
    save_tokenizer(tmp_path, ours, 4096)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eot_token and theirs.model_max_length == 4096
    for text in all_kinds_of_text():
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_tokenizer_in(tmp_path, kind):
    """A model's own tokenizer, as AutoTokenizer reads it, and as it reads the copy next to what is
    trained: the same tokens for all kinds of text, but that a special token in it is text here."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(all_kinds_of_text(), 700, special_tokens=["<pad>", "<|endoftext|>"])
    if kind == "vocab.json":
        trained.save_model(str(tmp_path))
    else:
        trained.save(str(tmp_path / kind))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = get_tokenizer(str(tmp_path))
    save_tokenizer(tmp_path / "copy", ours, 4096)
    for folder in (tmp_path, tmp_path / "copy"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == ours.eot_token == 1
        for text in all_kinds_of_text():
            ids = ours.encode_ordinary(text)
            assert ours.decode(ids) == text and 1 not in ids
            if "<|endoftext|>" not in text:
                assert theirs.encode(text) == ids


def test_a_run_folder_in_a_pipeline(world, tmp_path):
    """What transformers' pipelines make of run folders: the policy's greedy reply, and the reward
    of a reward model with the standard head."""
    tokenizer, prompt = get_tokenizer("tinytldr"), tinytldr.post(0, "test", 0)
    prompt_ids, end = tokenizer.encode_ordinary(prompt), tokenizer.eot_token
    policy = GPT.from_pretrained(f"{world}/sft")
    ids, = policy.generate([prompt_ids], 20, temperature=0, stop=end)
    reply = tokenizer.decode([token for token in ids if token != end])
    generate = transformers.pipeline("text-generation", model=f"{world}/sft", device="cpu")
    generated, = generate(prompt, do_sample=False, max_new_tokens=20)
    assert generated["generated_text"] == prompt + reply

    shutil.copytree(f"{world}/sft", tmp_path / "rm")
    reward_model = random_weights(RewardModel.from_policy(policy, "last"), seed=3)
    reward_model.save_pretrained(tmp_path / "rm", end)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "rm"),
                                     device="cpu", function_to_apply="none")
    with torch.no_grad():
        reply_ids = tokenizer.encode_ordinary(reply) + [end]
        wanted = reward_model(collate([(prompt_ids, [reply_ids])])).item()
    judged, = classify(f"{prompt}{reply}<|endoftext|>")
    assert judged["score"] == pytest.approx(wanted, abs=1e-5)


# ---------------- TRL: losses, gradients, a whole run


@pytest.fixture
def peer():
    """dev/peer.py, if TRL is installed."""
    pytest.importorskip("trl")
    from dev import peer
    return peer


def random_pairs(n, seed):
    """Ragged pairs that end in the end-of-text token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()

    return [(draw(1, 20), [draw(0, 12) + [VOCAB - 1] for _ in range(2)]) for _ in range(n)]


def assert_close_to_peers(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_gradients_are_peers(ours, theirs):
    """Of every parameter of both networks."""
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        wanted = theirs[name].grad
        wanted = wanted.t() if name.endswith(TRANSPOSED) else wanted
        assert_close_to_peers({name: parameter.grad}, {name: wanted})


@pytest.mark.parametrize("loss, theirs_is, flags", [
    ("dpo", "sigmoid", {"beta": BETA}), ("ipo-per-token", "ipo", {"tau": TAU})])
def test_losses_gradients_and_log_probs_equal_dpo_trainers(tmp_path, peer, loss, theirs_is, flags):
    """DPO, and IPO on per-token means: TRL's loss, gradient of every parameter, and response
    log-probs, to 1e-5."""
    import datasets
    examples = random_pairs(6, seed=4)
    ref = random_weights(transformers.GPT2LMHeadModel(gpt2_config()), seed=5)
    policy = transformers.GPT2LMHeadModel(gpt2_config())
    policy.load_state_dict(ref.state_dict())
    random_weights(policy, seed=6).save_pretrained(tmp_path / "policy")
    ref.save_pretrained(tmp_path / "ref")
    ours = GPT.from_pretrained(str(tmp_path / "policy"))
    our_ref = GPT.from_pretrained(str(tmp_path / "ref"))

    temperature, = flags.values()
    trl_args = peer.trl.DPOConfig(str(tmp_path / "out"), beta=temperature, loss_type=[theirs_is],
                                  **peer.SETTINGS, **peer.BEST)
    rows = peer.features(examples)
    trainer = peer.PreparedDPOTrainer(policy, ref, trl_args,
                                      train_dataset=datasets.Dataset.from_list(rows),
                                      processing_class=peer.peer_tokenizer(VOCAB))
    inputs, batch = trainer.data_collator(rows), Dataset(examples).batch(range(6))
    with torch.no_grad():
        batch.ref_logps = our_ref.response_logps(batch)                             # (6, 2)
        wanted = trainer.compute_ref_log_probs(ref, inputs)                         # 2 of (6,)
    assert_close_to_peers(batch.ref_logps, torch.stack(list(wanted), dim=1))
    trl_loss = trainer.compute_loss(policy, inputs)
    trl_loss.backward()

    logps = ours.response_logps(batch)
    our_loss = batch_loss(loss, logps, batch, **flags).mean()
    our_loss.backward()
    assert (logps - batch.ref_logps).detach().abs().max() > 0.1                # they do differ
    assert_close_to_peers(our_loss, trl_loss)
    assert_gradients_are_peers(ours, policy)


def test_bradley_terry_equals_reward_trainers(tmp_path, peer):
    """The reward model's loss and the gradient of every parameter equal RewardTrainer's, to
    1e-5."""
    import datasets
    examples = random_pairs(6, seed=7)
    config = gpt2_config(num_labels=1)
    theirs = random_weights(transformers.GPT2ForSequenceClassification(config), seed=8)
    theirs.save_pretrained(tmp_path / "model")
    ours = RewardModel.from_pretrained(str(tmp_path / "model"))
    rows = peer.reward_features(examples)
    trl_args = peer.trl.RewardConfig(str(tmp_path / "out"), **peer.SETTINGS, **peer.BEST)
    trainer = peer.trl.RewardTrainer(theirs, trl_args,
                                     train_dataset=datasets.Dataset.from_list(rows),
                                     processing_class=peer.peer_tokenizer(VOCAB))
    wanted = trainer.compute_loss(theirs, trainer.data_collator(rows))
    wanted.backward()
    loss = bradley_terry(ours(collate(examples))).mean()
    loss.backward()
    assert_close_to_peers(loss, wanted)
    assert_gradients_are_peers(ours, theirs)


def write_pairs(path, n):
    """n posts with two demonstrations, the longer one chosen."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            texts = [tinytldr.demonstration(0, "train", i, person) for person in range(2)]
            row = {"prompt": tinytldr.post(0, "train", i), "chosen": max(texts, key=len),
                   "rejected": min(texts, key=len)}
            file.write(json.dumps(row) + "\n")


def test_a_whole_dpo_run_follows_trls(tmp_path, peer, hub_cache, capsys):
    """Twenty steps of `train_policy.py --loss=dpo` and of TRL's DPOTrainer from the same weights,
    data order, learning rates and optimizer settings: the training loss agrees to 1e-4 at every
    step, and falls."""
    import datasets
    steps, batch_size, lr = 20, 8, 5e-3
    tokenizer = get_tokenizer("tinytldr")
    data, init_from = str(tmp_path / "pairs.jsonl"), str(tmp_path / "start")
    write_pairs(data, 240)
    sizes = GPTConfig(192, tokenizer.n_vocab, n_layer=2, n_head=4, n_embd=32)
    random_weights(GPT(sizes), seed=9).save_pretrained(init_from)

    train_policy.main([
        "--loss=dpo", f"--data={data}", f"--init_from={init_from}", "--tokenizer=tinytldr",
        f"--out_dir={tmp_path}/ours", f"--max_steps={steps}", f"--batch_size={batch_size}",
        f"--lr={lr}", f"--beta={BETA}", "--eval_every=1", "--n_eval=8", "--device=cpu"])
    with open(tmp_path / "ours" / "metrics.jsonl", encoding="utf-8") as file:
        ours = [line["loss"] for line in map(json.loads, file) if "loss" in line]

    policy = GPT.from_pretrained(init_from)
    train = preferences(data, "train", tokenizer, policy, cache=str(tmp_path / "cache"))
    order = BatchOrder(train.row_lengths(), batch_size, seed=0)
    examples = [train.examples[i] for step in range(steps) for i in order.rows(step)]

    policy = transformers.GPT2LMHeadModel.from_pretrained(init_from)
    ref = transformers.GPT2LMHeadModel.from_pretrained(init_from)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps, 1.0))
    trl_args = peer.trl.DPOConfig(
        str(tmp_path / "out"), beta=BETA, per_device_train_batch_size=batch_size,
        num_train_epochs=1, logging_steps=1, max_grad_norm=1.0, **peer.SETTINGS, **peer.BEST)
    trainer = peer.PreparedDPOTrainer(
        policy, ref, trl_args, train_dataset=datasets.Dataset.from_list(peer.features(examples)),
        processing_class=peer.peer_tokenizer(tokenizer.n_vocab), optimizers=(optimizer, schedule))
    with contextlib.redirect_stdout(None):
        trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    with capsys.disabled():
        print("\nDPO, 20 steps: training loss\nstep  here    TRL")
        for step, (here, there) in enumerate(zip(ours, theirs)):
            print(f"{step:4d}  {here:.5f} {there:.5f}")
    assert len(ours) == len(theirs) == steps
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(ours[-5:]) / 5 < 0.8 * ours[0]
