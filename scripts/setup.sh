# Sourced by the shell scripts beside it: makes the environment once and leaves its Python in $PYTHON.
# TRELLIS_VENV chooses another place than .venv for it, TRELLIS_CONSTRAINTS another file of pins than constraints.txt,
# TRELLIS_EXTRAS other optional packages.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${TRELLIS_VENV:-$ROOT/.venv}"
PYTHON="$VENV/bin/python"
PINS="$ROOT/${TRELLIS_CONSTRAINTS:-constraints.txt}"
EXTRAS="${TRELLIS_EXTRAS:-meshes,tokens,viewer,llm,ray,test}"

set_up() {
    local wanted stamp="$VENV/installed"
    wanted="$(echo "$EXTRAS" | cat "$ROOT/pyproject.toml" "$PINS" - | cksum)"
    if [ ! -x "$PYTHON" ]; then
        local base
        base="$(command -v python3 || command -v python)" || { echo "error: no python3 found; install Python 3.11 or newer" >&2; return 1; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: $base is $("$base" -V 2>&1); Python 3.11 or newer is needed" >&2; return 1; }
        echo "Making $VENV"
        "$base" -m venv "$VENV" ||
            { echo "error: $base cannot make environments; on Debian: apt-get install python3-venv" >&2; return 1; }
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing what $(basename "$PINS") pins (some minutes the first time)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$PINS" -e "$ROOT[$EXTRAS]" || return 1
        echo "$wanted" > "$stamp"
    fi
}

# Only tests compare with open3d.
check_open3d() {
    local packages="libusb-1.0-0 libgl1 libgomp1" reason
    reason="$("$PYTHON" -c 'import open3d' 2>&1)" && return 0
    if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
        printf 'error: open3d does not load:\n%s\nOn Debian or Ubuntu run: sudo apt-get install -y %s\n' "$reason" "$packages" >&2
        return 1
    fi
    echo "Installing $packages, which open3d needs"
    # shellcheck disable=SC2086 - a list
    apt-get update -qq > /dev/null && apt-get install -y -qq $packages > /dev/null || return 1
    "$PYTHON" -c 'import open3d'
}
