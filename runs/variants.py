"""Draws variants of the course's sets from students' IDs, so that copied solutions don't fit.

    python runs/assignment.py pairs --student=s1234         # a copy with this student's variant
    python runs/grade.py out/pairs pairs --student=s1234    # judged by the same variant

A variant changes some numbers: in the functions, their docstrings and the tests. It adds a loss of
zoo.py, and a world of TinyTLDR, which is a seed. All of it follows from the ID, so nothing has to
be stored.
"""
import ast
import os
import random
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

ZOO_POINTS = 4
ZOO = {     # the losses of zoo.py that a set may add
    "pairs": ("zoo.hinge", "zoo.squared_hinge", "zoo.cdpo", "zoo.sppo", "zoo.dpop", "zoo.r_dpo"),
    "distillation": ("zoo.odpo", "zoo.rebel"),
}


ZOO_FILE = '''"""Has a loss by other authors, which is yours to write. In its docstring, u and v are
the log-ratios logp_pi - logp_ref of the chosen and of the rejected response, h = u - v, |y| is the
length of a response in tokens, and sigma is the logistic function.
"""
{margins}

{stub}    raise NotImplementedError("{name}: yours to write")


ZOO = {{"{key}": {name}}}
MORE.update(ZOO)                        # now losses.py finds it by name
'''


# The properties that the published losses have.
PUBLISHED = ("tests/test_zoo.py::test_a_loss_has_the_properties_of_its_equation",)


class Change(NamedTuple):
    """Describes one thing that is different. note: in a sentence. edits: {file: [(old text, new
    text)]}, one after the other. without: tests that no longer hold."""
    note: str
    edits: dict
    without: tuple = ()


def longer(percent, factor, divisor, in_16_bits):
    """Changes data.longer: a response is longer if it has at least `percent` more tokens, which
    means that `divisor` times its length is at least `factor` times the other's. in_16_bits:
    lengths at which these products overflow 16 bits."""
    old = ("np.where(10 * chosen >= 11 * rejected, 1, "
           "np.where(10 * rejected >= 11 * chosen, -1, 0))")
    new = old.replace("10 *", f"{divisor} *").replace("11 *", f"{factor} *")
    return Change(
        f"data.longer: a response is longer if it has at least {percent}% more tokens, not 10%.",
        {"data.py": [("by at least 10% more tokens", f"by at least {percent}% more tokens"),
                     (old, new)],
         "tests/test_data.py": [
             ('sides(109, 100) == [0, 0], "less than 10%',
              f'sides({99 + percent}, 100) == [0, 0], "less than {percent}%'),
             ('sides(1105, 1000) == [1, -1], "10%',
              f'sides({1005 + 10 * percent}, 1000) == [1, -1], "{percent}%'),
             ("sides(110, 100)", f"sides({100 + percent}, 100)"),
             ("exactly 10% more is enough; compare whole numbers, as 1.1 * 100 is above 110 in "
              "floats", f"exactly {percent}% more is enough; compare whole numbers"),
             ("[[3277, 3000]]", in_16_bits),
             ("ten times the length is", f"{divisor} times the length is")]})


def ipo(note, formula, old, new, step_0, hint=()):
    """Changes IPO: its formula has `new` in the place of `old`. step_0: its value at step 0. hint:
    one more edit."""
    def edit(text):
        return text, text.replace(old, new)

    def edit_capital(text):
        return text, text.replace(old.replace("tau", "TAU"), new.replace("tau", "TAU"))

    old_step_0 = "1 / (4 * 0.2 ** 2)"
    return Change(f"losses.ipo: {note}", {
        "losses.py": [("optimisation: (h - 1 / (2 tau))^2", f"optimisation: {formula}"),
                      edit("(h - 1 / (2 * tau)) ** 2")],
        "tests/test_losses.py": [
            edit("(h_by_hand(logps, ref_logps) - 1 / (2 * tau)) ** 2"),
            edit("(chosen - rejected - 1 / (2 * tau)) ** 2"),
            (f'"ipo": {old_step_0}', f'"ipo": {step_0}'),
            (f'"ipo-per-token": {old_step_0}', f'"ipo-per-token": {step_0}'), *hint],
        "tests/test_training.py": [
            edit_capital("(pair.h - 1 / (2 * TAU)) ** 2"),
            edit_capital("(pair.h_per_token - 1 / (2 * TAU)) ** 2")]},
        without=PUBLISHED)


def member(name, formula, value, index, by_hand):
    """Changes e-DPO: it takes another member of the family than the best one. value, index: tensor
    methods that pick its loss and its number from (B, M). by_hand: picks its loss from a list."""
    def edit(before, numbers, after=""):
        return f"{before}min({numbers}){after}", before + by_hand.format(numbers) + after

    return Change(f"losses.e_dpo, losses.best_member: they take {name}.", {
        "losses.py": [
            ("the paper's e-DPO: min_m (r_m(y1)", f"a variant of e-DPO: {formula} (r_m(y1)"),
            ("It distils a family of reward models. The minimum",
             f"Here {name} counts for each pair. About the paper's loss:\n"
             "    It distils a family of reward models. The minimum"),
            (".square().min(dim=1).values + gamma", f".square(){value} + gamma"),
            ("Returns the index of the reward model that fits each pair best, which e-DPO's "
             "minimum picks.", f"Returns the index of {name}, for each pair."),
            (".square().argmin(dim=1)", f".square(){index}")],
        "tests/test_losses.py": [
            edit("return ", "members_by_hand(logps, ref_logps, rewards, beta)", " + gamma * kl"),
            edit("return ", "(chosen - rejected) ** 2 for chosen, rejected in zip(*rewards)"),
            ("members.min(dim=1).values", f"members{value}"),
            ("wanted = gaps.square().argmin(dim=1)", f"wanted = gaps.square(){index}")],
        "tests/test_training.py": [
            edit("return ", "(margin - BETA * pair.h) ** 2 for margin in pair.margins"),
            edit("misfits.index(", "misfits", ")")]},
        without=(
            *PUBLISHED,
            "tests/test_theory.py::test_e_dpo_is_the_minimum_over_members_of_d_dpo_for_each_pair",
            "tests/test_theory.py::test_e_dpo_has_the_gradient_of_the_best_fitting_member_alone",
            "tests/test_theory.py::test_adding_a_member_never_raises_the_loss",
            "tests/test_theory.py::test_one_member_for_each_pair_is_the_weaker_demand",
            "tests/test_training.py::test_rows_with_different_numbers_of_responses"))    # has ties


def warm_up(percent):
    hint = "the warm-up takes {}% of the steps, not {}%\": curve({})"
    return Change(
        f"train_policy.learning_rate: the warm-up takes {percent}% of the steps, not 5%.",
        {"train_policy.py": [
            ("over the first 5% of the steps", f"over the first {percent}% of the steps"),
            ("max_steps // 20", f"max_steps // {100 // percent}")],
         "tests/test_step.py": [
             ("Of 100 steps, 5 are", f"Of 100 steps, {percent} are"),
             ("curve(5", f"curve({percent}"),
             (f"[1.0] * 5 + curve({percent})[5:]",
              f"[1.0] * {percent} + curve({percent})[{percent}:]"),
             (hint.format(10, 5, 10), hint.format(5, percent, 5))],
         "tests/test_training.py": [
             ("Up to LR over 5% of", f"Up to LR over {percent}% of"),
             ("max(1, int(0.05 * max_steps))", f"max(1, max_steps // {100 // percent})")]},
        without=("tests/test_step.py::test_learning_rate_of_short_runs",))


# {a function: the changes of which a variant of its set has one}
CHANGES = {
    "losses.ipo": (
        ipo("the fourth power, not the square.", "(h - 1 / (2 tau))^4", "** 2", "** 4",
            "1 / (2 * 0.2) ** 4"),
        ipo("the margin to reach is 1 / tau, not 1 / (2 tau).", "(h - 1 / tau)^2",
            "1 / (2 * tau)", "1 / tau", "1 / 0.2 ** 2",
            [('"1 / tau, not 1 / (2 tau)"] = formula(tau=tau / 2)',
              '"1 / (2 tau), not 1 / tau"] = formula(tau=2 * tau)')])),
    "losses.e_dpo": (
        member("the second-best member (or the only one)", "the second-smallest over m of",
               ".sort(dim=1).values[:, :2][:, -1]", ".argsort(dim=1, stable=True)[:, :2][:, -1]",
               "sorted({})[:2][-1]"),
        member("the worst member", "max_m", ".max(dim=1).values", ".argmax(dim=1)", "max({})")),
    "data.longer": (
        longer(15, 23, 20, "[[1639, 1500]]"), longer(25, 5, 4, "[[7000, 6800]]")),
    "train_policy.learning_rate": (warm_up(10), warm_up(20)),
}


class Variant(NamedTuple):
    """Describes a student's variant. seed: of the world. loss: the one of zoo.py that is added, or
    None. points: {function: points}, those of the set and of that loss. notes: what is different,
    in sentences. edited: {file: its source, with the solutions}. without: tests that no longer
    hold."""
    seed: int
    loss: str
    points: dict
    notes: list
    edited: dict
    without: tuple


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def apply(changes):
    """Returns {file: its source} with some changes."""
    edited = {}
    for change in changes:
        for path, edits in change.edits.items():
            source = edited.get(path) or read(path)
            for old, new in edits:
                assert old in source, f"{path} has no {old}"
                source = source.replace(old, new)
            edited[path] = source
        for test in change.without:
            path, name = test.split("::")
            edited[path] = without_function(edited.get(path) or read(path), name)
    return edited


def without_function(source, name):
    """Returns the source of a file without a function."""
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines(keepends=True)
    return "".join(lines[:first - 1] + lines[node.end_lineno:]).rstrip() + "\n"


def zoo_file(loss):
    """Returns the source of zoo.py in a student's copy: one loss alone, and that is left to write.
    loss: such as "zoo.r_dpo"."""
    source, name = read("zoo.py"), loss.split(".")[1]
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    nodes = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def text(first, last):
        return "".join(lines[first.lineno - 1:last.end_lineno])

    imports = next(node for node in tree.body if isinstance(node, ast.Import))
    return ZOO_FILE.format(
        margins=text(imports, nodes["mean_logps"]), name=name, key=name.replace("_", "-"),
        stub=text(nodes[name], nodes[name].body[0]))            # up to the end of its docstring


def draw(student, name, points):
    """Draws a student's variant of a set. student: an ID. name: of the set. points: {function:
    points}. Returns a Variant."""
    rng = random.Random(f"{student} {name}")            # the same in every version of Python
    seed = rng.randrange(1, 10_000)
    changes = [rng.choice(CHANGES[function]) for function in CHANGES if function in points]
    notes = [change.note for change in changes]
    loss = None
    if name in ZOO:
        loss = rng.choice(ZOO[name])
        points = {**points, loss: ZOO_POINTS}
        notes.append(f"{loss}: one loss more to write, after the formula in its docstring. Its "
                     "tests are not in this copy.")
    notes.append(f"Your world: run the experiments with --seed={seed}.")
    without = tuple(test for change in changes for test in change.without)
    return Variant(seed, loss, points, notes, apply(changes), without)


def page(variant):
    """Returns the text of VARIANT.md, which a student's copy has."""
    lines = "".join(f"* {note}\n" for note in variant.notes)
    return ("# Your variant\n\nThis copy is yours alone. Where a page of the course says something "
            f"else, this and the\ndocstrings hold.\n\n{lines}")
