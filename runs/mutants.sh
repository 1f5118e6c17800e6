#!/usr/bin/env bash
# Mutation testing: changes losses.py, the batch and subset code of data.py, the layouts of formats.py and the forward passes of model.py and reward.py
# in hundreds of small ways, one at a time, and lists the changes that no test notices (LOG.md says why each is accepted).
# Works on a copy in out/mutants; about 4 minutes.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
rm -rf out/mutants && mkdir -p out/mutants
cp -r *.py README.md runs tests out/mutants
cd out/mutants
cat > setup.cfg <<'END'
[mutmut]
source_paths=
    losses.py
    data.py
    model.py
    reward.py
    formats.py
pytest_add_cli_args_test_selection=
    tests/test_losses.py
    tests/test_theory.py
    tests/test_tree.py
    tests/test_estimators.py
    tests/test_data.py
    tests/test_formats.py
    tests/test_model.py
also_copy=
    runtime.py
    tinytldr.py
    train_policy.py
    train_rm.py
    evaluate.py
    sample.py
    README.md
    runs
    tests
END
export OMP_NUM_THREADS=1      # mutmut forks, which thread pools do not survive
mutmut="$PWD/../../$venv/bin/mutmut"
"$mutmut" run "losses.*" "data.x_collate*" "data.x_batches*" "data.x_batch_order*" "data.x_longer*" "data.x_biased_subset*" \
    "data.x_relabel*" "data.x_fit*" "data.x_encode*" "data.x_select*" "formats.x_parse*" "formats.x_scores_of*" "formats.x_text_of*" "model.x_tree_mask*" "model.xǁAttentionǁforward*" "model.xǁMLPǁforward*" \
    "model.xǁBlockǁforward*" "model.xǁTransformerǁ*" "model.xǁGPTǁlogits*" "model.xǁGPTǁresponse_logps*" \
    "reward.xǁRewardModelǁforward*" > run.log
killed=$(grep -acE "^(🎉|⏰)" run.log || true)      # a test that never ends is noticed too
survived=$(grep -aE "^(🙁|🫥|🤔)" run.log | sed 's/^[^ ]* //' | sort || true)
for mutant in $survived; do
    echo "$mutant"
    "$mutmut" show "$mutant" | grep "^[-+]" | grep -v "^---\|^+++"
done
echo "killed $killed of $((killed + $(wc -w <<< "$survived")))"
