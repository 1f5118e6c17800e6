"""Makes an assignment: a copy of the repository in which some functions are left to write.

    python runs/assignment.py pairs --handout               # a set of the course, with its page
    python runs/assignment.py losses.dpo losses.ipo --out_dir=out/homework      # your own choice
    python runs/assignment.py pairs --student=s1234         # this student's variant of a set

The sets are in runs/course.py, and docs/assignments.md describes them. You can also name single
functions, by their file and their own name, and for a method its class too, such as
reward.RewardModel.forward. The signature and the docstring stay, the body becomes an error. The
copy has the files that a student needs, and none that repeats an answer.
"""
import ast
import glob
import os
import shutil
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from runs import handout, variants
from runs.course import SETS
from support.flags import InputError, Parser, run_script

PROJECTS = ("leaderboard",)     # sets in which nothing is emptied: the students write their own
# What goes into every copy, from the root. The README, the other pages, the studies, the results
# and the tests of the plumbing stay behind: they repeat answers, or nobody needs them there.
IN_THE_COPY = [
    "*.py", "support/*.py", "tests/*.py", "runs/test.sh", "runs/venv.sh", "runs/first_look.sh",
    "runs/speedrun.sh", "runs/show.py", "docs/glossary.md", "docs/models.md", "requirements.txt",
    "requirements-dev.txt", "constraints.txt", "pyproject.toml", ".gitignore", "LICENSE"]
OF_A_PROJECT = {"leaderboard": ["experiments/leaderboard.py", "experiments/entry.py",
                                "experiments/trials.py"]}
STAYS_BEHIND = {"tests/test_zoo.py"}
# A file that would repeat answers, and what the copy has in its place.
REPLACED = {"zoo.py": '''"""Is the place for losses by other authors. This copy has none of them.
A loss that you add to the table gets its own --loss."""
from losses import MORE

ZOO = {}
MORE.update(ZOO)                        # now losses.py finds them by name
'''}
# Some functions repeat the answer to another one. If that one is left to write, they have this body
# instead, or (None) are left to write too.
REPEATS = {
    "losses.dpo": {"losses.p_dpo": "return dpo(logps, ref_logps, beta) + gamma * kl"},
    "losses.d_dpo": {
        "losses.dp_dpo": "return d_dpo(logps, ref_logps, rewards, beta) + gamma * kl"},
    "losses.e_dpo": {"losses.best_member": None},
    "losses.best_member": {"losses.e_dpo": None},
}


def find(source, names):
    """Finds a function in the source of its file. Returns its syntax tree. names: the names of the
    classes that it is in, then its own. InputError if there is no such function."""
    node = ast.parse(source)
    for name in names:
        inside = [child for child in node.body if getattr(child, "name", None) == name]
        if not inside:
            raise InputError(f"functions: there is no {'.'.join(names)} in that file")
        node = inside[0]
    if not isinstance(node, ast.FunctionDef):
        raise InputError(f"functions: {'.'.join(names)} is a class; name one of its methods")
    return node


def without_body(source, names, instead=None):
    """Returns the source of a file with one function left to write.

    names: see find. instead: a line that becomes the body (default: an error that says so)."""
    body = find(source, names).body
    lines = source.splitlines(keepends=True)
    first = body[0].lineno - 1
    if ast.get_docstring(find(source, names)) is not None:
        first = body[0].end_lineno
    instead = instead or f'raise NotImplementedError("{names[-1]}: yours to write")'
    indent = " " * body[0].col_offset
    return "".join([*lines[:first], f"{indent}{instead}\n", *lines[body[-1].end_lineno:]])


def read_source(function):
    """Reads the file that a function is in. function: such as losses.dpo. Returns (its path from
    the root, its source, the function's name after those of its classes)."""
    module, *names = function.split(".")
    path = f"{module}.py"
    there = module.isidentifier() and os.path.isfile(os.path.join(ROOT, path))
    if not (names and there):
        raise InputError(f"functions: {function}: name a set ({', '.join([*SETS, *PROJECTS])}), or "
                         "a file of the root and a function in it, such as losses.dpo")
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return path, file.read(), names


def functions_of(words):
    """Lists the functions that sets and single names ask for, without repetition."""
    functions = []
    for word in words:
        if word not in PROJECTS:
            functions += SETS.get(word, [word])
    return list(dict.fromkeys(functions))


def bodies_in_copy(functions):
    """Says which functions have another body in the copy. functions: those to write. Returns
    {function: a line, or None for one that is left to write}."""
    bodies = dict.fromkeys(functions)
    for function in functions:
        for repeats, body in REPEATS.get(function, {}).items():
            bodies.setdefault(repeats, body)
    return bodies


def emptied(bodies, edited):
    """Changes the bodies of functions. bodies: see bodies_in_copy. edited: {path: its source} in a
    variant. Returns {path: the source that the copy has there}."""
    sources = dict(edited)
    for function, body in bodies.items():
        path, source, names = read_source(function)
        sources[path] = without_body(sources.get(path, source), names, body)
    return sources


def write_copy(folder, sources, projects=()):
    """Writes a copy of the repository. sources: {path: text} of files that are different there.
    projects: names of projects whose files are copied too."""
    patterns = IN_THE_COPY + [path for project in projects for path in OF_A_PROJECT[project]]
    for pattern in patterns:
        for path in glob.glob(pattern, root_dir=ROOT):
            if path not in STAYS_BEHIND:
                os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
                shutil.copyfile(os.path.join(ROOT, path), os.path.join(folder, path))
    for path, source in {**REPLACED, **sources}.items():
        if path in STAYS_BEHIND:
            continue
        with open(os.path.join(folder, path), "w", encoding="utf-8") as file:
            file.write(source)


def parse_flags(argv):
    parser = Parser(__doc__)
    parser.add_argument("functions", nargs="+", metavar="SET or FUNCTION",
                        help=f"a set ({', '.join([*SETS, *PROJECTS])}), or functions such as "
                        "losses.dpo")
    parser.add_argument("--out_dir", help="for the copy: a new folder (default: out/SET, or "
                        "out/homework)")
    parser.add_argument("--handout", action="store_true", help="add the page of the set: to the "
                        "copy README.md and handout.html, and next to it, with the answers, "
                        "OUT_DIR-teacher.md and OUT_DIR-teacher.html")
    parser.add_argument("--student", help="draw a variant of the set from this ID: other numbers "
                        "and one more loss; VARIANT.md in the copy lists them")
    args = parser.parse_args(argv)
    one_set = len(args.functions) == 1 and args.functions[0] in (*SETS, *PROJECTS)
    if args.handout and not one_set:
        raise InputError("--handout: there is a page for each set; name one of "
                         f"{', '.join([*SETS, *PROJECTS])}")
    if args.student and not (one_set and args.functions[0] in SETS):
        raise InputError(f"--student: there are variants of each set; name one of "
                         f"{', '.join(SETS)}")
    args.out_dir = args.out_dir or f"out/{args.functions[0] if one_set else 'homework'}"
    return args


def main(argv=None):
    args = parse_flags(argv)
    teachers = [f"{args.out_dir}-teacher{ending}" for ending in (".md", ".html")]
    for path in [args.out_dir, *(teachers if args.handout else [])]:
        if os.path.lexists(path):
            raise InputError(f"--out_dir: {path} is there already; name a new folder")
    bodies = bodies_in_copy(functions_of(args.functions))
    variant = None
    if args.student:
        variant = variants.draw(args.student, args.functions[0], SETS[args.functions[0]])
    sources = emptied(bodies, variant.edited if variant else {})
    to_write = [function for function, body in bodies.items() if body is None]
    if variant:
        sources["VARIANT.md"] = variants.page(variant)
        if variant.loss:
            sources["zoo.py"] = variants.zoo_file(variant.loss)
            to_write.append(variant.loss)
    projects = [word for word in args.functions if word in PROJECTS]
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy")
        write_copy(copy, sources, projects)
        if args.handout:
            handout.write_student(copy, *args.functions, variant)
        shutil.move(copy, os.path.abspath(args.out_dir))
    print(f"to write: {', '.join(to_write) or 'a loss of their own'} -> {args.out_dir}")
    if args.handout:
        handout.write_teacher(teachers, *args.functions, variant)
        print(f"the page: {args.out_dir}/README.md and handout.html; with answers: "
              f"{' and '.join(teachers)}")


if __name__ == "__main__":
    run_script(main)
