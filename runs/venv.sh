# Sourced by the other scripts here: makes the virtual environment $venv in the root of the repository once, and again when
# $requirements has changed. PYTHON names another interpreter (3.10 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${venv:-.venv} requirements=${requirements:-requirements.txt}
if ! cat requirements.txt "$requirements" | cmp -s - "$venv/installed.txt"; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements.txt "$requirements" > "$venv/installed.txt"
fi
