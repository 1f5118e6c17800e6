# Sourced by the other scripts here, with a folder and a requirements file: makes that virtual
# environment in the root of the repository once, and updates it when the requirements have changed.
# PYTHON names another interpreter (3.10 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 requirements=$2
if ! cat requirements.txt "$requirements" | cmp -s - "$venv/installed.txt"; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements.txt "$requirements" > "$venv/installed.txt"
fi
