"""Mutation testing: changes the code in many small ways, one at a time, and lists the changes that
no test notices (LOG.md says why each is accepted).

    bash dev/mutants.sh                                        # both groups: hours on 2 cores
    bash dev/mutants.sh core                                   # the losses, data, forward passes
    bash dev/mutants.sh training                               # the scripts, the run folder
    bash dev/mutants.sh training "train_rm.x_main*"            # some mutants of a group, by name

For each mutant, mutmut runs the tests that call the changed function, until one fails. It works on
copies of the repository in out/mutants, on as many mutants at a time as the environment variable
WORKERS says (or as there are cores). Give it an idle machine: a test that is merely slow counts as
one that noticed the mutant.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COPIED = [*sorted(path.name for path in ROOT.glob("*.py")), "README.md", "docs", "dev",
          "experiments", "runs", "support", "tests"]


class Group(NamedTuple):
    """Says what to change and which tests to run.

    files: what is changed, and in each the names of functions and classes ("" for all). tests: in
    the order in which a mutant meets them. without: slow ones among them that are left out, because
    others check the same lines."""
    files: dict
    tests: tuple
    without: tuple = ()


GROUPS = {
    "core": Group({
        "losses.py": [""],
        "data.py": ["TreeBatch", "collate", "Dataset", "ranked_pairs", "by_length", "batches",
                    "BatchOrder", "longer", "biased_subset", "relabel"],
        "model.py": ["tree_mask", "Attention.forward", "MLP.forward", "Block.forward",
                     "Transformer", "GPT.logits", "GPT.response_logps"],
        "reward.py": ["RewardModel.forward"],
        "support/backward.py": [""],
        "support/tokens.py": ["encode", "fit", "equal_responses", "select"],
        "support/rows.py": ["parse_rows", "scores_of", "part_of"],
    }, ("test_losses", "test_theory", "test_attention", "test_tree", "test_estimators",
        "test_data", "test_tokens", "test_rows", "test_generation", "test_model", "test_zoo"),
        without=("the_page_is_up_to_date",)),          # it needs results/
    "training": Group({
        "train_policy.py": [""],
        "train_rm.py": [""],
        "reward.py": ["RewardModel.__init__", "RewardModel.from_", "RewardModel.save_",
                      "load_reward_models", "family_scores", "training_pairs"],
        "support/run.py": [""],
    }, ("test_step", "test_run_folder", "test_scripts", "test_training", "test_flags",
        "test_runs"), without=(
        "every_loss_trains", "every_loss_trains_on_rankings", "same_seed_same_bytes",
        "evaluating_more_often_changes_nothing", "file_data_end_to_end", "report",
        "a_report_keeps_no_figure_of_an_older_report", "policies_are_compared_prompt_by_prompt",
        "results_are_json_where_a_group_is_empty", "sample_streams_what_generate_gives",
        "sample_beside_the_reference", "bad_input_from_the_shell")),
}

# What is added to tests/conftest.py: the runs that many tests look at are made once, by the code as
# it is (each mutant gets a copy); and tests run in the order of the table above.
CONFTEST = '''

import shutil


@pytest.fixture(scope="session")
def world(tmp_path_factory, hub_cache):
    return shutil.copytree({world!r}, tmp_path_factory.mktemp("world") / "world")


def pytest_collection_modifyitems(items):
    order = {order!r}
    items.sort(key=lambda item: (order.index(item.path.stem), item.reportinfo()[1]))
'''
MAKE_WORLD = '''
import shutil


def test_make_world(world):
    shutil.copytree(world, {world!r})
'''


def names(group):
    """Lists the names that mutmut gives to a group's mutants, with * at the end."""
    patterns = []
    for path, functions in group.files.items():
        module = path.removesuffix(".py").replace("/", ".")
        for function in functions:
            owner, _, method = function.rpartition(".")
            if owner or function[:1].isupper():         # a class, or a method
                function = f"xǁ{owner or function}ǁ{method if owner else ''}"
            elif function:
                function = f"x_{function}"
            patterns.append(f"{module}.{function}*")
    return patterns


def copy(name, group):
    """Copies the repository and adds mutmut's settings. Returns the folder of the copy."""
    folder = ROOT / "out" / "mutants" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in COPIED:
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, folder / path)
        else:
            shutil.copy(ROOT / path, folder / path)
    for path in group.files:        # mutmut leaves decorated functions alone; no result changes
        code = (folder / path).read_text(encoding="utf-8")
        lines = [line for line in code.splitlines(keepends=True)
                 if not line.startswith(("@torch.no_grad", "@torch.compiler"))]
        (folder / path).write_text("".join(lines), encoding="utf-8")
    selected = []
    for test in group.tests:
        selected += [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob(f"{test}.py")]
    selected += [f"--deselect={selected[-1]}::test_{name}" for name in group.without]
    settings = {"source_paths": [*group.files], "also_copy": COPIED, "timeout_multiplier": [3],
                "do_not_mutate_patterns": [r"^ *print\("],
                "pytest_add_cli_args_test_selection": selected}
    with open(folder / "setup.cfg", "w", encoding="utf-8") as file:
        file.write("[mutmut]\n")
        for key, values in settings.items():
            separator = "\n    " if len(values) > 1 else " "
            file.write(f"{key} ={separator}{separator.join(map(str, values))}\n")
    return folder


def make_world(folder, group):
    """Runs the fixture `world` of tests/conftest.py once, and replaces it by a copy."""
    test = folder / "tests" / "test_make_world.py"
    world = str(folder / "world")
    test.write_text(MAKE_WORLD.format(world=world), encoding="utf-8")
    subprocess.run([BIN / "python", "-m", "pytest", "-q", test], cwd=folder, check=True)
    test.unlink()
    with open(folder / "tests" / "conftest.py", "a", encoding="utf-8") as file:
        file.write(CONFTEST.format(world=world, order=group.tests))


def run_mutants(folder, patterns):
    """Runs mutmut. Returns (number of mutants, names of those that no test noticed)."""
    log = folder / "run.log"
    with open(log, "w", encoding="utf-8") as file:
        workers = os.environ.get("WORKERS", str(os.cpu_count()))
        done = subprocess.run([BIN / "mutmut", "run", "--max-children", workers, *patterns],
                              cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"mutmut failed: {log}")
    results = log.read_text(encoding="utf-8").split("Mutant results\n")[-1].splitlines()[1:]
    results = [line.split() for line in results if line.strip()]
    noticed = "🎉⏰💥"           # a test failed, it never ended, Python crashed
    return len(results), [mutant for verdict, mutant in results if verdict not in noticed]


def show(folder, mutant):
    done = subprocess.run([BIN / "mutmut", "show", mutant], cwd=folder, capture_output=True,
                          text=True, check=True)
    print(mutant)
    for line in done.stdout.splitlines():
        if line.startswith(("-", "+")) and not line.startswith(("---", "+++")):
            print(line)


def main(chosen=None, *patterns):
    if chosen not in (None, *GROUPS):
        sys.exit(f"mutants.py: error: {chosen}: a group is {' or '.join(GROUPS)}")
    os.environ["OMP_NUM_THREADS"] = "1"     # mutmut forks, which thread pools do not survive
    os.environ["PYTHONIOENCODING"] = "utf-8"
    summary = []
    for name in [chosen] if chosen else GROUPS:
        group = GROUPS[name]
        folder = copy(name, group)
        make_world(folder, group)
        n, survivors = run_mutants(folder, patterns or names(group))
        for mutant in survivors:
            show(folder, mutant)
        killed = n - len(survivors)
        summary.append(f"{name}: killed {killed} of {n} ({killed / n:.1%})")
        print(summary[-1], flush=True)
    print("\n".join(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
