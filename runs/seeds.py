"""Averages the results of several speedruns: mean over the seeds ± standard deviation between them.

    for seed in 0 1 2; do OUT=out/seed$seed bash runs/speedrun.sh --seed=$seed; done
    python runs/seeds.py out/seed0 out/seed1 out/seed2
"""
import os
import sys
from statistics import mean, stdev

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from support.files import read_json
from support.flags import InputError, Parser, run_script

COLUMNS = {"advantage": "{:+.2f}", "win_rate": "{:.2f}", "length": "{:.1f}", "kl_pi_ref": "{:.2f}",
           "kl_ref_pi": "{:.2f}", "chosen_change": "{:+.1f}", "rejected_change": "{:+.1f}"}


def cell(form, values):
    text = form.format(mean(values))
    if len(values) > 1:
        text += f" ± {form.replace('+', '').format(stdev(values))}"
    return text


def parse_flags(argv):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="of finished speedruns")
    return parser.parse_args(argv)


def main(argv=None):
    runs = {}
    for folder in parse_flags(argv).folders:
        path = f"{folder}/results.json"
        runs[path] = read_json(path).get("policies", {})
    first = next(iter(runs.values()))
    for path, policies in runs.items():
        for name in first:
            missing = set(COLUMNS) - set(policies.get(name, {}))
            if missing:
                raise InputError(f"{path}: {name} has no {', '.join(sorted(missing))}; each folder "
                                 "is that of a finished speedrun")
    print("| policy | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in first:
        cells = [cell(form, [policies[name][key] for policies in runs.values()])
                 for key, form in COLUMNS.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_script(main)
