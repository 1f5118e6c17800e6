"""Averages the results of several speedruns: mean over the seeds ± standard deviation between them.

    for seed in 0 1 2; do OUT=out/seed$seed bash runs/speedrun.sh --seed=$seed; done
    python runs/seeds.py out/seed0 out/seed1 out/seed2
"""
import json
import sys
from statistics import mean, stdev

COLUMNS = {"advantage": "{:+.2f}", "win_rate": "{:.2f}", "length": "{:.1f}", "kl_pi_ref": "{:.2f}",
           "kl_ref_pi": "{:.2f}", "chosen_change": "{:+.1f}", "rejected_change": "{:+.1f}"}


def cell(form, values):
    text = form.format(mean(values))
    if len(values) > 1:
        text += f" ± {form.replace('+', '').format(stdev(values))}"
    return text


def main(folders):
    if not folders:
        sys.exit(__doc__)
    runs = []
    for folder in folders:
        try:
            with open(f"{folder}/results.json", encoding="utf-8") as file:
                runs.append(json.load(file)["policies"])
        except OSError as error:
            sys.exit(f"{error.filename}: {error.strerror}; each folder is a finished speedrun's")
    print("| policy | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in runs[0]:
        cells = [cell(form, [run[name][key] for run in runs]) for key, form in COLUMNS.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
