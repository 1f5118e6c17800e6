# Sourced by the other scripts here, with a folder and a requirements file: makes that virtual
# environment in the root of the repository once, and updates it when the requirements have changed.
# The versions are those of constraints.txt, or of a third file. PYTHON names another interpreter
# (3.10 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 requirements=$2 constraints=${3:-constraints.txt}
wanted() { cat requirements.txt "$requirements" "$constraints"; }
if ! wanted | cmp -s - "$venv/installed.txt"; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
        -c "$constraints"
    wanted > "$venv/installed.txt"
fi
