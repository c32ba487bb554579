# Sourced by demo.sh and test.sh: leaves $python, a Python with everything in requirements.txt.
# An active virtual environment is used as it is; otherwise .venv is made here once and reused.
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${VIRTUAL_ENV:-}" ]; then
  python="$VIRTUAL_ENV/bin/python"
else
  python="$PWD/.venv/bin/python"
  if [ ! -x "$python" ]; then
    base=""
    for name in python3 python3.12 python3.11 python3.10; do
      if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        base="$name"; break
      fi
    done
    [ -n "$base" ] || { echo "error: no Python 3.10 or newer found; install one and run this again" >&2; exit 2; }
    echo "making a virtual environment in .venv with $("$base" --version)"
    "$base" -m venv .venv || { rm -rf .venv; echo "error: $base cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
  fi
fi
# Installing takes a minute or two and about 6 GB the first time, seconds after that.
stamp="$(dirname "$python")/../.installed"
for list in "$@"; do
  if ! cmp -s "$list" "$stamp-${list//\//-}"; then
    echo "installing $list"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$list"
    cp "$list" "$stamp-${list//\//-}"
  fi
done
