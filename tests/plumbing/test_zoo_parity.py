"""The losses of zoo.py, and DPO, equal TRL's own code: value and gradient, to 1e-5. TRL's trainers
compute a loss from what a model returns. Here a stand-in returns random log-probs of tokens.

Skipped where TRL is not installed; `bash dev/parity.sh` installs it and runs this.
"""
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import zoo
from losses import EVERY_LOSS, needs

trl = pytest.importorskip("trl")
cpo_trainer = pytest.importorskip("trl.experimental.cpo")
orpo_trainer = pytest.importorskip("trl.experimental.orpo")

B, T = 6, 9                 # pairs, tokens in the longest response
BETA, EPSILON = 0.3, 0.2


@pytest.fixture
def tokens():
    """Log-probs of the tokens of 2 B responses, all chosen ones first, (2 B, T), and which of the
    tokens there are."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, T + 1, (2 * B,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    log_probs = -2 * torch.rand(2 * B, T, generator=generator) - 0.1
    return (log_probs * mask).requires_grad_(), mask


def in_pairs(values):
    """(2 B,), all chosen ones first -> (B, 2)"""
    return torch.stack(values.chunk(2), dim=1)


def ref_logps_of(logps, near=1.0):
    """Log-probs of a reference that differs by about a nat, (2 B,)."""
    generator = torch.Generator().manual_seed(1)
    return logps.detach() + near * torch.randn(len(logps), generator=generator)


def unchanged(values):
    return values


def trainer(**settings):
    """What a trainer's method asks its trainer for, whose metrics go nowhere."""
    stub = MagicMock()
    stub.accelerator.gather_for_metrics.side_effect = unchanged
    stub.accelerator.gather.side_effect = unchanged
    stub.accelerator.device = "cpu"
    stub._tp_size = stub._total_train_tokens = 1
    stub.model.training, stub.aux_loss_enabled, stub.use_weighting = True, False, False
    stub.precompute_ref_logps, stub.ld_alpha = True, None
    stub.beta, stub.label_smoothing, stub.loss_weights = BETA, EPSILON, [1.0]
    stub.f_divergence_type, stub.f_alpha_divergence_coef = "reverse_kl", 0.7
    stub.args.discopop_tau = 0.4
    for name, value in settings.items():
        setattr(stub, name, value)
    return stub


def model_of(log_probs):
    """A model that answers with these log-probs whatever it is asked."""
    outputs = SimpleNamespace(log_probs=log_probs, entropy=log_probs.detach(),
                              mean_logits=log_probs.detach(), is_top1=log_probs > -1)
    return lambda **_: outputs


def inputs_of(mask):
    """A batch as the trainers see it: a prompt of one token before each response."""
    completion_mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)
    return {"input_ids": torch.ones_like(completion_mask), "completion_mask": completion_mask,
            "attention_mask": torch.ones_like(completion_mask)}


def ours_of(name, log_probs, mask, ref_logps, **flags):
    columns = {"logps": in_pairs(log_probs.sum(dim=1)), "ref_logps": in_pairs(ref_logps),
               "lengths": in_pairs(mask.sum(dim=1))}
    return EVERY_LOSS[name](**{need: columns[need] for need in needs(name)}, **flags).mean()


def assert_same(ours, theirs, log_probs):
    """Value, and gradient with respect to the log-prob of every token."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, log_probs, retain_graph=True)[0]
                 for loss in (ours, theirs)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


PAIRED = {      # TRL's name: (our flags, settings of the trainer, what TRL adds)
    "sigmoid": ({"beta": BETA}, {}, 0),
    "ipo": ({"tau": BETA}, {}, 0),
    "hinge": ({"beta": BETA}, {}, 0),
    "exo_pair": ({"beta": BETA, "epsilon": EPSILON}, {}, 0),
    "nca_pair": ({"beta": BETA}, {}, 0),
    "robust": ({"beta": BETA, "epsilon": EPSILON}, {}, 0),
    "bco_pair": ({"beta": BETA}, {}, 0),
    "sppo_hard": ({"eta": 1 / BETA}, {}, 0),
    "aot": ({"beta": BETA}, {"label_smoothing": 0.0}, 0),
    "aot_unpaired": ({"beta": BETA}, {"label_smoothing": 0.0}, 0),
    "apo_zero": ({"beta": BETA}, {}, 1),
    "apo_down": ({"beta": BETA}, {}, 1),
    "discopop": ({"beta": BETA, "blend": 0.4}, {}, 0),
    "sigmoid_norm": ({"beta": BETA}, {}, 0),
    "sigmoid, sft": ({"beta": BETA, "weight": 0.6}, {"loss_weights": [1.0, 0.6]}, 0),
    "f_divergence_type=alpha_divergence": ({"beta": BETA, "alpha": 0.3}, {}, 0),
    "f_divergence_type=forward_kl": ({"beta": BETA, "alpha": 1.0}, {}, 0),
    "f_divergence_type=js_divergence": ({"beta": BETA}, {}, 0),
}


def test_every_name_of_trls_is_compared_here():
    assert list(PAIRED) == list(zoo.TRL["DPOTrainer"])
    assert set(zoo.TRL["CPOTrainer"]) == {"sigmoid", "hinge", "simpo"}
    assert set(zoo.TRL["KTOTrainer"]) == {"kto", "apo_zero_unpaired"}


@pytest.mark.parametrize("theirs", PAIRED)
def test_dpo_trainer(tokens, theirs):
    """BCO where the rewards of the batch have mean 0, so that its shift, which TRL leaves out, is
    nothing. The fine-tuning of RPO where all responses have one length: TRL takes the mean over all
    tokens. APO but for a constant."""
    log_probs, mask = tokens
    if theirs == "sigmoid, sft":
        mask = torch.ones_like(mask)
    ours, settings, more = PAIRED[theirs]
    ref_logps = ref_logps_of(log_probs.sum(dim=1))
    if theirs == "bco_pair":
        ref_logps = ref_logps + (log_probs.sum(dim=1) - ref_logps).detach().mean()
    divergence = theirs.removeprefix("f_divergence_type=")
    names = ["sigmoid"] if divergence != theirs else theirs.split(", ")
    stub = trainer(loss_types=names, **settings)
    if divergence != theirs:
        stub.f_divergence_type = divergence
    chosen, rejected = ref_logps.chunk(2)
    inputs = {**inputs_of(mask), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    wanted = trl.DPOTrainer._compute_loss(stub, model_of(log_probs), inputs, False)
    name, _ = zoo.TRL["DPOTrainer"][theirs]
    assert_same(ours_of(name, log_probs, mask, ref_logps, **ours) + more, wanted, log_probs)


@pytest.mark.parametrize("theirs, more", [("kto", 0.0), ("apo_zero_unpaired", 0.5)])
@pytest.mark.parametrize("rise", [-2.0, 2.0])
def test_kto_trainer(tokens, theirs, more, rise):
    """With our reference point z in place of TRL's, where the mean log-ratio is below zero, and
    where it is above. TRL's mean is over responses."""
    log_probs, mask = tokens
    ref_logps = ref_logps_of(log_probs.sum(dim=1)) - rise
    z = (log_probs.sum(dim=1) - ref_logps).detach().mean()
    assert z * rise > 0
    stub = trainer(loss_type=theirs, calculate_KL=theirs == "kto", desirable_weight=1.0,
                   undesirable_weight=1.0, _compute_kl_logps=lambda model, batch: z[None])
    labels = torch.arange(2 * B) < B
    inputs = {**inputs_of(mask), "label": labels, "ref_logps": ref_logps,
              "ref_KL_logps": torch.zeros(1)}
    wanted = trl.KTOTrainer._compute_loss(stub, model_of(log_probs), inputs, False)
    name, _ = zoo.TRL["KTOTrainer"][theirs]
    ours = ours_of(name, log_probs, mask, ref_logps, beta=BETA)
    assert_same(ours / 2 + more, wanted, log_probs)


@pytest.mark.parametrize("rise", [-3.0, 3.0])
def test_kto_trainer_on_single_responses(tokens, rise):
    """With TRL's own reference point, from mismatched responses, whose log-ratios are below zero in
    the mean, and above; with weights, and labels in any order. TRL's mean is over responses."""
    log_probs, mask = tokens
    own, mismatched = log_probs.chunk(2)                            # (B, T) each
    logps = log_probs.sum(dim=1)
    ref_logps, ref_kl_logps = (ref_logps_of(logps) - rise).chunk(2)
    desirable = torch.tensor([True, False, False, True, True, False])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    stub = trainer(loss_type="kto", calculate_KL=True, **weights)
    stub._compute_kl_logps = partial(trl.KTOTrainer._compute_kl_logps, stub)
    model = MagicMock(side_effect=[model_of(mismatched)(), model_of(own)()])
    inputs = inputs_of(mask[:B]) | {f"KL_{name}": value
                                    for name, value in inputs_of(mask[B:]).items()}
    inputs |= {"label": desirable, "ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
    wanted = trl.KTOTrainer._compute_loss(stub, model, inputs, False)
    u, v = logps[:B] - ref_logps, logps[B:] - ref_kl_logps
    assert v.mean() * rise > 0
    ours = zoo.kto_unpaired(u, desirable, v, BETA, **weights).mean()
    assert_same(ours, wanted, log_probs)


@pytest.mark.parametrize("theirs, label_smoothing", [
    ("sigmoid", 0.0), ("sigmoid", EPSILON), ("hinge", 0.0), ("simpo", 0.0)])
def test_cpo_trainer(tokens, theirs, label_smoothing):
    """Its preference term: CPO, cDPO with a reference that is 0 everywhere, SLiC's hinge (with
    beta 1), SimPO."""
    log_probs, mask = tokens
    logps = log_probs.sum(dim=1)
    seen = logps / mask.sum(dim=1) if theirs == "simpo" else logps
    beta = 1.0 if theirs == "hinge" else BETA
    stub = trainer(loss_type=theirs, alpha=0.0, beta=beta, simpo_gamma=0.5,
                   label_smoothing=label_smoothing)
    wanted = cpo_trainer.CPOTrainer.cpo_loss(stub, *seen.chunk(2))[0].mean()
    name, _ = zoo.TRL["CPOTrainer"][theirs]
    flags = {"cpo": {"beta": BETA, "weight": 0.0}, "slic": {"target": 1.0, "weight": 0.0},
             "simpo": {"beta": BETA, "target": 0.5}}[name]
    if label_smoothing:
        name, flags = "cdpo", {"beta": BETA, "epsilon": EPSILON}
    ours = ours_of(name, log_probs, mask, torch.zeros(2 * B), **flags)
    assert_same(ours, wanted, log_probs)


def test_orpo_trainer(tokens):
    """Its odds-ratio term; the other term is -p, as in RPO."""
    log_probs, mask = tokens
    means = log_probs.sum(dim=1) / mask.sum(dim=1)
    stub = trainer()
    log_sigma = orpo_trainer.ORPOTrainer.odds_ratio_loss(stub, *means.chunk(2))[0]
    wanted = (-means[:B] - log_sigma).mean()
    assert_same(ours_of("orpo", log_probs, mask, means, weight=BETA), wanted, log_probs)
