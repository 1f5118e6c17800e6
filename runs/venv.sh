# Sourced by the other scripts here: makes .venv in the root of the repository once, and again when requirements.txt
# has changed. PYTHON names another interpreter (3.10 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! cmp -s requirements.txt .venv/installed.txt; then
    "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
