import fcntl
import os
import random
import shutil
import signal
import sys
from itertools import islice

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")      # tiny models run faster so
os.environ["CUDA_VISIBLE_DEVICES"] = ""             # the bars are for float32 on a CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # no test may reach the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")     # nor a copy of what tiktoken once downloaded
os.environ.pop("NO_PROXY", None)
os.environ.pop("no_proxy", None)
for scheme in ("HTTP", "HTTPS", "ALL"):             # nobody listens there
    os.environ[f"{scheme}_PROXY"] = os.environ[f"{scheme.lower()}_proxy"] = "http://127.0.0.1:9"
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
    os.environ.pop(name, None)                      # the tests start torchrun themselves


# The order in which one learns: the first test that fails should be the one to look at first.
ORDER = ["test_losses", "test_data", "test_attention", "test_tree", "test_generation", "test_step",
         "test_theory", "test_estimators"]


def pytest_collection_modifyitems(items):
    """Runs the files above first, in their order."""
    places = {name: place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, len(ORDER)))


@pytest.fixture(autouse=True)
def the_same_state():
    """A run that a test starts chooses a device, a precision and a seed, which the next test does
    not want: what it draws must not depend on the tests that this worker has run before it."""
    import numpy as np
    import torch

    from support import device
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    vars(device.computing).update(device="cpu", dtype="float32", multiple=1, few_shapes=False)


@pytest.fixture(autouse=True)
def signals():
    """A run that a test leaves in the middle leaves its handlers of signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """Cache folders of the session's own, for what `datasets` converts and for tokens."""
    import datasets
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    os.environ["NANOPREF_CACHE"] = str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session", autouse=True)
def few_pairs():
    """TinyTLDR's validation and test pairs are 200, not 1000, whose samples take seconds."""
    import tinytldr
    pair_rows = tinytldr.pair_rows

    def fewer(split, n, *values, **options):
        return pair_rows(split, n if split == "train" else min(n, 200), *values, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinytldr, "pair_rows", fewer)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory, hub_cache):
    """A folder with the short runs that several tests look at: a reference policy, a reward model,
    a family of two. The first of several test processes trains them, the others copy them."""
    root = tmp_path_factory.mktemp("world") / "runs"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        train_world(root)
        return root
    shared = tmp_path_factory.getbasetemp().parent / "world"
    with open(f"{shared}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not (shared / "finished").exists():
            train_world(shared)
            (shared / "finished").touch()
    shutil.copytree(shared, root)
    return root


def train_world(root):
    import tinytldr
    import train_policy
    import train_rm
    all_rows = tinytldr.demonstration_rows
    with pytest.MonkeyPatch.context() as patch:     # 60 steps don't need 20,000 rows
        patch.setattr(tinytldr, "demonstration_rows", lambda *a: islice(all_rows(*a), 2500))
        train_policy.main(["--loss=sft", f"--out_dir={root}/sft", "--max_steps=60",
                           "--batch_size=32", "--n_embd=64"])
    shared = [f"--init_from={root}/sft", "--max_steps=6", "--batch_size=16", "--n_pairs=60",
              "--pool=500", "--n_eval=32"]
    train_rm.main([*shared, f"--out_dir={root}/rm"])
    train_rm.main([*shared, f"--out_dir={root}/rms", "--bias=0.2,0.6"])
